"""Seeds: what a new guest learns from cloud-init, as a NoCloud image.

A seed is a small ISO 9660 image with the volume id `cidata` and three files: `user-data`,
`meta-data` and `network-config`. Pure: the same `SeedSpec` gives the same bytes, so a repeated step
finds the seed that an interrupted one left.

Everything that comes from a user is written by a JSON encoder, never by joining text: JSON with
escaped non-ASCII characters is valid YAML, in which no value can break out of its quotes. It has one
key per line, so that a small guest without a YAML parser can read it too.

After the first boot the seed is replaced by a scrubbed one. It keeps the instance-id (else
cloud-init would take the guest for a new one), hostname and network, and holds no secret. A password
that the guest's agent cannot set goes into a seed of its own, until the guest has booted with it.

Source: cloud-init 22.4, doc/rtd/reference/datasources/nocloud.rst, handlers/, mergers/.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.message import Message
from email.mime.multipart import MIMEMultipart
from io import BytesIO
from typing import Any, NamedTuple
from uuid import UUID

import yaml
from pycdlib.pycdlib import PyCdlib

from awan.kit.unix_crypt import crypt_sha512

USER_DATA_MAX_BYTES = 16 * 1024
NESTING_MAX = 50

VOLUME_ID = "cidata"
SECTOR_BYTES = 2048
MIME_BOUNDARY = "==awan-user-data=="
# Ours comes first and the customer's part is merged into it: lists grow, dicts are merged, and where
# both set the same plain value ours stays (hostname, account, password login).
MERGE_TYPE = "list(append)+dict(no_replace,recurse_list)+str()"
# 2020-01-01 00:00:00 UTC in the two forms of ISO 9660 (8.4.26.1 and 9.1.5).
FIXED_VOLUME_DATE = b"2020010100000000\0"
FIXED_RECORD_DATE = bytes((120, 1, 1, 0, 0, 0, 0))

CLOUD_CONFIG = "#cloud-config"
BOOTHOOK = "#cloud-boothook"
JINJA = "## template: jinja"
# The part's first line and its MIME type, as cloud-init knows them.
PART_TYPES = {
    CLOUD_CONFIG: "text/cloud-config",
    "#!": "text/x-shellscript",
    BOOTHOOK: "text/cloud-boothook",
}
# crypt(5): `$id$salt$hash`, in whose alphabet no character means anything to a shell's quotes.
CRYPT_HASH = re.compile(r"\$6\$[A-Za-z0-9./=$]{1,160}")


class SeedNic(NamedTuple):
    """A network card of the guest; the first one is eth0. A family that is absent is not asked for."""

    mac: str
    has_ipv4: bool
    has_ipv6: bool


@dataclass(frozen=True)
class SeedSpec:
    """What the guest is told. `hostname` is one label or a full name; `username` may be root.

    `password_hash` is a crypt(3) hash from `hash_password`; None locks the password. `user_data` is
    the customer's own, already accepted by `validate_user_data`.
    """

    instance_id: UUID
    hostname: str
    username: str
    password_hash: str | None = field(repr=False)
    ssh_keys: tuple[str, ...]
    nics: tuple[SeedNic, ...]
    user_data: str | None = field(default=None, repr=False)


def render_seed(spec: SeedSpec, *, insists: bool = False) -> bytes:
    """The ISO image for the first boot. One that `insists` sets the password also if that boot is over already.

    Raises: ValueError as `render_password_seed`, when it insists.
    """
    return _render_iso(
        user_data=render_user_data(spec, insists=insists),
        meta_data=_render_json(_meta_data(spec)),
        network_config=_render_json(_network_config(spec.nics)),
    )


def render_scrubbed_seed(spec: SeedSpec) -> bytes:
    """The ISO image for later boots: identity and network only; account and user-data are not used."""
    return _render_iso(
        user_data=b"",
        meta_data=_render_json(_meta_data(spec)),
        network_config=_render_json(_network_config(spec.nics)),
    )


def render_password_seed(spec: SeedSpec) -> bytes:
    """The ISO image that sets the account's password at each boot, besides what a scrubbed one says.

    A boothook, because cloud-init runs those at every boot, and its own modules for users only once per instance.
    Raises: ValueError without a hash, or with another kind of hash than `hash_password` makes.
    """
    return _render_iso(
        user_data=f"{BOOTHOOK}\n{_password_hook(spec)}".encode("ascii"),
        meta_data=_render_json(_meta_data(spec)),
        network_config=_render_json(_network_config(spec.nics)),
    )


def _password_hook(spec: SeedSpec) -> str:
    """A script that sets the password of an account that exists. Raises: ValueError as `render_password_seed`."""
    if spec.password_hash is None or not CRYPT_HASH.fullmatch(spec.password_hash):
        raise ValueError("no password hash that a seed can carry")
    line = shlex.quote(f"{spec.username}:{spec.password_hash}")
    return (
        "#!/bin/sh\n"
        f"id -u {shlex.quote(spec.username)} >/dev/null 2>&1 || exit 0\n"
        f"printf '%s\\n' {line} | chpasswd -e\n"
    )


def render_user_data(spec: SeedSpec, *, insists: bool = False) -> bytes:
    """The file `user-data`: our cloud-config, or a MIME message of ours, the password's hook, the customer's part."""
    ours = f"{CLOUD_CONFIG}\n".encode() + _render_json(_cloud_config(spec))
    if spec.user_data is None and not insists:
        return ours
    message = MIMEMultipart("mixed", boundary=MIME_BOUNDARY)
    message.attach(_part(ours, PART_TYPES[CLOUD_CONFIG], encoding="7bit"))
    if insists:
        hook = _password_hook(spec).encode("ascii")
        message.attach(_part(hook, PART_TYPES[BOOTHOOK], encoding="7bit"))
    if spec.user_data is not None:
        theirs = _unix_lines(spec.user_data)
        customer = _part(theirs.encode(), _part_type(theirs), encoding="base64")
        customer["Merge-Type"] = MERGE_TYPE
        message.attach(customer)
    return message.as_bytes()


def validate_user_data(text: str) -> list[str]:
    """What is wrong with a customer's user-data, as sentences; empty when nothing is.

    Accepts `#cloud-config` (a YAML mapping), `#!` scripts, `#cloud-boothook`, and the first two below
    `## template: jinja`, whose content only the guest can judge. At most USER_DATA_MAX_BYTES.
    """
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        return ["The user data is not valid UTF-8."]
    if size_bytes > USER_DATA_MAX_BYTES:
        return [f"The user data must not be larger than {USER_DATA_MAX_BYTES} bytes."]
    text = _unix_lines(text)
    if not all(character in "\n\t" or character.isprintable() for character in text):
        return ["The user data must be text without control characters."]
    first, _, rest = text.partition("\n")
    header = _header(rest.partition("\n")[0] if first.strip() == JINJA else first)
    if header is None:
        return [
            "The user data must begin with #cloud-config, #! or #cloud-boothook,"
            " optionally below a line `## template: jinja`."
        ]
    if header != CLOUD_CONFIG or first.strip() == JINJA:
        return []
    return _validate_cloud_config(text)


def hash_password(password: str) -> str:
    """The SHA-512 crypt hash ($6$) of the password with a new random salt, as /etc/shadow holds it.

    Raises: ValueError as `crypt_sha512`.
    """
    return crypt_sha512(password)


def _meta_data(spec: SeedSpec) -> dict[str, Any]:
    return {"instance-id": str(spec.instance_id), "local-hostname": spec.hostname}


def _network_config(nics: Iterable[SeedNic]) -> dict[str, Any]:
    """netplan's version 2 format: each card found by its MAC, addresses from DHCP.

    systemd-networkd by itself takes no domains from DHCP, in which the members of a private network have their names.
    netplan refuses a card whose two families disagree on this (netplan-yaml, "use-domains").
    """
    ethernets = {
        f"eth{index}": {
            "match": {"macaddress": nic.mac.lower()},
            "set-name": f"eth{index}",
            "dhcp4": nic.has_ipv4,
            "dhcp6": nic.has_ipv6,
            **{f"{family}-overrides": {"use-domains": True} for family in _families(nic)},
        }
        for index, nic in enumerate(nics)
    }
    return {"version": 2, "ethernets": ethernets}


def _families(nic: SeedNic) -> list[str]:
    wanted = {"dhcp4": nic.has_ipv4, "dhcp6": nic.has_ipv6}
    return [family for family, is_wanted in wanted.items() if is_wanted]


def _cloud_config(spec: SeedSpec) -> dict[str, Any]:
    is_root = spec.username == "root"
    has_password = spec.password_hash is not None
    user: dict[str, Any] = {"name": spec.username, "lock_passwd": not has_password}
    if has_password:
        # cloud-init sets `hashed_passwd` also on accounts that exist already, like root; `passwd` not.
        user["hashed_passwd"] = spec.password_hash
    if not is_root:
        user["shell"] = "/bin/bash"
        user["sudo"] = "ALL=(ALL) NOPASSWD:ALL"
    user["ssh_authorized_keys"] = list(spec.ssh_keys)
    config: dict[str, Any] = {
        "hostname": spec.hostname.partition(".")[0],
        "fqdn": spec.hostname,
        "preserve_hostname": False,
        "manage_etc_hosts": "localhost",
        "ssh_pwauth": has_password,
        "disable_root": not is_root,
        "users": [user],
        "chpasswd": {"expire": False},
    }
    if is_root and has_password:
        # sshd's default lets root in with keys only; the first value that sshd reads counts.
        config["write_files"] = [
            {
                "path": "/etc/ssh/sshd_config.d/10-root-password.conf",
                "permissions": "0644",
                "content": "PermitRootLogin yes\n",
            }
        ]
    return config


def _render_json(value: object) -> bytes:
    """JSON that YAML reads alike, ASCII only, ending in a newline.

    Not `ensure_ascii`: JSON writes characters beyond U+FFFF as two escapes, YAML wants one.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return ("".join(_escape(character) for character in text) + "\n").encode("ascii")


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x7F:
        return character
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _unix_lines(text: str) -> str:
    """Browsers send CRLF; a script with it would not run."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _header(line: str) -> str | None:
    """Which known first line this is."""
    if line.startswith("#!"):
        return "#!"
    word = line.rstrip()
    return word if word in PART_TYPES else None


def _part_type(text: str) -> str:
    first = text.partition("\n")[0]
    if first.strip() == JINJA:
        return "text/jinja2"
    header = _header(first)
    if header is None:
        raise ValueError("user-data without a known first line: it was not validated")
    return PART_TYPES[header]


def _part(content: bytes, content_type: str, *, encoding: str) -> Message:
    part = Message()
    part["MIME-Version"] = "1.0"
    part["Content-Type"] = f'{content_type}; charset="utf-8"'
    part["Content-Transfer-Encoding"] = encoding
    # base64 hides the customer's text from the MIME framing: no line of it can look like a boundary.
    body = base64.encodebytes(content) if encoding == "base64" else content
    part.set_payload(body.decode("ascii"))
    return part


def _validate_cloud_config(text: str) -> list[str]:
    """Checks the YAML without building objects: merge keys of nested aliases would grow without bound."""
    try:
        _refuse_deep_nesting(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        mark = getattr(err, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        return [f"The cloud-config is not valid YAML{where}."]
    if not isinstance(root, yaml.MappingNode) or not root.value:
        return ["The cloud-config must be a YAML mapping."]
    for key, _value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            return ["The keys of the cloud-config must be plain names."]
        if key.value in ("merge_how", "merge_type"):
            return [
                f"The cloud-config must not set {key.value}: it is merged with the instance's own."
            ]
    return []


def _refuse_deep_nesting(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > NESTING_MAX:
            raise ValueError("nested too deeply")


def _render_iso(*, user_data: bytes, meta_data: bytes, network_config: bytes) -> bytes:
    iso = PyCdlib()
    iso.new(interchange_level=1, vol_ident=VOLUME_ID, joliet=3, rock_ridge="1.09")
    try:
        for short, name, content in (
            ("METADATA", "meta-data", meta_data),
            ("NETCONF", "network-config", network_config),
            ("USERDATA", "user-data", user_data),
        ):
            iso.add_fp(
                BytesIO(content),
                len(content),
                iso_path=f"/{short}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
                file_mode=0o100400,
            )
        out = BytesIO()
        iso.write_fp(out)
    finally:
        iso.close()
    image = bytearray(out.getvalue())
    _fix_dates(image)
    return bytes(image)


def _fix_dates(image: bytearray) -> None:
    """Overwrites the present time, which the writer puts everywhere, by a fixed date.

    Source: ECMA-119 8.4 (volume descriptors), 9.1 (directory records); RRIP 1.09 4.1.6 (TF). The
    image has one directory, the root.
    """
    sector = 16
    while (kind := image[sector * SECTOR_BYTES]) != 255:
        start = sector * SECTOR_BYTES
        if kind in (1, 2):
            for offset in (813, 830, 864):  # created, modified, effective
                image[start + offset : start + offset + 17] = FIXED_VOLUME_DATE
            root = start + 156
            image[root + 18 : root + 25] = FIXED_RECORD_DATE
            extent, length = struct.unpack_from("<I4xI", image, root + 2)
            _fix_directory_dates(image, extent * SECTOR_BYTES, length)
        sector += 1


def _fix_directory_dates(image: bytearray, start: int, length: int) -> None:
    position = start
    while position < start + length:
        record_length = image[position]
        if record_length == 0:  # records do not cross sectors: the rest of this one is empty
            position += SECTOR_BYTES - position % SECTOR_BYTES
            continue
        image[position + 18 : position + 25] = FIXED_RECORD_DATE
        name_length = image[position + 32]
        field_at = position + 33 + name_length + (name_length + 1) % 2
        while field_at + 4 <= position + record_length and image[field_at + 2] >= 4:
            if image[field_at : field_at + 2] == b"TF":
                for date_at in range(field_at + 5, field_at + image[field_at + 2], 7):
                    image[date_at : date_at + 7] = FIXED_RECORD_DATE
            field_at += image[field_at + 2]
        position += record_length
