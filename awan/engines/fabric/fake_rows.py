"""What the tables of the simulated fabric have in common."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from awan.engines.sim import SimStore
from awan.errors import EngineRejected

ENGINE = "fabric"


def require_network(store: SimStore, location: str, switch: str, call: str) -> None:
    """Raises: EngineRejected when the fabric has no such network."""
    query = "SELECT 1 FROM sim.fabric_network WHERE location = %s AND switch = %s"
    if store.find_one(query, [location, switch]) is None:
        raise EngineRejected(ENGINE, call, f"there is no network {switch}")


def silent_chassis(store: SimStore, location: str) -> set[str]:
    """The chassis of the location that do not answer."""
    query = "SELECT system_id FROM sim.fabric_chassis WHERE location = %s AND NOT is_alive"
    return {row["system_id"] for row in store.fetch_all(query, [location])}


def as_fields(spec: object) -> dict[str, object]:
    """The fields of a specification as JSON can hold them."""
    assert is_dataclass(spec)
    return {field.name: as_json(getattr(spec, field.name)) for field in fields(spec)}


def as_json(value: object) -> object:
    """A field of a spec as JSON can hold it: numbers and None as they are, addresses as text."""
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if is_dataclass(value):
        return as_fields(value)
    return value if value is None or isinstance(value, int) else str(value)
