"""Rows of simulated domains: written from specs, and read back as facts and counters. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from awan.engines.hypervisor import (
    CardCounters,
    DiskCounters,
    DomainCounters,
    DomainFacts,
    DomainSpec,
    Power,
    card_device,
)
from awan.engines.hypervisor.domain_xml import domain_name, printable_title
from awan.errors import EngineRejected

ENGINE = "hypervisor"

# What a guest uses a second as long as no test says otherwise.
STEADY_LOAD = {
    "cpu_time_ns": 50_000_000,
    "net_in_bytes": 2_000,
    "net_out_bytes": 1_000,
    "disk_read_bytes": 4_096,
    "disk_written_bytes": 8_192,
}
STEADY_DISK_USED_BYTES = 1024**3


def as_json(spec: DomainSpec) -> dict[str, Any]:
    """A definition as it is stored."""
    return {
        "instance_id": str(spec.instance_id),
        "operation_id": str(spec.operation_id),
        "account_id": str(spec.account_id),
        "title": printable_title(spec.title),
        "vcpus": spec.vcpus,
        "memory_mib": spec.memory_mib,
        "dedicated": spec.dedicated,
        "threads": list(spec.threads),
        "disks": [
            {"target": disk.target, "path": disk.path, "device": disk.device} for disk in spec.disks
        ],
        "port_ids": [str(nic.port_id) for nic in spec.nics],
    }


def with_media(definition: dict[str, Any], target: int, path: str | None) -> dict[str, Any]:
    """The definition with another image in the CD drive at `target`."""
    drives = {disk["target"] for disk in definition["disks"] if disk["device"] == "cdrom"}
    if target not in drives:
        words = f"the domain has no CD drive at target {target}"
        raise EngineRejected(ENGINE, "change media", words)
    disks = [
        {**disk, "path": path} if disk["target"] == target else disk for disk in definition["disks"]
    ]
    return {**definition, "disks": disks}


def counters_of(row: dict[str, Any], read_at: datetime) -> DomainCounters:
    """What a running domain has used at that moment."""
    running_s = max(0.0, (read_at - row["started_at"]).total_seconds())
    values = {name: int(load * running_s) for name, load in STEADY_LOAD.items()}
    values["disk_used_bytes"] = STEADY_DISK_USED_BYTES
    values["memory_used_bytes"] = row["live"]["memory_mib"] * 1024**2 // 4
    values |= row["counters"]
    answers = row["qemu_answers"]
    return DomainCounters(
        domain_uuid=row["uuid"],
        run_id=int(row["started_at"].timestamp() * 1_000_000),
        cpu_time_ns=values["cpu_time_ns"],
        cards=_cards_of(row["live"]["port_ids"], values),
        disks=DiskCounters(
            values["disk_read_bytes"], values["disk_written_bytes"], values["disk_used_bytes"]
        )
        if answers
        else None,
        memory_used_bytes=values["memory_used_bytes"] if answers else None,
    )


def _cards_of(port_ids: list[str], values: dict[str, Any]) -> tuple[CardCounters, ...]:
    """The counters of a domain's cards: their own where they were set, else the first has all of the domain's."""
    cards = []
    for number, port_id in enumerate(port_ids):
        steady = (0, 0) if number else (values["net_in_bytes"], values["net_out_bytes"])
        cards.append(CardCounters(card_device(UUID(port_id)), *values.get(port_id, steady)))
    return tuple(cards)


def facts_of(row: dict[str, Any]) -> DomainFacts:
    """The facts of a row of `FACTS_QUERY`."""
    definition = row["live"] if row["live"] is not None else row["config"]
    return DomainFacts(
        domain_uuid=row["uuid"],
        name=domain_name(row["uuid"]),
        power=Power(row["power"]),
        instance_id=UUID(definition["instance_id"]),
        operation_id=UUID(definition["operation_id"]),
        disk_paths=tuple(disk["path"] for disk in definition["disks"] if disk["path"]),
        port_ids=tuple(UUID(port) for port in definition["port_ids"]),
        threads=tuple(definition["threads"]),
        detail=row["detail"] if row["power"] != Power.RUNNING else "",
        is_persistent=row["is_persistent"],
        unlocked_until=row["unlocked_until"],
    )
