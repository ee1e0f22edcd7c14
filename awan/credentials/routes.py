"""`/ssh-keys`: operations 70 to 73 of the public API."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from awan.accounts import Caller, authenticated, idempotent, replay
from awan.credentials import service
from awan.credentials.models import SshKey
from awan.credentials.schemas import SshKeyCreate, SshKeyOption, SshKeyView
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, PathId, Request, answer, form_body

router = APIRouter(prefix="/ssh-keys", tags=["Credential"])


@router.get("", response_model=Envelope[list[SshKeyView]])
def list_ssh_keys(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get SSH."""
    with transaction() as session:
        keys = service.list_keys(session, caller.account_id)
    return answer("My SSH Key", [SshKeyView.of(key) for key in keys])


@router.post("", status_code=201, response_model=Envelope[SshKeyView])
def create_ssh_key(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: SshKeyCreate = Depends(form_body(SshKeyCreate)),
) -> Answer:
    """Create SSH."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            row = session.get_one(SshKey, int(call.earlier.resource_id or 0))
            return replay(call.earlier, SshKeyView.of(row))
        key = service.add_key(session, caller, body.title, body.key)
        return call.keep(
            answer("SSH Key successfully created", SshKeyView.of(key), status=201), key.ssh_key_id
        )


@router.get("/options", response_model=Envelope[list[SshKeyOption]])
def list_ssh_key_options(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get SSH options."""
    with transaction() as session:
        keys = service.list_keys(session, caller.account_id)
    return answer(
        "SSH key options", [SshKeyOption(id=key.ssh_key_id, title=key.title) for key in keys]
    )


@router.delete("/{ssh_id}", response_model=Envelope[SshKeyView])
def delete_ssh_key(
    ssh_id: PathId, request: Request, caller: Caller = Depends(authenticated("delete"))
) -> Answer:
    """Delete SSH. Instances that got the key keep it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, SshKeyView.of(session.get_one(SshKey, ssh_id)))
        key = service.remove_key(session, caller, ssh_id)
        return call.keep(answer("SSH key successfully deleted", SshKeyView.of(key)), ssh_id)
