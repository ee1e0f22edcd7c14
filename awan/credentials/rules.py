"""What an acceptable SSH public key is. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

KEY_BYTES_MAX = 8 * 1024
RSA_BITS_MIN = 2048
TITLE_MAX = 64
PLAIN_TYPES = frozenset(
    {"ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"}
)
HARDWARE_TYPES = frozenset({"sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"})


@dataclass(frozen=True)
class ParsedKey:
    """A key in one canonical line, its type and its fingerprint (`SHA256:...` as ssh-keygen prints it)."""

    line: str
    type: str
    fingerprint: str


def check_title(text: str) -> str:
    """The title without spaces around it. Raises: ValueError with a sentence for the user."""
    title = text.strip()
    if not 1 <= len(title) <= TITLE_MAX or not title.isprintable():
        raise ValueError(f"The title must have 1 to {TITLE_MAX} printable characters.")
    return title


def parse_public_key(text: str) -> ParsedKey:
    """One OpenSSH public key line, checked.

    Accepts ed25519, ECDSA over the NIST curves, hardware-backed keys and RSA from 2048 bits, with an optional
    comment. Raises: ValueError with a sentence for the user.
    Source: sshd(8), AUTHORIZED_KEYS FILE FORMAT; RFC 4253 section 6.6.
    """
    if "PRIVATE KEY" in text:
        raise ValueError("This is a private key. Never share it; upload the .pub file.")
    if len(text.encode()) > KEY_BYTES_MAX:
        raise ValueError("The key is longer than 8 KiB.")
    line = text.strip()
    if "\n" in line or "\r" in line or not line.isprintable():
        raise ValueError("The key must be one line of printable characters.")
    parts = line.split(maxsplit=2)
    if len(parts) < 2 or parts[0] not in PLAIN_TYPES | HARDWARE_TYPES:
        raise ValueError(
            "The key must begin with its type: ssh-ed25519, ecdsa-sha2-nistp256/384/521, sk-... or ssh-rsa."
        )
    try:
        blob = base64.b64decode(parts[1], validate=True)
    except binascii.Error:
        raise ValueError("The key is not valid base64.") from None
    name = _first_string(blob)
    if name != parts[0].encode():
        raise ValueError("The key's content does not match its type.")
    if parts[0] in PLAIN_TYPES:
        _check_strength(f"{parts[0]} {parts[1]}".encode())
    fingerprint = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return ParsedKey(line=" ".join(parts), type=parts[0], fingerprint=f"SHA256:{fingerprint}")


def _first_string(blob: bytes) -> bytes:
    length = int.from_bytes(blob[:4], "big")
    return blob[4 : 4 + length] if len(blob) > 4 + length else b""


def _check_strength(line: bytes) -> None:
    try:
        key = load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("The key cannot be read; is it complete?") from None
    if isinstance(key, RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise ValueError(f"RSA keys need at least {RSA_BITS_MIN} bits; ed25519 is better.")
