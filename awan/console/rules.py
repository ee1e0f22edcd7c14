"""Tickets, passwords and origins of consoles. Pure, but for the key that they are derived under."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from urllib.parse import urlsplit
from uuid import UUID

from awan.engines.hypervisor import CONSOLE_PASSWORD_MAX
from awan.errors import Forbidden, Unauthenticated
from awan.kit.secrets import keyed_digest

TICKET_REFUSED = "The console's ticket is unknown, was used already, or has expired."


def ticket(console_id: UUID) -> str:
    """What opens the websocket of this console: its id and a proof that we made it."""
    return f"{console_id.hex}.{_proof('console.ticket', console_id)}"


def read_ticket(text: str) -> UUID:
    """The console that a ticket is for. Raises: Unauthenticated for one that we did not make."""
    name, _, proof = text.partition(".")
    try:
        console_id = UUID(hex=name)
    except ValueError:
        raise Unauthenticated(TICKET_REFUSED) from None
    wanted = ticket(console_id).partition(".")[2]
    if not hmac.compare_digest(proof.encode(), wanted.encode()):
        raise Unauthenticated(TICKET_REFUSED)
    return console_id


def viewer_password(console_id: UUID) -> str:
    """What the viewer is asked for by the relay."""
    return _proof("console.viewer", console_id)[:CONSOLE_PASSWORD_MAX]


def node_password(console_id: UUID) -> str:
    """What the relay shows to the node's VNC server; it never leaves the control plane."""
    return _proof("console.node", console_id)[:CONSOLE_PASSWORD_MAX]


def _proof(purpose: str, console_id: UUID) -> str:
    return urlsafe_b64encode(keyed_digest(purpose, console_id.bytes)).decode().rstrip("=")


def websocket_origin(http_origin: str) -> str:
    """The origin of the websockets beside a page: wss for https, ws for http."""
    return "ws" + http_origin.removeprefix("http")


def check_origin(origin: str | None, *, own: Iterable[str], others: Iterable[str]) -> None:
    """Whether a page of this origin may open a console here: our own pages and those of the operator's panels.

    Programs other than browsers name no origin. Raises: Forbidden. Source: RFC 6455 section 10.2.
    """
    if origin is None:
        return
    given = _normal(origin)
    if given is None or given not in {_normal(allowed) for allowed in (*own, *others)}:
        raise Forbidden("A page of this origin may not open consoles.")


def _normal(origin: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port, the default port written out; None for what is no web origin."""
    try:
        parts = urlsplit(origin)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    if not parts.hostname or parts.scheme not in {"http", "https"}:
        return None
    return parts.scheme, parts.hostname, port
