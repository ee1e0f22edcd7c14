"""Calls to addresses that customers name: guarded, so that they reach the outside and nothing of ours.

The host is resolved once, every address it has is checked, and the connection goes to a checked address: a name that
resolves differently a moment later changes nothing. Redirects are not followed, proxies of the environment not used,
and neither the answer's body nor an address is told to anybody.
Sources: IANA's registries of special-purpose addresses; OWASP, Server-Side Request Forgery Prevention.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import urlsplit

import httpx

from awan.kit.clock import now
from awan.kit.inet import parse_address
from awan.settings import get_settings

Address = IPv4Address | IPv6Address

URL_MAX = 2048
RESOLVE_MAX_S = 5.0
CONNECT_MAX_S = 5.0
TOTAL_MAX_S = 15.0
# Addresses of a host that are tried, one after the other, when it cannot be connected to.
TRIES_MAX = 3
PORTS = {"https": 443, "http": 80}

REFUSED_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Only global unicast is allowed at all: that leaves out loopback, local, mapped, translated and multicast addresses.
GLOBAL_IPV6 = IPv6Network("2000::/3")
# Of it: protocol assignments with Teredo and ORCHID, documentation, 6to4 (which carries any IPv4 address).
REFUSED_IPV6 = tuple(
    IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*", re.ASCII)
# What resolvers take for an IPv4 address in one of its old spellings (WHATWG URL, "ends in a number").
_NUMBER = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)", re.ASCII)

# A name server that hangs holds a thread for half a minute; others' names are resolved beside it.
_resolvers = ThreadPoolExecutor(max_workers=64, thread_name_prefix="outbound-resolver")


class NotAllowed(Exception):
    """The host cannot be called; the text is a sentence for the customer and names no address."""


@dataclass(frozen=True)
class Target:
    """A URL taken apart: what is connected to and what is asked for there."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """As HTTP names the host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the status, or a short sentence why there is none.

    `retry_after_s` is how long the answer asks to be left alone, whatever it says: bound it.
    """

    status: int | None
    error: str | None
    duration_ms: int
    retry_after_s: float | None = None


def parse_url(text: str) -> Target:
    """The parts of an acceptable URL. Raises: ValueError with a sentence for the customer.

    An address in it is checked at once, and a name that can only be a local one is refused, unless the operator lets
    customers reach some network of his own. What other names stand for is checked when they are called.
    """
    if len(text) > URL_MAX or not re.fullmatch(r"[!-\[\]-~]+", text, re.ASCII):
        raise ValueError(f"The URL must have at most {URL_MAX} printable ASCII characters.")
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise ValueError("The URL cannot be read.") from None
    schemes = ("https", "http") if get_settings().outbound_allow_http else ("https",)
    if parts.scheme not in schemes:
        raise ValueError(f"The URL must begin with {' or '.join(f'{s}://' for s in schemes)}.")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("The URL must have neither a user nor a fragment.")
    if port == 0:
        raise ValueError("The port must be 1 to 65535.")
    address = _literal(host)
    if address is None and (
        len(host) > 253 or not _NAME.fullmatch(host) or _NUMBER.fullmatch(host)
    ):
        raise ValueError("The host must be a name or an address.")
    if address is not None and not is_allowed(address):
        raise ValueError("The address of the host is not allowed.")
    if address is None and _is_local(host) and not get_settings().outbound_allowed_networks:
        raise ValueError("The name of the host is not allowed: it must be known in the public DNS.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or PORTS[parts.scheme], path)


def _is_local(host: str) -> bool:
    """Whether no public name server can know the name. Sources: RFC 6761, section 6.3; ICANN SAC053."""
    return "." not in host or host.endswith(".localhost")


def _literal(host: str) -> Address | None:
    try:
        return parse_address(host)
    except ValueError:
        return None


def is_allowed(address: Address) -> bool:
    """Whether customers may make us call the address: a global one, of no management network and not our own.

    What the operator lists in `outbound_allowed_networks` is allowed whatever it is.
    """
    settings = get_settings()
    if _is_in(address, settings.outbound_allowed_networks):
        return True
    if _is_in(address, settings.outbound_refused_networks):
        return False
    if isinstance(address, IPv4Address):
        is_global = not _is_in(address, REFUSED_IPV4)
    else:
        is_global = address in GLOBAL_IPV6 and not _is_in(address, REFUSED_IPV6)
    return is_global and not _is_own(address)


def _is_in(address: Address, networks: object) -> bool:
    assert isinstance(networks, (list, tuple))
    return any(
        address.version == network.version and address in network
        for network in map(ip_network, networks)
    )


def _is_own(address: Address) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as err:
        # Not ours, or no IPv6 here at all. Anything else is no proof that it is foreign.
        return err.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


async def post(url: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
    """Sends the body and gives the status of the answer, all within `TOTAL_MAX_S`. Raises nothing."""
    began_at = time.monotonic()
    status, error, retry_after_s = None, None, None
    try:
        async with asyncio.timeout(TOTAL_MAX_S):
            response = await _post(parse_url(url), body, headers)
        status = response.status_code
        retry_after_s = read_retry_after(response.headers.get("retry-after", ""), now())
    except (ValueError, NotAllowed) as err:
        error = str(err)
    except (TimeoutError, httpx.TimeoutException):
        error = "There was no answer in time."
    except httpx.ConnectError as err:
        error = "The TLS handshake failed." if _is_tls(err) else "The connection failed."
    except httpx.HTTPError:
        error = "The connection broke before there was an answer."
    return Outcome(status, error, round((time.monotonic() - began_at) * 1000), retry_after_s)


def read_retry_after(text: str, moment: datetime) -> float | None:
    """Seconds from `moment` that the header `Retry-After` asks for, 0 or more; None when it says nothing of sense.

    Source: RFC 9110, section 10.2.3: a number of seconds, or a date.
    """
    if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        return max(0.0, (until - moment).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


async def _post(target: Target, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
    """The answer without its body."""
    addresses = await _resolve(target)
    async with httpx.AsyncClient(
        verify=tls_context(),
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(TOTAL_MAX_S, connect=CONNECT_MAX_S),
    ) as client:
        for number, address in enumerate(addresses, start=1):
            request = client.build_request(
                "POST",
                httpx.URL(
                    scheme=target.scheme,
                    host=str(address),
                    port=target.port,
                    raw_path=target.path.encode(),
                ),
                content=body,
                headers={**headers, "host": target.host_header},
                # The certificate must be the name's, though the connection is to its address.
                extensions={"sni_hostname": target.host},
            )
            try:
                response = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(addresses):
                    raise
                continue
            # The body is nobody's business, and may have no end.
            await response.aclose()
            return response
    raise NotAllowed("The host name does not resolve.")


async def _resolve(target: Target) -> list[Address]:
    """The host's addresses, all of them checked. Raises: NotAllowed."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_MAX_S):
            found = await loop.run_in_executor(_resolvers, _look_up, target.host, target.port)
    except (OSError, UnicodeError):
        raise NotAllowed("The host name does not resolve.") from None
    if not found or not all(map(is_allowed, found)):
        raise NotAllowed("The address of the host is not allowed.")
    return found[:TRIES_MAX]


def _look_up(host: str, port: int) -> list[Address]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # A zone ("%eth0") only stands behind link-local addresses, which are refused with it.
    texts = dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in answers)
    return [ip_address(text) for text in texts]


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Certificates are checked against the system's authorities. Loaded once: it takes a while."""
    return ssl.create_default_context()


def _is_tls(err: BaseException) -> bool:
    return any(isinstance(cause, ssl.SSLError) for cause in _causes(err))


def _causes(err: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = err
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
