"""What simulated guests have printed on their serial consoles, bounded as on a real node."""

from __future__ import annotations

from typing import LiteralString
from uuid import UUID

from awan.engines.sim import SimStore

BOOT_LINES = b"[    0.000000] Linux version 6.1.0 (simulated)\r\n\r\nsim login: "
KEPT_BYTES = 2 * 1024**2

# Longer than the domain, as virtlogd's files are.
SERIAL_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.serial_log (
        location        text NOT NULL,
        uuid            uuid NOT NULL,
        content         bytea NOT NULL,
        PRIMARY KEY (location, uuid)
    )"""


class FakeSerialLogs:
    """The logs of one location's guests."""

    def __init__(self, store: SimStore, location: str) -> None:
        self._store = store
        self._location = location
        store.ensure_table(SERIAL_DDL)

    def append(self, instance_id: UUID, content: bytes) -> None:
        """The guest prints."""
        self._store.execute(
            "INSERT INTO sim.serial_log AS log (location, uuid, content) VALUES (%s, %s, %s)"
            " ON CONFLICT (location, uuid) DO UPDATE SET content = substring(log.content"
            " || excluded.content FROM greatest(1, octet_length(log.content)"
            " + octet_length(excluded.content) - %s + 1))",
            [self._location, instance_id, content, KEPT_BYTES],
        )

    def read(self, instance_id: UUID, bytes_max: int) -> bytes:
        """The end of what it has printed."""
        row = self._store.find_one(
            "SELECT content FROM sim.serial_log WHERE location = %s AND uuid = %s",
            [self._location, instance_id],
        )
        return bytes(row["content"])[-bytes_max:] if row is not None else b""
