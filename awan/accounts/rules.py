"""Pure rules of keys: their form, and where a call comes from."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# `awan_<id>_<secret>`: 16 hex digits name the key, 64 hex digits (256 random bits) prove it.
KEY_PATTERN = re.compile(r"awan_([0-9a-f]{16})_([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True)
class KeyText:
    """A key as its holder has it, taken apart."""

    key_id: str
    secret: str

    @property
    def plain_text(self) -> str:
        """What goes into the header `x-apikey`."""
        return f"awan_{self.key_id}_{self.secret}"

    @property
    def sha256(self) -> bytes:
        """What is stored. The secret has 256 random bits, so a plain hash is as good as a slow one."""
        return hashlib.sha256(self.secret.encode()).digest()


def new_key_text() -> KeyText:
    """A fresh random key."""
    return KeyText(key_id=secrets.token_hex(8), secret=secrets.token_hex(32))


def parse_key(text: str) -> KeyText | None:
    """The parts of a well-formed key, else None."""
    match = KEY_PATTERN.fullmatch(text)
    return KeyText(match[1], match[2]) if match else None


def parse_address(text: str) -> Address | None:
    """An address without zone; IPv4 written inside IPv6 (`::ffff:1.2.3.4`) counts as IPv4. None when it is none."""
    try:
        address = ip_address(text.strip().partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def source_address(
    peer: str | None, forwarded_for: Iterable[str], trusted_proxies: Iterable[Network]
) -> Address | None:
    """Where a call comes from: the socket's peer, or, when that is a trusted proxy, the right-most address of
    X-Forwarded-For that is not one. Left of the first untrusted entry anybody could have written anything.

    An entry that is no address ends the walk at the proxy that reported it. None when there is no peer address.
    """
    address = parse_address(peer) if peer else None
    trusted = list(trusted_proxies)
    if address is None or not _is_in(address, trusted):
        return address
    entries = [entry for header in forwarded_for for entry in header.split(",")]
    for entry in reversed(entries):
        hop = parse_address(entry)
        if hop is None:
            return address
        address = hop
        if not _is_in(address, trusted):
            return address
    return address


def _is_in(address: Address, networks: list[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)
