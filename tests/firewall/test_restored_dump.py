"""A dump was restored: the fabric has newer firewalls than the rows, until the documented statements have run."""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import text

from awan.kit.database import transaction
from awan.reconcile.audit import run_audit
from awan.reconcile.locations import check_location
from tests.firewall.conftest import Guarded
from tests.support.in_process_worker import wait_until_idle

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


def test_the_documented_statements_bring_the_rows_firewalls_to_the_fabric(guarded: Guarded) -> None:
    words = " ".join(OPERATING.read_text(encoding="utf-8").split())
    documented = re.findall(r"`(UPDATE firewall[^`]*)`", words)
    assert [it.split()[1] for it in documented] == ["firewall", "firewall_group"]
    guarded.add_rule()
    newer = guarded.in_fabric()
    assert newer is not None
    assert len(newer.lines) == 1
    with transaction() as session:
        for statement in (
            "DELETE FROM firewall_rule",
            "UPDATE firewall SET applied_revision = 1",
            "UPDATE firewall SET pushed_revision = 1",
            "UPDATE firewall SET wanted_revision = 1",
            *documented,
        ):
            session.execute(text(statement))
    check_location(guarded.cloud.location_id)
    wait_until_idle()
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == ()
    assert guarded.do("GET")["sync_status"] == "applied"
    assert run_audit() == []
