"""An application with the real middleware, error handlers and dependencies; its routes show what they were given."""

from __future__ import annotations

import threading
from enum import StrEnum
from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Request
from pydantic import AwareDatetime, BaseModel, Field, SecretStr
from sqlalchemy import text

from awan import resources
from awan.accounts import Caller, authenticated, idempotent, operator, quotas, replay
from awan.errors import EngineUnavailable, NoCapacity, NotFound
from awan.kit import middleware
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    PathId,
    answer,
    form_body,
    query_of,
)
from awan.kit.ids import new_id
from awan.resources import ResourceKind


class Colour(StrEnum):
    """Some words."""

    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    """Something inside."""

    port: int
    note: str | None = None


class Everything(BaseModel):
    """A field of each kind."""

    name: str = Field(min_length=1, max_length=20)
    count: int = Field(ge=1, le=64)
    big: int = 1
    flag: bool = False
    maybe: int | None = None
    title: str | None = None
    colour: Colour | None = None
    size: Literal[1, 2, 4] = 1
    ids: list[int] = Field(default_factory=list)
    names: list[str] | None = None
    uuid: UUID | None = None
    at: AwareDatetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    inner: Inner | None = None
    either: int | UUID | None = None
    anything: Any = None
    password: SecretStr | None = None


class Flags(BaseModel):
    """As a deletion has them."""

    remove_ip: bool
    remove_block_storage: bool


class Search(BaseModel):
    """As a list has it."""

    page: int = Field(default=1, ge=1)
    search: str | None = None
    flag: bool | None = None


router = APIRouter()
entered, proceed = threading.Event(), threading.Event()


@router.post("/everything", response_model=Envelope[Any])
def show_everything(body: Everything = Depends(form_body(Everything))) -> Answer:
    """What arrived, with its Python types."""
    given = {name: getattr(body, name) for name in body.model_fields_set}
    shown = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in given.items()
    }
    return answer("Everything", shown)


@router.put("/everything", response_model=Envelope[Any])
def put_everything(body: Everything = Depends(form_body(Everything))) -> Answer:
    """As POST."""
    return answer("Put", body.count)


@router.get("/search", response_model=Envelope[Any])
def search(query: Search = Depends(query_of(Search))) -> Answer:
    """What was asked."""
    return answer("Search", query)


@router.post("/start", response_model=Envelope[None])
def start(_: EmptyForm = Depends(form_body(EmptyForm))) -> Answer:
    """A call without fields; it has an operation."""
    return answer("Start", None, operation=OperationView(uuid=new_id(), kind="x", status="queued"))


@router.get("/things/{thing_id}", response_model=Envelope[int])
def get_thing(thing_id: PathId) -> Answer:
    """An integer in the path; there are a thousand."""
    if thing_id > 1000:
        raise NotFound("Thing not found.")
    return answer("Thing", thing_id)


@router.delete("/instances/{uuid:uuid}", response_model=Envelope[Any])
def delete_instance(
    uuid: UUID,
    caller: Caller = Depends(authenticated("delete")),
    flags: Flags = Depends(
        form_body(Flags, path_check=resources.in_path(ResourceKind.INSTANCE), or_query=True)
    ),
) -> Answer:
    """A deletion whose flags are in the body or in the query."""
    with transaction() as session:
        resources.lock_owned(session, caller, ResourceKind.INSTANCE, uuid)
        resources.retire(session, uuid)
    return answer("Deleted", flags)


class New(BaseModel):
    """A thing to make."""

    name: str
    password: SecretStr | None = None
    waits: bool = False


@router.post("/instances", status_code=202, response_model=Envelope[dict[str, str]])
def create_instance(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: New = Depends(form_body(New)),
) -> Answer:
    """Makes an ownership row, counted by the quota, once per Idempotency-Key."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            uuid = UUID(call.earlier.resource_id)
            row = resources.get_owned(session, caller, ResourceKind.INSTANCE, uuid)
            return replay(call.earlier, {"uuid": str(uuid), "name": row.name})
        quotas.take(session, caller.account_id, instances=1)
        row = resources.create(
            session,
            kind=ResourceKind.INSTANCE,
            resource_id=new_id(),
            account_id=caller.account_id,
            name=body.name,
            location_id=None,
            operation_id=None,
            name_field="name",
        )
        if body.waits:
            entered.set()
            proceed.wait(10)
        made = answer("Created", {"uuid": str(row.resource_id), "name": row.name}, status=202)
        return call.keep(made, row.resource_id)


@router.get("/who", response_model=Envelope[dict[str, str]])
def who(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Who calls."""
    return answer("Who", {"actor": caller.actor, "ip": caller.source_ip, "id": caller.request_id})


@router.post("/pay", response_model=Envelope[None])
def pay(
    caller: Caller = Depends(authenticated("write", billing=True)),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """A call about money."""
    return answer("Paid", None)


@router.post("/admin/things", response_model=Envelope[None])
def administrate(
    caller: Caller = Depends(operator("write")), body: Flags = Depends(form_body(Flags))
) -> Answer:
    """A call of the operator's."""
    return answer("Done", None)


@router.get("/fail/{how}", response_model=Envelope[None])
def fail(how: str) -> Answer:
    """Raises what is asked for."""
    with transaction() as session:
        match how:
            case "bug":
                raise RuntimeError("marker-of-a-bug")
            case "sql":
                session.execute(text("SELECT 1/0"))
            case "timeout":
                session.execute(text("SET LOCAL statement_timeout = '50ms'"))
                session.execute(text("SELECT pg_sleep(2)"))
            case "capacity":
                raise NoCapacity("Nothing fits here.", detail="node-1: memory")
            case "engine":
                raise EngineUnavailable("libvirt", "define", "marker-of-an-engine")
    return answer("Fine", None)


def make_probe_app() -> FastAPI:
    """A fresh application."""
    app = FastAPI(redirect_slashes=False)
    app.include_router(router, prefix="/api/v1")
    middleware.install(app)
    return app
