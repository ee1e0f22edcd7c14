"""Which addresses of a hypervisor are accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from awan.fleet.rules import ClientCertificate, check_libvirt_uri, client_certificate


@pytest.mark.parametrize(
    "uri",
    [
        "qemu+tls://hv1/system",
        "qemu+ssh://root@hv1/system?keyfile=/etc/awan/id",
        "qemu+tcp://10.0.0.11/system",
        "fake://n1/",
    ],
)
def test_remote_qemu_is_accepted(uri: str) -> None:
    assert check_libvirt_uri(uri) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "qemu:///system",
        "qemu+ext://h/system?command=/bin/sh",
        "qemu+ssh://h/system?command=/tmp/x",
        "qemu+ssh://h/system?netcat=/tmp/x",
        "qemu+ssh://h/system?proxy=native&command=",
        "qemu+tls://h/system?no_verify=1",
        "qemu+ssh://h/system?known_hosts_verify=ignore",
        "test:///default",
        "h",
    ],
)
def test_what_runs_programs_or_skips_checks_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"URI"):
        check_libvirt_uri(uri)


def test_certificates_of_a_node() -> None:
    given = client_certificate("qemu+tls://hv1/system?pkipath=/etc/awan/pki")
    assert given == ClientCertificate(
        Path("/etc/awan/pki/cacert.pem"),
        Path("/etc/awan/pki/clientcert.pem"),
        Path("/etc/awan/pki/clientkey.pem"),
    )
    usual = client_certificate("qemu+tls://hv1/system")
    assert usual is not None
    assert usual.authority == Path("/etc/pki/CA/cacert.pem")
    assert client_certificate("qemu+ssh://hv1/system?pkipath=/etc/awan/pki") is None
