"""A nameserver that takes dynamic updates (RFC 2136) and transfers (RFC 5936), both signed with TSIG (RFC 8945).

Knot, BIND, PowerDNS and others do. Each call opens a connection of its own: nothing is kept between two calls, so the
object may be used by any number of threads. Only TCP is used: an update of many records does not fit a datagram.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.tsig
import dns.update
import dns.xfr
import dns.zone

from awan.engines.nameserver import (
    ENGINE,
    TIMEOUT_S,
    TTL_S,
    RecordKey,
    RecordKind,
    Zones,
)
from awan.errors import EngineError, EngineRejected, EngineUnavailable

# About 100 bytes each on the wire, with the deletion that goes before it; a message has 64 KiB.
RECORDS_PER_UPDATE = 200
TRANSFER_MAX_S = 60.0
# What a nameserver answers while it starts, or when another update is under way.
PASSING = frozenset({dns.rcode.SERVFAIL})
# Then there is no answer for any other zone either.
AWAY = (OSError, EOFError, dns.exception.Timeout)

T = TypeVar("T")


@dataclass(frozen=True)
class TsigKey:
    """A shared key: its name and algorithm as the nameserver knows them, and the secret in base64."""

    name: str
    algorithm: str
    secret: str

    def __repr__(self) -> str:
        return f"TsigKey({self.name!r})"


class Rfc2136Nameserver:
    """One nameserver at `host` and `port`. See `Nameserver`."""

    def __init__(self, host: str, port: int, *, zones: Zones, key: TsigKey) -> None:
        self._host = host
        self._port = port
        self._zones = zones
        self._key = dns.tsig.Key(key.name, key.secret, algorithm=f"{key.algorithm}.")

    @property
    def zones(self) -> Zones:
        """See `Nameserver`."""
        return self._zones

    def ensure_records(self, wanted: Mapping[RecordKey, str | None]) -> None:
        """See `Nameserver`. A zone that is refused does not keep the others from being told."""
        refusals: list[EngineError] = []
        for zone, records in self._zones.split(wanted).items():
            try:
                for batch in _batches(records):
                    self._update(zone, batch)
            except EngineError as err:
                if isinstance(err.__cause__, AWAY):
                    raise
                refusals.append(err)
        if refusals:
            raise refusals[0]

    def list_records(self, zone: str | None = None) -> dict[RecordKey, tuple[str, ...]]:
        """See `Nameserver`."""
        found: dict[RecordKey, list[str]] = {}
        for each in self._zones.all if zone is None else (zone,):
            for key, value in self._transfer(each):
                # A zone that lies in another one is transferred by itself.
                if self._zones.zone_of(key.name) == each:
                    found.setdefault(key, []).append(value)
        return {key: tuple(sorted(values)) for key, values in found.items()}

    def close(self) -> None:
        """See `Nameserver`. Nothing is open between two calls."""

    def _update(self, zone: str, wanted: Mapping[RecordKey, str | None]) -> None:
        message = dns.update.UpdateMessage(f"{zone}.", keyring=self._key)
        for key, value in wanted.items():
            name = dns.name.from_text(f"{key.name}.")
            if value is None:
                message.delete(name, key.kind.value)
            else:
                text = f"{value}." if key.kind is RecordKind.PTR else value
                message.replace(name, TTL_S, key.kind.value, text)

        def send() -> dns.message.Message:
            return dns.query.tcp(message, self._host, timeout=TIMEOUT_S, port=self._port)

        call = f"update of {zone}"
        answer = self._ask(call, send)
        if not answer.had_tsig:
            raise EngineRejected(ENGINE, call, f"the answer {_words(answer.rcode())} is not signed")
        if answer.rcode() != dns.rcode.NOERROR:
            kind = EngineUnavailable if answer.rcode() in PASSING else EngineRejected
            raise kind(ENGINE, call, _words(answer.rcode()))

    def _transfer(self, zone: str) -> Iterator[tuple[RecordKey, str]]:
        content = dns.zone.Zone(f"{zone}.", relativize=False)

        def send() -> None:
            query, _ = dns.xfr.make_query(content, keyring=self._key)
            dns.query.inbound_xfr(
                self._host,
                content,
                query,
                port=self._port,
                timeout=TIMEOUT_S,
                lifetime=TRANSFER_MAX_S,
            )

        self._ask(f"transfer of {zone}", send)
        for kind in RecordKind:
            for name, _, rdata in content.iterate_rdatas(kind.value):
                owner = name.to_text(omit_final_dot=True).lower()
                yield RecordKey(owner, kind), rdata.to_text().rstrip(".").lower()

    def _ask(self, call: str, send: Callable[[], T]) -> T:
        try:
            return send()
        except (dns.tsig.BadSignature, dns.tsig.BadTime, dns.tsig.PeerError) as err:
            raise EngineRejected(ENGINE, call, f"TSIG: {err or type(err).__name__}") from err
        except dns.xfr.TransferError as err:
            kind = EngineUnavailable if err.rcode in PASSING else EngineRejected
            raise kind(ENGINE, call, _words(err.rcode)) from err
        except (dns.exception.DNSException, OSError, EOFError, struct.error) as err:
            words = str(err) or type(err).__name__
            raise EngineUnavailable(ENGINE, call, f"{self._host}:{self._port}: {words}") from err


def _words(code: dns.rcode.Rcode) -> str:
    return f"the nameserver said {dns.rcode.to_text(code)}"


def _batches(
    records: Mapping[RecordKey, str | None],
) -> Iterator[dict[RecordKey, str | None]]:
    rest = iter(records.items())
    while batch := dict(islice(rest, RECORDS_PER_UPDATE)):
        yield batch
