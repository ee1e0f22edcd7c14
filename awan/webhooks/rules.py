"""Pure rules of webhooks: secrets, signatures, which events, and when to try again."""

from __future__ import annotations

import base64
import hmac
import re
import secrets
from collections.abc import Sequence

from awan.events import has_kinds_like

SECRET_PREFIX = "whsec_"  # noqa: S105 - what a secret begins with
SECRET_BYTES = 32
EVERYTHING = "*"
TEST_KIND = "webhook.test"

# Seconds from one attempt to the next: about a day in all.
RETRIES_S = (5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800, 28800)
JITTER = 0.1
GONE = 410
BUSY = frozenset({429, 503})
RETRY_AFTER_MAX_S = 4 * 3600.0

_EVENT_TYPE = re.compile(r"\*|[a-z][a-z0-9_]*\.(\*|[a-z][a-z0-9_]*)", re.ASCII)


def new_secret() -> str:
    """A fresh secret as its holder has it: `whsec_` and base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signature(secret_texts: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one signature for each secret, separated by spaces.

    Source: github.com/standard-webhooks/standard-webhooks, spec, "Signature scheme" (v1, HMAC-SHA256).
    """
    signed = f"{message_id}.{timestamp}.".encode() + body
    found = []
    for text in secret_texts:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX))
        found.append("v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode())
    return " ".join(found)


def check_event_type(text: str) -> str:
    """The text itself: `*`, `instance.*` or `instance.created`. Raises: ValueError when no event can ever match it."""
    if not _EVENT_TYPE.fullmatch(text):
        raise ValueError("An event type is written instance.created, instance.* or *.")
    if not has_kinds_like(text):
        raise ValueError(f"There are no events {text}: GET /events/kinds lists those there are.")
    return text


def retry_delay_s(attempts: int) -> int | None:
    """Seconds until the next attempt, after so many failed ones (from 1); None: given up."""
    return RETRIES_S[attempts - 1] if attempts <= len(RETRIES_S) else None


def asked_delay_s(status: int | None, retry_after_s: float | None) -> float:
    """For how long a receiver that is too busy (429, 503) asks to be left alone, `RETRY_AFTER_MAX_S` at most."""
    if status not in BUSY or retry_after_s is None:
        return 0.0
    return min(retry_after_s, RETRY_AFTER_MAX_S)


def is_success(status: int | None) -> bool:
    """Whether the receiver has the message."""
    return status is not None and 200 <= status < 300
