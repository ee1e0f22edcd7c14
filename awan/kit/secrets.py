"""Secrets at rest: AES-256-GCM with a key file, and the one table that holds them.

The key file has one line per key, `<key id> <64 hex digits>`; the first encrypts, all decrypt, so a key is rotated
by putting a new line on top. Workflows get a secret's id, never its text.
"""

from __future__ import annotations

import hmac
import os
import secrets as random_source
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import delete
from sqlalchemy.orm import Mapped, Session, mapped_column

from awan.errors import NotFound
from awan.kit.clock import now
from awan.kit.database import Base
from awan.kit.ids import new_id
from awan.settings import get_settings

NONCE_BYTES = 12


class Secret(Base):
    """An encrypted text. `purpose` is bound into the ciphertext, so a row cannot be passed off as another."""

    __tablename__ = "secret"

    secret_id: Mapped[UUID] = mapped_column(primary_key=True)
    purpose: Mapped[str]
    key_id: Mapped[str]
    nonce: Mapped[bytes]
    ciphertext: Mapped[bytes]
    expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


def create_key_file(path: Path) -> None:
    """Makes a key file with one fresh key, mode 0600. An existing file is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as file:
        file.write(f"k1 {random_source.token_hex(32)}\n")


@lru_cache(maxsize=4)
def _keys(path: Path) -> dict[str, bytes]:
    if path.stat().st_mode & 0o077:
        raise PermissionError(f"{path} must not be readable by others (chmod 600)")
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    keys = {key_id: bytes.fromhex(digits) for key_id, digits in lines}
    if not keys or any(len(key) != 32 for key in keys.values()):
        raise ValueError(f"{path} must hold lines '<key id> <64 hex digits>'")
    return keys


def keyed_digest(purpose: str, data: bytes) -> bytes:
    """HMAC-SHA256 of `data` under the newest key: comparable by us, of no use to who only reads the database."""
    key = next(iter(_keys(get_settings().secret_key_file).values()))
    return hmac.digest(key, purpose.encode() + b"\0" + data, "sha256")


def put_secret(
    session: Session, purpose: str, text: str, expires_at: datetime | None = None
) -> UUID:
    """Stores `text` encrypted and returns its id."""
    keys = _keys(get_settings().secret_key_file)
    key_id, key = next(iter(keys.items()))
    secret_id, nonce = new_id(), random_source.token_bytes(NONCE_BYTES)
    bound = f"{secret_id}:{purpose}".encode()
    session.add(
        Secret(
            secret_id=secret_id,
            purpose=purpose,
            key_id=key_id,
            nonce=nonce,
            ciphertext=AESGCM(key).encrypt(nonce, text.encode(), bound),
            expires_at=expires_at,
            created_at=now(),
        )
    )
    return secret_id


def get_secret(session: Session, secret_id: UUID, purpose: str) -> str:
    """The text. Raises: NotFound when it is gone, expired or was stored for another purpose."""
    row = session.get(Secret, secret_id)
    if (
        row is None
        or row.purpose != purpose
        or (row.expires_at is not None and row.expires_at <= now())
    ):
        raise NotFound("The secret does not exist any more.")
    key = _keys(get_settings().secret_key_file)[row.key_id]
    return (
        AESGCM(key).decrypt(row.nonce, row.ciphertext, f"{secret_id}:{purpose}".encode()).decode()
    )


def delete_secret(session: Session, secret_id: UUID) -> None:
    """Forgets the secret. Absent: no effect."""
    session.execute(delete(Secret).where(Secret.secret_id == secret_id))
