"""A node with TLS: libvirt and VNC ask for a certificate and show one."""

from __future__ import annotations

import ssl
from dataclasses import replace
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from awan.engines.hypervisor import ConsoleEndpoint
from awan.errors import EngineError, EngineRejected, EngineUnavailable
from awan.fleet.rules import client_certificate
from tests.engines.hypervisor_contract.rigs import LabRig, build_blank, open_screen

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
PASSWORD = "once-123"


def context(rig: LabRig, *, with_certificate: bool = True) -> ssl.SSLContext:
    """What the control plane speaks TLS with."""
    files = client_certificate(rig.node.uri)
    assert files is not None
    made = ssl.create_default_context(cafile=files.authority)
    if with_certificate:
        made.load_cert_chain(files.certificate, files.key)
    return made


@pytest.fixture
def endpoint(tls_rig: LabRig) -> ConsoleEndpoint:
    """An unlocked screen on the node."""
    spec = build_blank(tls_rig)
    tls_rig.hypervisor.ensure_defined(tls_rig.node, spec)
    tls_rig.hypervisor.ensure_running(tls_rig.node, spec.instance_id)
    return tls_rig.hypervisor.unlock_console(
        tls_rig.node, spec.instance_id, password=PASSWORD, valid_s=60
    )


def test_a_screen_over_tls(tls_rig: LabRig, endpoint: ConsoleEndpoint) -> None:
    assert endpoint.requires_tls
    assert open_screen(endpoint, PASSWORD, context(tls_rig))[0] >= 320
    with pytest.raises(EngineRejected):
        open_screen(endpoint, "wrong", context(tls_rig))
    for facts in tls_rig.hypervisor.list_domains(tls_rig.node):
        tls_rig.hypervisor.lock_console(tls_rig.node, facts.domain_uuid)
        # A machine without a system has printed nothing.
        log = tls_rig.hypervisor.read_serial_log(tls_rig.node, facts.domain_uuid, bytes_max=1024)
        assert log == b""
    with pytest.raises(EngineRejected):
        open_screen(endpoint, PASSWORD, context(tls_rig))


def test_who_shows_no_certificate_sees_nothing(tls_rig: LabRig, endpoint: ConsoleEndpoint) -> None:
    with pytest.raises(EngineError):
        open_screen(endpoint, PASSWORD, context(tls_rig, with_certificate=False))
    with pytest.raises(EngineRejected):
        open_screen(endpoint, PASSWORD)


def test_another_host_is_not_believed(tls_rig: LabRig, endpoint: ConsoleEndpoint) -> None:
    """The node's certificate is not of an authority that we trust."""
    trusting_nobody = ssl.create_default_context()
    files = client_certificate(tls_rig.node.uri)
    assert files is not None
    trusting_nobody.load_cert_chain(files.certificate, files.key)
    with pytest.raises(EngineRejected):
        open_screen(endpoint, PASSWORD, trusting_nobody)


def test_tls_cannot_be_talked_out_of(lab_rig: LabRig, tls_rig: LabRig) -> None:
    """A node that speaks in the clear is refused where certificates are asked for."""
    spec = build_blank(lab_rig)
    lab_rig.hypervisor.ensure_defined(lab_rig.node, spec)
    lab_rig.hypervisor.ensure_running(lab_rig.node, spec.instance_id)
    plain = lab_rig.hypervisor.unlock_console(
        lab_rig.node, spec.instance_id, password=PASSWORD, valid_s=60
    )
    assert open_screen(plain, PASSWORD)
    with pytest.raises(EngineRejected, match="does not offer TLS"):
        open_screen(replace(plain, requires_tls=True), PASSWORD, context(tls_rig))


def test_libvirt_wants_a_certificate(tls_rig: LabRig) -> None:
    host = urlsplit(tls_rig.node.uri).hostname
    for uri in (f"qemu+tcp://{host}/system", f"qemu+tls://{host}/system?pkipath=/nonexistent"):
        with pytest.raises((EngineRejected, EngineUnavailable)):
            tls_rig.hypervisor.probe(replace(tls_rig.node, node_id=uuid4(), uri=uri))
    assert tls_rig.hypervisor.probe(tls_rig.node).hostname == tls_rig.node.name
