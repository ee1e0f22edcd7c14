"""Reading, through libvirt alone, what virtlogd keeps of a guest's serial console.

libvirt has no verb for it. But it reads any part of a disk of a domain, also of one that is not running, and a disk
that is declared raw is never looked into for a format: nothing that a guest prints is interpreted by the node. So the
log's files are the disks of a *reader*: a domain that is defined for the moment of reading and never started. One that
a killed worker leaves behind is inert, is no domain to the rest of the engine, and goes with the next reading.

Source: virDomainBlockPeek and virDomainGetBlockInfo in libvirt's reference; virtlogd.conf(5) (`max_size`,
`max_backups`).
"""

from __future__ import annotations

import contextlib
import errno
from typing import Any, TypeAlias
from uuid import UUID, uuid5

import libvirt

from awan.engines.hypervisor.domain_xml import build_serial_reader, serial_log_path
from awan.engines.libvirt_nodes import ENGINE, Connection, has_code
from awan.errors import EngineUnavailable

READER_NAMESPACE = UUID("5f0d8f5e-5c0f-4b0a-9a60-3f9d2f1c7e11")
READS_MAX = 3

Domain: TypeAlias = Any


def read_end(conn: Connection, instance_id: UUID, bytes_max: int) -> bytes:
    """The last `bytes_max` bytes of the log, its last backup included; fewer when there are fewer.

    Raises: EngineUnavailable when the log is rotated faster than it is read, or somebody else reads it now.
    """
    current = serial_log_path(instance_id)
    backup = f"{current}.0"
    definition = build_serial_reader(
        uuid5(READER_NAMESPACE, str(instance_id)), instance_id, (current, backup)
    )
    reader = conn.defineXMLFlags(definition, 0)
    try:
        content = _read_file_end(reader, current, bytes_max)
        if len(content) < bytes_max:
            content = _read_file_end(reader, backup, bytes_max - len(content)) + content
        return content
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            raise EngineUnavailable(ENGINE, "read a serial log", "it is being read") from err
        raise
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            reader.undefine()


def _read_file_end(reader: Domain, path: str, bytes_max: int) -> bytes:
    """The last bytes of one file; none of a file that does not exist."""
    for _ in range(READS_MAX):
        try:
            size = int(reader.blockInfo(path)[2])
            count = min(size, bytes_max)
            return bytes(reader.blockPeek(path, size - count, count)) if count else b""
        except libvirt.libvirtError as err:
            if has_code(err, libvirt.VIR_ERR_SYSTEM_ERROR) and err.get_int1() == errno.ENOENT:
                return b""
            # It became shorter between the two calls.
            if not has_code(err, libvirt.VIR_ERR_INVALID_ARG):
                raise
    raise EngineUnavailable(ENGINE, "read a serial log", "it is rotated all the time")
