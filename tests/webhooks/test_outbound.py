"""Where webhooks cannot go: nothing of ours is reached, however it is written."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from awan.kit import outbound
from awan.kit.clock import now
from tests.support.changed_settings import changed_settings
from tests.webhooks.receiver import Receiver

REFUSED_ADDRESSES = [
    "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1",
    "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1",
    "ff02::1", "4000::1",
]  # fmt: skip
ALLOWED_ADDRESSES = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]
REFUSED_URLS = [
    "http://example.com/", "file:///etc/passwd", "gopher://example.com/", "//example.com/", "example.com",
    "https://", "https:///x", "https://user@example.com/", "https://user:pw@example.com/", "https://example.com/#x",
    "https://127.0.0.1/", "https://[::1]/", "https://[::ffff:169.254.169.254]/", "https://[fe80::1%25eth0]/",
    "https://2130706433/", "https://0x7f000001/", "https://127.1/", "https://0177.0.0.1/", "https://1.2.3.4.5/",
    "https://example.com:0/", "https://example.com:99999/", "https://exa mple.com/", "https://example.com\\@10.0.0.1/",
    "https://example.com/\r\nx: y", "https://ex\u00e4mple.com/", "https://169.254.169.254/latest/meta-data",
    "https://" + "a" * 2050, "https://a..b/", "https://-a.b/",
    "https://localhost/h", "https://LOCALHOST:8443/", "https://hooks.localhost/", "https://intranet/hook",
]  # fmt: skip


@pytest.fixture
def allow_loopback() -> Iterator[None]:
    """The operator allows http and one address of the loopback."""
    with changed_settings(outbound_allow_http="true", outbound_allowed_networks='["127.0.0.1/32"]'):
        yield


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names resolve to these, one answer after the other; gives the list of names that were asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        found = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, port)) for text in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def post(url: str) -> outbound.Outcome:
    """Posts a body there."""
    return asyncio.run(outbound.post(url, b"{}", {"x-test": "1"}))


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_refused_addresses(address: str) -> None:
    assert not outbound.is_allowed(ip_address(address))


@pytest.mark.parametrize("address", ALLOWED_ADDRESSES)
def test_allowed_addresses(address: str) -> None:
    assert outbound.is_allowed(ip_address(address))


def test_the_operators_word_on_networks() -> None:
    with changed_settings(
        outbound_refused_networks='["8.8.8.0/24"]', outbound_allowed_networks='["10.9.0.0/16"]'
    ):
        found = [outbound.is_allowed(ip_address(a)) for a in ("8.8.8.8", "10.9.1.1", "10.8.1.1")]
    assert found == [False, True, False]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_refused_urls(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the sentences differ
        outbound.parse_url(url)
    outcome = post(url)
    assert outcome.status is None
    assert outcome.error


def test_local_names_are_the_operators_to_allow(allow_loopback: None) -> None:
    """They may lie in the network that he lets customers reach; their address is looked at when they are called."""
    assert outbound.parse_url("http://localhost/h").host == "localhost"
    with Receiver() as receiver:
        url = receiver.url.replace("127.0.0.1", "localhost")
        with changed_settings(outbound_allowed_networks='["10.0.0.0/8"]'):
            assert post(url).error == "The address of the host is not allowed."
        assert receiver.received == []


def test_a_url_taken_apart() -> None:
    target = outbound.parse_url("https://Hooks.Example.com:8443/a/b?c=d")
    assert target == outbound.Target("https", "hooks.example.com", 8443, "/a/b?c=d")
    assert target.host_header == "hooks.example.com:8443"
    assert outbound.parse_url("https://[2606:4700::1111]").host_header == "[2606:4700::1111]"


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.2"],
        ["169.254.169.254"],
        ["10.0.0.1"],
        ["127.0.0.1", "10.0.0.1"],
        ["::ffff:127.0.0.1"],
    ],
)
def test_a_name_of_ours_is_not_connected_to(
    allow_loopback: None, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    """One bad address among good ones is enough, and nothing is connected to."""
    with Receiver() as receiver:
        port = receiver.url.rpartition(":")[2].partition("/")[0]
        resolve_to(monkeypatch, addresses)
        outcome = post(f"http://rebind.test:{port}/hook")
        assert outcome.error == "The address of the host is not allowed."
        assert receiver.received == []


def test_a_name_is_resolved_once_and_its_address_connected_to(
    allow_loopback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer would be an address that is not allowed: nobody asks for it."""
    with Receiver() as receiver:
        port = receiver.url.rpartition(":")[2].partition("/")[0]
        asked = resolve_to(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
        # What the connection itself looks up is the address that was checked.
        assert post(f"http://rebind.test:{port}/hook?x=1").status == 204
        assert asked[0] == "rebind.test"
        assert set(asked[1:]) <= {"127.0.0.1"}
        [received] = receiver.received
        assert received.headers["host"] == f"rebind.test:{port}"
        assert received.path == "/hook?x=1"


def test_a_redirect_is_an_answer_and_no_more(allow_loopback: None) -> None:
    with Receiver(answer=lambda _: 302) as receiver:
        assert post(receiver.url).status == 302
        assert len(receiver.received) == 1


def test_a_proxy_of_the_environment_is_not_used(
    allow_loopback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver() as proxy, Receiver() as receiver:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert post(receiver.url).status == 204
        assert (len(proxy.received), len(receiver.received)) == (0, 1)


def test_the_certificate_must_be_the_names(
    allow_loopback: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The connection goes to an address; what is proved there is the name, by an authority that we know."""
    certificate = make_certificate(tmp_path, "hooks.test")
    with Receiver() as receiver:
        receiver.use_tls(certificate)
        port = receiver.url.rpartition(":")[2].partition("/")[0]
        resolve_to(monkeypatch, ["127.0.0.1"])
        try:
            outbound.tls_context.cache_clear()
            assert post(f"https://hooks.test:{port}/").error == "The TLS handshake failed."
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            outbound.tls_context.cache_clear()
            assert post(f"https://hooks.test:{port}/").status == 204
            assert post(f"https://other.test:{port}/").error == "The TLS handshake failed."
            assert post(f"https://127.0.0.1:{port}/").error == "The TLS handshake failed."
        finally:
            outbound.tls_context.cache_clear()


def make_certificate(directory: Path, name: str) -> Path:
    """A file with the key and the self-signed certificate of a name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now() - timedelta(days=1))
        .not_valid_after(now() + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_a_name_without_address(allow_loopback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert post("http://unknown.test/").error == "The host name does not resolve."
