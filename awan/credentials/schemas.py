"""Wire shapes of SSH keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from awan.credentials.models import SshKey
from awan.credentials.rules import TITLE_MAX, check_title
from awan.kit.http import Timestamp


class SshKeyCreate(BaseModel):
    """A new key."""

    model_config = ConfigDict(extra="forbid")

    title: Annotated[str, AfterValidator(check_title)] = Field(
        min_length=1, max_length=TITLE_MAX, description="Title of ssh, unique in the account."
    )
    key: str = Field(min_length=1, max_length=8192, description="One OpenSSH public key line.")


class SshKeyView(BaseModel):
    """A stored key."""

    id: int
    title: str
    key: str
    type: str
    fingerprint: str
    created_at: Timestamp

    @classmethod
    def of(cls, row: SshKey) -> SshKeyView:
        """The row as the API shows it."""
        return cls(
            id=row.ssh_key_id,
            title=row.title,
            key=row.key,
            type=row.type,
            fingerprint=row.fingerprint,
            created_at=row.created_at,
        )


class SshKeyOption(BaseModel):
    """A key to choose."""

    id: int
    title: str
