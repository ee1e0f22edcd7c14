"""Looking names up in the DNS, by resolvers of the operator's choice."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import dns.exception
import dns.nameserver
import dns.resolver

DNS_PORT = 53


class LookupFailed(Exception):
    """Nobody could say whether the name exists."""


def split_server(server: str) -> tuple[str, int]:
    """Address and port of `10.0.0.1`, `10.0.0.1:5300`, `2001:db8::1` or `[2001:db8::1]:5300`. Raises: ValueError."""
    host, colon, port = server.rpartition(":")
    if colon and (host.startswith("[") or ":" not in host):
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("The port must be a number from 1 to 65535.")
        return str(ip_address(host.removeprefix("[").removesuffix("]"))), int(port)
    return str(ip_address(server)), DNS_PORT


def look_up_ipv4(name: str, servers: Sequence[str], *, timeout_s: float) -> frozenset[IPv4Address]:
    """The IPv4 addresses of a fully qualified name, aliases followed; empty when it has none.

    `servers` as in `split_server`; none: those of the system. Blocks for `timeout_s` at most. Nothing is cached here.
    Raises: LookupFailed.
    """
    return frozenset(IPv4Address(text) for text in _look_up(name, "A", servers, timeout_s))


def look_up_ipv6(name: str, servers: Sequence[str], *, timeout_s: float) -> frozenset[IPv6Address]:
    """As `look_up_ipv4`, of IPv6 addresses."""
    return frozenset(IPv6Address(text) for text in _look_up(name, "AAAA", servers, timeout_s))


def _look_up(name: str, kind: str, servers: Sequence[str], timeout_s: float) -> list[str]:
    try:
        resolver = dns.resolver.Resolver(configure=not servers)
        if servers:
            resolver.nameservers = [
                dns.nameserver.Do53Nameserver(*split_server(server)) for server in servers
            ]
        answer = resolver.resolve(f"{name}.", kind, search=False, lifetime=timeout_s)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    except (dns.exception.DNSException, OSError) as err:
        raise LookupFailed(f"{name}: {err}") from err
    return [rdata.to_text() for rdata in answer]
