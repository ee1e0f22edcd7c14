"""OVSDB over TLS: real servers, keys made here, one set of them for each location of a process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from awan.engines.fabric import PortSpec, PublicNetworkSpec
from awan.engines.fabric.ovn import OvnFabric
from awan.engines.fabric.tls import TlsKeys
from awan.errors import EngineRejected, EngineUnavailable


class Authority:
    """Signs keys of servers and clients."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = self._folder / "ca.pem"
        self.file.write_bytes(self._certify(self._name, self._key, is_authority=True))

    def issue(self, name: str) -> TlsKeys:
        """A private key with its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        private_key, certificate = (self._folder / f"{name}.{end}" for end in ("key", "pem"))
        private_key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        certificate.write_bytes(self._certify(subject, key, is_authority=False))
        return TlsKeys(private_key, certificate, self.file)

    def _certify(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass
class TlsCentral:
    """OVN's databases, which take TLS connections of clients that `authority` has signed."""

    authority: Authority
    keys: TlsKeys
    nb: str
    sb: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(central, authority: Authority) -> TlsCentral:
    """Starts the central's databases again, also on TLS ports of the loopback."""
    remotes = {name: f"ssl:127.0.0.1:{free_port()}" for name in ("nb", "sb")}
    for name, remote in remotes.items():
        central.stop_server(name)
        listen(central, name, remote, authority)
    return TlsCentral(authority, authority.issue("worker"), remotes["nb"], remotes["sb"])


def listen(central, name: str, remote: str, authority: Authority) -> None:
    """Starts one of the databases, for those who connect to `remote`."""
    server = authority.issue(f"server-{name}")
    _, host, port = remote.split(":")
    central.start_server(
        name,
        f"--remote=pssl:{port}:{host}",
        f"--private-key={server.private_key}",
        f"--certificate={server.certificate}",
        f"--ca-cert={authority.file}",
    )


@pytest.fixture
def tls_central(ovn_central, tmp_path: Path) -> TlsCentral:
    return serve(ovn_central, Authority(tmp_path, "ours"))


def test_the_fabric_works_over_tls(
    tls_central: TlsCentral,
    ovn_central,
    make_network_spec: Callable[..., PublicNetworkSpec],
    make_port_spec: Callable[..., PortSpec],
) -> None:
    fabric = OvnFabric(tls_central.nb, tls_central.sb, keys=tls_central.keys)
    try:
        fabric.ensure_public_network(make_network_spec())
        specs = [make_port_spec(number) for number in range(10, 70)]
        for spec in specs:
            fabric.ensure_port(spec)
        found = {port.port_id for port in fabric.list_ports()}
        assert found == {spec.port_id for spec in specs}
        ovn_central.add_chassis("node-1")
        ovn_central.confirm("node-1", 1_000_000)
        assert [chassis.system_id for chassis in fabric.list_chassis()] == ["node-1"]
        fabric.ensure_port_absent(specs[0].port_id)
        assert fabric.find_port(specs[0].port_id) is None
    finally:
        fabric.close()
    # More than one record of TLS: what is read at once must not wait for the socket.
    again = OvnFabric(tls_central.nb, tls_central.sb, keys=tls_central.keys)
    try:
        assert len(list(again.list_ports())) == len(specs) - 1
    finally:
        again.close()


def test_strangers_are_refused_both_ways(
    tls_central: TlsCentral, tmp_path: Path, make_network_spec: Callable[..., PublicNetworkSpec]
) -> None:
    other = Authority(tmp_path, "other")
    stranger = other.issue("worker")
    unsigned = TlsKeys(stranger.private_key, stranger.certificate, tls_central.authority.file)
    mistrusting = TlsKeys(tls_central.keys.private_key, tls_central.keys.certificate, other.file)
    for keys in (unsigned, mistrusting):
        fabric = OvnFabric(tls_central.nb, tls_central.sb, keys=keys, timeout_s=2)
        try:
            with pytest.raises(EngineUnavailable):
                fabric.ensure_public_network(make_network_spec())
        finally:
            fabric.close()


def test_files_that_are_no_keys_are_a_refusal(
    tls_central: TlsCentral, tmp_path: Path, make_network_spec: Callable[..., PublicNetworkSpec]
) -> None:
    keys, foreign = tls_central.keys, Authority(tmp_path, "other").issue("worker")
    for wrong in (
        TlsKeys(tmp_path / "absent", keys.certificate, keys.ca_certificate),
        TlsKeys(keys.certificate, keys.certificate, keys.ca_certificate),
        TlsKeys(foreign.private_key, keys.certificate, keys.ca_certificate),
        TlsKeys(keys.private_key, keys.certificate, keys.private_key),
    ):
        fabric = OvnFabric(tls_central.nb, tls_central.sb, keys=wrong)
        try:
            with pytest.raises(EngineRejected):
                fabric.ensure_public_network(make_network_spec())
        finally:
            fabric.close()


def test_two_locations_have_keys_of_their_own(
    tls_central, ovn_central, second_central, tmp_path, make_network_spec, make_port_spec
) -> None:
    """The library has one set of keys for the process; both also find their servers again after a loss."""
    other = serve(second_central, Authority(tmp_path, "other"))
    fabrics = [OvnFabric(found.nb, found.sb, keys=found.keys) for found in (tls_central, other)]
    try:
        for fabric in fabrics:
            fabric.ensure_public_network(make_network_spec())
        for central, found in ((ovn_central, tls_central), (second_central, other)):
            central.stop_server("nb")
            listen(central, "nb", found.nb, found.authority)
        for number, fabric in enumerate(fabrics, start=10):
            until_reached(lambda fabric=fabric: fabric.list_ports())
            fabric.ensure_port(make_port_spec(number))
            assert len(fabric.list_ports()) == 1
    finally:
        for fabric in fabrics:
            fabric.close()


def until_reached(call: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            call()
            return
        except EngineUnavailable:
            assert time.monotonic() < deadline
