"""The generic proofs, on the toy plan: they hold for a good plan and catch a bad one."""

from __future__ import annotations

from uuid import UUID

import pytest
from sqlalchemy.orm import Session

from awan.kit.database import get_engine
from awan.operations import Target
from awan.resources.models import Resource
from awan.settings import Settings
from tests.operations.house import PARTS, Site, begin_build, make_plot, read_resource
from tests.support import proofs


@pytest.fixture
def case(site: Site, settings: Settings) -> proofs.Case[Resource]:
    def prepare() -> Resource:
        with Session(get_engine(), expire_on_commit=False) as session:
            return make_plot(session)

    def begin(plot: Resource) -> UUID:
        return begin_build(plot)

    def succeeded(plot: Resource) -> None:
        assert site.parts(plot.resource_id) == sorted(PARTS)
        after = read_resource(plot.resource_id)
        # `succeed` has an effect that would show if it ran twice.
        assert (after.name, after.active_operation_id) == (f"{plot.name}+built", None)

    def undone(plot: Resource) -> None:
        assert site.parts(plot.resource_id) == []
        after = read_resource(plot.resource_id)
        assert (after.name, after.active_operation_id) == (f"{plot.name}+failed", None)

    return proofs.Case(
        settings=settings,
        faults=site.store.faults,
        prepare=prepare,
        begin=begin,
        succeeded=succeeded,
        undone=undone,
    )


def test_runs_twice_once(case: proofs.Case[Resource], site: Site) -> None:
    proofs.runs_twice_once(case)
    assert [what for what, _ in site.log].count("roof") == 3  # undisturbed once, then twice


def test_unwinds_from_failure_at_each_call(case: proofs.Case[Resource]) -> None:
    proofs.unwinds_from_failure_at_each_call(case)


def test_survives_outage_at_each_call(case: proofs.Case[Resource]) -> None:
    proofs.survives_outage_at_each_call(case)


def test_survives_death_at_each_call(case: proofs.Case[Resource]) -> None:
    proofs.survives_death_at_each_call(case)


def test_survives_death_while_undoing(case: proofs.Case[Resource]) -> None:
    proofs.survives_death_while_undoing(case, proofs.first_middle_last)


def test_first_middle_last() -> None:
    assert proofs.first_middle_last(1) == [1]
    assert proofs.first_middle_last(2) == [1, 2]
    assert proofs.first_middle_last(9) == [1, 5, 9]


def test_the_proof_catches_an_undo_that_leaves_something(
    case: proofs.Case[Resource], site: Site
) -> None:
    def put_back(target: Target) -> None:
        site.store.execute(
            "INSERT INTO sim.house_part (location, subject_id, part) VALUES ('', %s, 'ruin')",
            [target.subject_id],
        )

    site.hooks["fail"] = put_back
    with pytest.raises(AssertionError):
        proofs.unwinds_from_failure_at_each_call(case, [1])


def test_the_proof_catches_a_step_that_is_no_ensure_step(
    case: proofs.Case[Resource], site: Site
) -> None:
    def make_another(target: Target) -> None:
        site.store.execute(
            "INSERT INTO sim.house_part (location, subject_id, part)"
            " VALUES ('', %s, 'shed-' || gen_random_uuid())",
            [target.subject_id],
        )

    calls: list[UUID] = []

    def only_from_the_second_time_on(target: Target) -> None:
        if target.subject_id in calls:
            make_another(target)
        calls.append(target.subject_id)

    site.hooks["walls"] = only_from_the_second_time_on
    with pytest.raises(AssertionError):
        proofs.runs_twice_once(case)
