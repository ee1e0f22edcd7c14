"""Nameserver engine: the names of one location's addresses, in zones that we may change.

Names are absolute, lower case, and without the dot at their end. Every change is idempotent and bounded by
`TIMEOUT_S` for each zone and batch. Raises `EngineUnavailable` when the nameserver does not answer, `EngineRejected`
when it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from awan.errors import EngineRejected

ENGINE = "nameserver"
TIMEOUT_S = 5.0
TTL_S = 300


class RecordKind(StrEnum):
    """The kinds of records that name an address."""

    A = "A"
    AAAA = "AAAA"
    PTR = "PTR"


class RecordKey(NamedTuple):
    """What a record answers: a name and a kind. Its values are addresses, or (PTR) names."""

    name: str
    kind: RecordKind


@dataclass(frozen=True)
class Zones:
    """The zones that names are kept in: one for names, and those of the location's prefixes for addresses.

    `private` is that of the names inside private networks, where they have any.
    """

    forward: str
    reverse: tuple[str, ...]
    private: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every zone, each once."""
        private = () if self.private is None else (self.private,)
        return (self.forward, *self.reverse, *private)

    def zone_of(self, name: str) -> str | None:
        """The zone that a name belongs to, the closest one; None outside of all."""
        holding = [zone for zone in self.all if name == zone or name.endswith(f".{zone}")]
        return max(holding, key=len, default=None)

    def split(
        self, wanted: Mapping[RecordKey, str | None]
    ) -> dict[str, dict[RecordKey, str | None]]:
        """The same by zone. Raises: EngineRejected for a name that is in none."""
        parts: dict[str, dict[RecordKey, str | None]] = {}
        for key, value in wanted.items():
            zone = self.zone_of(key.name)
            if zone is None:
                raise EngineRejected(
                    ENGINE, f"change {key.name}", "the name is in none of the zones"
                )
            parts.setdefault(zone, {})[key] = value
        return parts


class Nameserver(Protocol):
    """The contract. One object per location."""

    @property
    def zones(self) -> Zones:
        """What may be changed here."""
        ...

    def ensure_records(self, wanted: Mapping[RecordKey, str | None]) -> None:
        """Each key has exactly this one value; none at all where it is None. Other records stay as they are.

        Returns when the nameserver answers so. Not one transaction: a zone may be changed when another one fails.
        """
        ...

    def list_records(self, zone: str | None = None) -> dict[RecordKey, tuple[str, ...]]:
        """All records of the three kinds in the zones, or in this one of them, values in order."""
        ...

    def close(self) -> None:
        """Ends what is open."""
        ...
