"""Operation 7 of the public API, and the websocket that its ticket opens."""

from __future__ import annotations

from urllib.parse import quote
from uuid import UUID

from fastapi import APIRouter, Depends, WebSocket

from awan.accounts import Caller, authenticated, idempotent, replay
from awan.console import relay, service
from awan.console.models import Console
from awan.console.rules import ticket, viewer_password, websocket_origin
from awan.console.schemas import ConsoleTicket
from awan.kit.database import transaction
from awan.kit.http import Answer, EmptyForm, Envelope, Request, answer, form_body
from awan.resources import ResourceKind, in_path
from awan.settings import get_settings

SOCKET_PATH, PAGE_PATH = "/api/v1/console", "/console"
SHOWN_ONCE = "A ticket is shown once. To have another, call without this Idempotency-Key."

router = APIRouter(tags=["Instance"])


@router.post("/instances/{instance_uuid:uuid}/vnc", response_model=Envelope[ConsoleTicket])
def open_console(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(
        form_body(EmptyForm, path_check=in_path(ResourceKind.INSTANCE, "instance_uuid"))
    ),
) -> Answer:
    """Virtual console websocket: a ticket for the screen of a running instance, good for one use within 60 s.

    A repeat under the same Idempotency-Key shows no ticket again; `warnings` says so.
    """
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            console = session.get_one(Console, UUID(call.earlier.resource_id))
            return replay(call.earlier, _show_again(console), warnings=[SHOWN_ONCE])
        console = service.issue(session, caller, instance_uuid)
        return call.keep(answer("VNC connection", _show(console, request)), console.console_id)


def _show(console: Console, request: Request) -> ConsoleTicket:
    origin = get_settings().public_url or str(request.base_url).rstrip("/")
    token, password = ticket(console.console_id), viewer_password(console.console_id)
    return ConsoleTicket(
        url=f"{websocket_origin(origin)}{SOCKET_PATH}?token={quote(token)}",
        token=token,
        protocol="rfb",
        password=password,
        expires_at=console.ticket_expires_at,
        page_url=f"{origin}{PAGE_PATH}#token={quote(token)}&password={quote(password)}",
    )


def _show_again(console: Console) -> ConsoleTicket:
    return ConsoleTicket(
        url=None,
        token=None,
        protocol="rfb",
        password=None,
        expires_at=console.ticket_expires_at,
        page_url=None,
    )


@router.websocket("/console")
async def attend_console(websocket: WebSocket) -> None:
    """The websocket of a ticket."""
    await relay.attend(websocket)
