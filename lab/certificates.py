"""The certificate authority of a slot: what a node with TLS and the control plane show each other.

An operator would use the certificates of the site; names of files and fields are those that libvirt and QEMU ask for.
Source: libvirt.org/kbase/tlscerts.html.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from awan.runtime.service_user import ensure_service_user
from lab.layout import NodeLayout, SlotLayout

VALID_DAYS = 3650
Key = ec.EllipticCurvePrivateKey


def ensure_authority(layout: SlotLayout) -> None:
    """The authority and the control plane's certificate exist."""
    if (layout.control_plane_pki_dir / "clientcert.pem").exists():
        return
    layout.pki_dir.mkdir(parents=True, exist_ok=True)
    key = _new_key()
    name = _name(f"slot {layout.slot}")
    authority = (
        _builder(name, key.public_key())
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(layout.pki_dir / "ca-key.pem", _key_pem(key), 0o600)
    _write(layout.pki_dir / "ca-cert.pem", _pem(authority), 0o644)
    folder = layout.control_plane_pki_dir
    folder.mkdir(exist_ok=True)
    _write(folder / "cacert.pem", _pem(authority), 0o644)
    _issue(
        layout,
        "control plane",
        ExtendedKeyUsageOID.CLIENT_AUTH,
        key_file=folder / "clientkey.pem",
        certificate_file=folder / "clientcert.pem",
    )
    user = ensure_service_user()
    if user is not None:
        user.own(folder)  # a control plane that is started as root reads them as this user


def issue_for_node(layout: SlotLayout, node: NodeLayout, folder: Path) -> None:
    """The node's key and certificate, and the authority's, in `folder` under QEMU's names.

    The authority must exist. The files are root's: who else is to read the key is given it by the caller.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "ca-cert.pem", (layout.pki_dir / "ca-cert.pem").read_bytes(), 0o644)
    _issue(
        layout,
        node.name,
        ExtendedKeyUsageOID.SERVER_AUTH,
        key_file=folder / "server-key.pem",
        certificate_file=folder / "server-cert.pem",
        address=node.mgmt_ip,
    )


def _issue(
    layout: SlotLayout,
    name: str,
    purpose: x509.ObjectIdentifier,
    *,
    key_file: Path,
    certificate_file: Path,
    address: str | None = None,
) -> None:
    authority = x509.load_pem_x509_certificate((layout.pki_dir / "ca-cert.pem").read_bytes())
    signer = serialization.load_pem_private_key(
        (layout.pki_dir / "ca-key.pem").read_bytes(), password=None
    )
    assert isinstance(signer, Key)
    key = _new_key()
    builder = (
        _builder(_name(name), key.public_key())
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if address is not None:
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        builder = builder.add_extension(names, critical=False)
    _write(key_file, _key_pem(key), 0o600)
    _write(certificate_file, _pem(builder.sign(signer, hashes.SHA256())), 0o644)


def _new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Awan lab {name}")])


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    began_at = datetime.now(UTC) - timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(began_at)
        .not_valid_after(began_at + timedelta(days=VALID_DAYS))
    )


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not is_authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
    path.chmod(mode)
