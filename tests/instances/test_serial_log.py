"""The serial console's log: the guest's own words, harmless to whoever reads them."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.engines.hypervisor.fake import FakeHypervisor
from awan.engines.registry import sim_store
from awan.instances.models import Instance
from awan.instances.rules import readable_serial
from awan.kit.database import transaction
from awan.reconcile import run_audit
from tests.support.guests import create_ready
from tests.support.simulated_cloud import SimulatedCloud

HOSTILE = (
    b"\x1b[2J\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x1b]52;c;cm0gLXJm\x1b\\"
    b"\x1bPdevice\x1b\\\x1b(B\x1bcplain\x00\x08\x7f\r\n"
    b"abc\xe2\x80\xaegnp.exe\xe2\x80\xac \xc2\x9b31m\xc2\x85ok \xff tab\tend\r\n"
    b"\x1b]0;never ended\r\nnext\r\n"
)


def test_what_a_guest_cannot_do_to_a_reader() -> None:
    assert readable_serial(HOSTILE, 1024) == (
        "red plain\nabcgnp.exe ok \N{REPLACEMENT CHARACTER} tab\tend\n\nnext\n"
    )


def test_a_line_that_is_not_whole_is_left_out() -> None:
    assert readable_serial(b"first\nsecond\nthird\n", 9) == "third\n"
    assert readable_serial(b"no end of a line at all", 6) == "at all"
    assert readable_serial(b"", 6) == ""


@given(st.binary(max_size=300), st.integers(1, 300))
def test_nothing_but_printable_text(content: bytes, bytes_max: int) -> None:
    text = readable_serial(content, bytes_max)
    assert all(char in "\n\t" or char.isprintable() for char in text)


def guest_prints(uuid: str, content: bytes) -> None:
    with transaction() as session:
        location_id = session.get_one(Instance, UUID(uuid)).location_id
    FakeHypervisor(sim_store(), location=str(location_id)).print_serial(UUID(uuid), content)


@pytest.mark.usefixtures("worker")
def test_the_log_of_an_instance(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    path = f"/instances/{uuid}/console/log"
    cloud.wait(cloud.customer.http.post(f"/instances/{uuid}/stop").json()["operation"]["uuid"])
    guest_prints(uuid, b"\r\nStopping \x1b[1mnow\x1b[0m\r\n" + b"x" * 1500 + b"\r\nPower down\r\n")
    answer = cloud.customer.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (
        200,
        "text/plain; charset=utf-8",
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "sim login: \nStopping now\n" in answer.text
    assert run_audit() == []
    assert cloud.customer.http.get(path, params={"kib": 1}).text == "Power down\n"
    assert cloud.admin.get(path).status_code == 200
    for kib in ("0", "257", "x"):
        assert cloud.customer.http.get(path, params={"kib": kib}).status_code == 422
    assert cloud.customer.http.get(f"/instances/{uuid4()}/console/log").status_code == 404


@pytest.mark.usefixtures("worker")
def test_without_a_domain(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    sim_store().execute("DELETE FROM sim.domain WHERE uuid = %s", [UUID(uuid)])
    refused = cloud.customer.http.get(f"/instances/{uuid}/console/log")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
