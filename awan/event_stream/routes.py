"""`GET /events` and the kinds of events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header

from awan.accounts import Caller, authenticated
from awan.errors import Invalid
from awan.event_stream.schemas import StreamQuery
from awan.event_stream.stream import EventStream, slot, stream
from awan.events import CUSTOMER_KINDS, Position
from awan.events.schemas import EventKindView
from awan.kit.http import EVENT_STREAM_TYPE, Answer, Envelope, answer, query_of

router = APIRouter(tags=["Account"])

LAST_EVENT_ID = "Last-Event-ID"


async def streaming_caller(
    caller: Caller = Depends(authenticated("read")),
) -> AsyncIterator[Caller]:
    """The caller, counted as a stream until the answer has been sent."""
    with slot(caller):
        yield caller


# As OpenAPI 3.2 describes what is sent one after the other.
_ITEM = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/EventView"},
        },
    },
}
_STREAM = {"content": {EVENT_STREAM_TYPE: {"itemSchema": _ITEM}}}


@router.get("/events", response_class=EventStream, openapi_extra={"responses": {"200": _STREAM}})
async def stream_events(
    caller: Caller = Depends(streaming_caller, scope="request"),
    query: StreamQuery = Depends(query_of(StreamQuery)),
    last_event_id: Annotated[
        str | None,
        Header(
            alias=LAST_EVENT_ID, description="Go on after this event, as browsers do by themselves."
        ),
    ] = None,
) -> EventStream:
    """The account's events as they happen (server-sent events), in order, each once.

    `id` is the event's position, `event` its kind, `data` the event as `GET /account/events` shows it. A client that
    lost the stream comes back with the last `id` and misses nothing. A comment comes every 15 s when nothing happens.
    The stream ends when the key is revoked.
    """
    after = _position(LAST_EVENT_ID, last_event_id) if last_event_id else None
    if after is None and query.after is not None:
        after = Position.parse(query.after)
    return EventStream(stream(caller, after, query.wait_s), headers={"x-accel-buffering": "no"})


@router.get("/events/kinds", response_model=Envelope[list[EventKindView]])
def list_event_kinds(_: Caller = Depends(authenticated("read"))) -> Answer:
    """Every kind of event that an account can see, in lists, streams and webhooks, by name.

    A kind is `<noun>.<past participle>`, or the kind of an operation (`instance.start`): then that operation was begun,
    and `operation.succeeded`, `operation.failed` or `operation.cancelled` tells how it ended.
    """
    kinds = sorted(CUSTOMER_KINDS.items())
    return answer(
        "Event kinds",
        [EventKindView(kind=kind, description=sentence) for kind, sentence in kinds],
    )


def _position(field: str, text: str) -> Position:
    try:
        return Position.parse(text)
    except ValueError as err:
        raise Invalid.field(field, str(err)) from err
