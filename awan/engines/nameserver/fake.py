"""The nameserver without a network: the same contract on a table of the schema `sim`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from awan.engines.nameserver import ENGINE, RecordKey, RecordKind, Zones
from awan.engines.sim import SimStore

RECORD_DDL = """
CREATE TABLE IF NOT EXISTS sim.name_record (
    location text NOT NULL,
    name text NOT NULL,
    kind text NOT NULL,
    record_values text[] NOT NULL,
    PRIMARY KEY (location, name, kind)
)"""


class FakeNameserver:
    """One simulated nameserver. Thread-safe; several processes may share it."""

    def __init__(self, store: SimStore, *, zones: Zones, location: str = "default") -> None:
        self._store = store
        self._zones = zones
        self._location = location
        store.ensure_table(RECORD_DDL)

    @property
    def zones(self) -> Zones:
        """See `Nameserver`."""
        return self._zones

    def ensure_records(self, wanted: Mapping[RecordKey, str | None]) -> None:
        """See `Nameserver`."""
        parts = self._zones.split(wanted)
        for zone, records in parts.items():
            with self._store.call(ENGINE, "ensure_records", zone):
                for key, value in records.items():
                    self.put(key, () if value is None else (value,))

    def list_records(self, zone: str | None = None) -> dict[RecordKey, tuple[str, ...]]:
        """See `Nameserver`."""
        wanted = self._zones.all if zone is None else (zone,)
        with self._store.call(ENGINE, "list_records", zone or self._location):
            rows = self._store.fetch_all(
                "SELECT name, kind, record_values FROM sim.name_record WHERE location = %s",
                [self._location],
            )
        return {
            RecordKey(row["name"], RecordKind(row["kind"])): tuple(sorted(row["record_values"]))
            for row in rows
            if self._zones.zone_of(row["name"]) in wanted
        }

    def close(self) -> None:
        """See `Nameserver`. The store belongs to whoever opened it."""

    def put(self, key: RecordKey, values: Sequence[str]) -> None:
        """The record has these values, by whoever's hand. Not part of the contract."""
        if values:
            self._store.execute(
                "INSERT INTO sim.name_record (location, name, kind, record_values)"
                " VALUES (%s, %s, %s, %s)"
                " ON CONFLICT (location, name, kind)"
                " DO UPDATE SET record_values = excluded.record_values",
                [self._location, key.name, key.kind.value, list(values)],
            )
        else:
            self._store.execute(
                "DELETE FROM sim.name_record WHERE location = %s AND name = %s AND kind = %s",
                [self._location, key.name, key.kind.value],
            )
