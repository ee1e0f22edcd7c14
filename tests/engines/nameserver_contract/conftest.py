"""The engines under the one suite: the fake, and a Knot of our own on a loopback address."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from awan.engines.nameserver import Nameserver, Zones
from awan.engines.nameserver.fake import FakeNameserver
from awan.engines.nameserver.rfc2136 import Rfc2136Nameserver, TsigKey
from awan.engines.sim import SimStore
from awan.runtime.control_plane import free_port
from lab.layout import LabNameserver
from lab.nameserver import NameserverPlace, NameserverProcess
from lab.processes import ProcessTable

ADDRESS = "127.0.0.1"
ZONES = Zones(
    "jkt1.awan.example",
    ("7.18.198.in-addr.arpa", "1.0.0.0.7.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa"),
    "internal.jkt1.awan.example",
)


@pytest.fixture(scope="session")
def knot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNameserver]:
    """A running Knot with the zones."""
    if shutil.which("knotd", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("Knot is not installed")
    root = tmp_path_factory.mktemp("knot")
    facts = LabNameserver(
        server=f"{ADDRESS}:{free_port(ADDRESS, 25300)}",
        forward_zone=ZONES.forward,
        reverse_zones=ZONES.reverse,
        private_zone="internal.jkt1.awan.example",
        customer_zone="customer.example",
        key_name="awan-test",
        key_algorithm="hmac-sha256",
        key_file=root / "key",
    )
    place = NameserverPlace(root / "run", root / "state", ADDRESS, int(facts.server.split(":")[1]))
    process = NameserverProcess(place, facts, ProcessTable(root / "pids"))
    process.ensure()
    yield facts
    process.stop()


def connect(
    facts: LabNameserver,
    *,
    secret: str | None = None,
    port: int | None = None,
    reverse: tuple[str, ...] | None = None,
) -> Nameserver:
    """A client of the Knot; `secret`, `port` or reverse zones may be wrong ones."""
    host, known_port = facts.server.split(":")
    key = TsigKey(
        facts.key_name, facts.key_algorithm, secret or Path(facts.key_file).read_text().strip()
    )
    zones = Zones(facts.forward_zone, reverse or facts.reverse_zones, facts.private_zone)
    return Rfc2136Nameserver(host, port or int(known_port), zones=zones, key=key)


@pytest.fixture
def rfc2136(knot: LabNameserver) -> Iterator[Nameserver]:
    """The real engine; what the test wrote is taken away again."""
    engine = connect(knot)
    before = engine.list_records()
    yield engine
    engine.ensure_records({key: None for key in engine.list_records() if key not in before})


@pytest.fixture
def fake(database_server: Any) -> Iterator[Nameserver]:
    """The fake on a database of its own."""
    store = SimStore(database_server.create(f"sim_{uuid4().hex[:8]}"))
    yield FakeNameserver(store, zones=ZONES, location="contract")
    store.close()


@pytest.fixture(params=["fake", "rfc2136"])
def nameserver(request: pytest.FixtureRequest) -> Nameserver:
    """Each engine in turn."""
    engine: Nameserver = request.getfixturevalue(request.param)
    return engine
