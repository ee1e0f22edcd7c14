"""What is taken as an SSH public key."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from awan.credentials.rules import parse_public_key
from tests.support.ssh_keys import ED25519_KEYS


def line_of(public: ed25519.Ed25519PublicKey | rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> str:
    """The key as ssh-keygen writes it."""
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (line_of(ed25519.Ed25519PrivateKey.generate().public_key()), "ssh-ed25519"),
        (line_of(ec.generate_private_key(ec.SECP256R1()).public_key()), "ecdsa-sha2-nistp256"),
        (line_of(ec.generate_private_key(ec.SECP384R1()).public_key()), "ecdsa-sha2-nistp384"),
        (line_of(ec.generate_private_key(ec.SECP521R1()).public_key()), "ecdsa-sha2-nistp521"),
        (line_of(rsa.generate_private_key(65537, 2048).public_key()), "ssh-rsa"),
    ],
    ids=["ed25519", "nistp256", "nistp384", "nistp521", "rsa"],
)
def test_the_usual_keys(line: str, kind: str, tmp_path: Path) -> None:
    parsed = parse_public_key(f"  {line}   me @ laptop \n")
    assert parsed.type == kind
    assert parsed.line == f"{line} me @ laptop"
    (tmp_path / "key.pub").write_text(line)
    printed = subprocess.run(
        ["ssh-keygen", "-lf", str(tmp_path / "key.pub")], check=True, capture_output=True, text=True
    ).stdout
    assert parsed.fingerprint in printed


def test_hardware_keys() -> None:
    name, application = b"sk-ssh-ed25519@openssh.com", b"ssh:"
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (name, bytes(32), application))
    line = f"{name.decode()} {base64.b64encode(blob).decode()} token"
    assert parse_public_key(line).line == line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 !!!",
        "ssh-ed25519 AAAA",
        ED25519_KEYS[0].replace("ssh-ed25519 ", "ssh-rsa "),
        ED25519_KEYS[0].split(" ")[1],
        f"no-pty {ED25519_KEYS[0]}",
        f'command="id" {ED25519_KEYS[0]}',
        f"{ED25519_KEYS[0]}\n{ED25519_KEYS[1]}",
        f"{ED25519_KEYS[0]}\r{ED25519_KEYS[1]}",
        f"{ED25519_KEYS[0]}\x00",
        f"{ED25519_KEYS[0][:40]}",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----",
        line_of(rsa.generate_private_key(65537, 1024).public_key()),
        f"{ED25519_KEYS[0]} {'x' * 9000}",
        "ssh-dss "
        + base64.b64encode(
            b"\x00\x00\x00\x07ssh-dss" + dsa.generate_parameters(1024).parameter_numbers().p.to_bytes(128, "big")
        ).decode(),
    ],
)  # fmt: skip
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as refused:
        parse_public_key(text)
    # The sentence goes into an answer: it must not repeat what may be a private key.
    assert "AAAA" not in str(refused.value)


@given(st.text(max_size=300))
def test_no_text_breaks_the_parser(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_public_key(text)
    with pytest.raises(ValueError, match=r"\w"):
        parse_public_key(f"ssh-ed25519 {text}")


@given(st.binary(max_size=120), st.sampled_from(["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256"]))
def test_no_blob_breaks_the_parser(tail: bytes, kind: str) -> None:
    blob = len(kind).to_bytes(4, "big") + kind.encode() + tail
    try:
        parsed = parse_public_key(f"{kind} {base64.b64encode(blob).decode()}")
    except ValueError:
        return
    assert parsed.type == kind
