"""The audit on real engines: green around an instance's life, and each fault that is planted by hand is found.

Faults are planted beside the control plane, as a careless operator would: with virsh's and ovn-nbctl's own means.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from uuid import uuid4

import libvirt
import pytest

from tests.support.lab_cloud import LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

POOL = "awan"
STRAY_DOMAIN = """
<domain type='qemu'>
  <name>by-hand</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>"""
STRAY_FILE = """
<volume><name>{name}</name><capacity unit='MiB'>1</capacity><target><format type='raw'/></target></volume>"""

Found = list[tuple[str, str]]


def audit(cloud: LabCloud) -> Found:
    """Kind and subject of everything that an audit finds."""
    answer = cloud.admin.post("/admin/audit")
    assert answer.is_success, answer.text
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    shown = cloud.admin.get(f"/admin/audit/{answer.json()['data']['uuid']}").json()["data"]
    assert shown["is_green"] == (not shown["findings"])
    return [(it["kind"], it["subject"]) for it in shown["findings"]]


def trace(cloud: LabCloud, uuid: str) -> dict[str, list[dict[str, object]]]:
    """Rows of an instance by table."""
    tables: dict[str, list[dict[str, object]]] = {}
    for row in cloud.admin.get(f"/admin/trace/{uuid}").json()["data"]["rows"]:
        tables.setdefault(row["table"], []).append(row["columns"])
    return tables


@contextmanager
def libvirt_of(cloud: LabCloud, uuid: str | None = None) -> Iterator[libvirt.virConnect]:
    """A connection to the node of an instance, or to the first one."""
    uri = cloud.info.nodes[0].libvirt_uri
    if uuid is not None:
        node = cloud.admin.get(f"/admin/nodes/{trace(cloud, uuid)['instance'][0]['node_id']}")
        uri = node.json()["data"]["libvirt_uri"]
    with closing(libvirt.open(uri)) as connection:
        yield connection


def northbound(cloud: LabCloud, *arguments: str) -> str:
    """Runs ovn-nbctl on the lab's fabric."""
    command = ["ovn-nbctl", f"--db={cloud.info.ovn_nb}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def nobody_repairs(cloud: LabCloud) -> Iterator[None]:
    """What is planted here stays until it was found."""
    with cloud.unwatched():
        yield


def test_green_around_an_instances_life(cloud: LabCloud) -> None:
    assert audit(cloud) == []
    shown = cloud.create_instance(hostname="audited")
    assert audit(cloud) == []
    cloud.wait_ready(shown["uuid"])
    for verb in ("stop", "start"):
        begun = cloud.client.post(f"/instances/{shown['uuid']}/{verb}").json()
        assert cloud.wait(begun["operation"]["uuid"])["status"] == "succeeded"
        assert audit(cloud) == []
    assert cloud.delete_instance(shown["uuid"])["status"] == "succeeded"
    assert audit(cloud) == []


def test_a_stray_domain_is_found(cloud: LabCloud) -> None:
    uuid = str(uuid4())
    with libvirt_of(cloud) as connection:
        domain = connection.defineXML(STRAY_DOMAIN.format(uuid=uuid))
        try:
            assert audit(cloud) == [("domain.stray", uuid)]
        finally:
            domain.undefine()
    assert audit(cloud) == []


def test_a_stray_file_is_found(cloud: LabCloud) -> None:
    name = f"vol-{uuid4()}.qcow2"
    with libvirt_of(cloud) as connection:
        pool = connection.storagePoolLookupByName(POOL)
        volumes = [
            pool.createXML(STRAY_FILE.format(name=stray), 0) for stray in ("notes.txt", name)
        ]
        try:
            assert audit(cloud) == [("file.stray", "notes.txt"), ("file.stray", name)]
        finally:
            for volume in volumes:
                volume.delete()
    assert audit(cloud) == []


def test_a_stray_port_is_found_and_that_it_is_unprotected(cloud: LabCloud) -> None:
    switch = northbound(cloud, "--bare", "--columns=name", "list", "Logical_Switch").split()
    if not switch:
        cloud.delete_instance(cloud.create_instance()["uuid"])
        switch = northbound(cloud, "--bare", "--columns=name", "list", "Logical_Switch").split()
    northbound(cloud, "lsp-add", switch[0], "left-over")
    try:
        assert audit(cloud) == [("port.stray", "left-over"), ("port.unprotected", "left-over")]
        northbound(cloud, "lsp-set-port-security", "left-over", "52:00:00:00:00:01")
        assert audit(cloud) == [("port.stray", "left-over")]
    finally:
        northbound(cloud, "lsp-del", "left-over")
    assert audit(cloud) == []


def test_faults_of_a_running_instance_are_found(cloud: LabCloud) -> None:
    uuid = cloud.create_instance()["uuid"]
    cloud.wait_ready(uuid)
    (nic,) = trace(cloud, uuid)["nic"]
    port = str(nic["nic_id"])
    assert audit(cloud) == []
    security = northbound(cloud, "lsp-get-port-security", port).split("\n")[0]
    northbound(cloud, "lsp-set-port-security", port)
    assert audit(cloud) == [("port.unprotected", port)]
    northbound(cloud, "lsp-set-port-security", port, f"{security} 192.168.7.7")
    assert audit(cloud) == [("port.wrong", port)]
    northbound(cloud, "lsp-set-port-security", port, security)
    assert audit(cloud) == []
    with libvirt_of(cloud, uuid) as connection:
        connection.lookupByUUIDString(uuid).destroy()
        assert audit(cloud) == [("domain.power", uuid), ("port.unbound", port)]


def test_what_is_missing_of_a_stopped_instance_is_found(cloud: LabCloud) -> None:
    uuid = cloud.create_instance()["uuid"]
    cloud.wait_ready(uuid)
    begun = cloud.client.post(f"/instances/{uuid}/stop", json={"force": True}).json()
    assert cloud.wait(begun["operation"]["uuid"])["status"] == "succeeded"
    tables = trace(cloud, uuid)
    disk, port = f"vol-{tables['volume'][0]['volume_id']}.qcow2", str(tables["nic"][0]["nic_id"])
    with libvirt_of(cloud, uuid) as connection:
        connection.storagePoolLookupByName(POOL).storageVolLookupByName(disk).delete()
        assert audit(cloud) == [("file.missing", disk)]
        northbound(cloud, "lsp-del", port)
        connection.lookupByUUIDString(uuid).undefine()
        assert audit(cloud) == [
            ("domain.missing", uuid),
            ("file.missing", disk),
            ("port.missing", port),
        ]
    # What is missing does not stop a deletion, and then nothing is missing any more.
    assert cloud.delete_instance(uuid)["status"] == "succeeded"
    assert audit(cloud) == []
