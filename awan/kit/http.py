"""HTTP without domain words: the shape of answers and errors, bodies and queries as dependencies.

    @router.post("/things/{uuid}/stop", response_model=Envelope[ThingView])
    def stop_thing(
        uuid: UUID,
        request: Request,
        caller: Caller = Depends(authenticated("write")),      # before the body: 401 comes before 422
        body: StopThing = Depends(form_body(StopThing, path_check=...)),
    ) -> Answer:
        return answer("Thing stopped", view, operation=operation)

Use `EmptyForm` where an operation takes no fields, `query_of(Model)` for query parameters (on a route without it, and
without parameters of FastAPI's own, any query parameter is refused), `PathId` for integers in paths, `Timestamp` for
moments in answers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID

from fastapi import FastAPI, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema
from pydantic_core import to_json
from starlette.convertors import CONVERTOR_TYPES
from starlette.types import Scope

from awan.errors import Invalid, NotFound, Refused, UnsupportedMediaType
from awan.kit import forms
from awan.kit.clock import iso

__all__ = [
    "Answer",
    "EmptyForm",
    "Envelope",
    "OperationView",
    "PathId",
    "Request",
    "Timestamp",
    "answer",
    "error_answer",
    "form_body",
    "no_such_route",
    "query_of",
    "refuse_unknown_query",
    "route_facts",
]

API_KEY_HEADER = "x-apikey"
CHALLENGE = f'ApiKey realm="awan", header="{API_KEY_HEADER}"'
"""What goes with every 401, as RFC 9110 11.6.1 wants it. There is no registered scheme for a key in a header."""
EVENT_STREAM_TYPE = "text/event-stream"
ASKED_PATH = "awan.asked_path"
"""Key in the ASGI scope: the path as the client wrote it, where another is served for it."""
PATH_SHOWN_MAX = 100
NAMES_NOTHING = {"uuid": str(UUID(int=0))}
"""Convertor of a path -> an id that nothing has. That of integers is in no path: it fails over thousands of digits."""
BODY_REFUSED = "awan.body_refused"
"""Key in the ASGI scope: why the body could not be read, raised by the route that wants it (after its caller)."""
STREAM_TYPE = "application/octet-stream"
"""Bodies of this type are not read in advance: the route streams them itself."""

DataT = TypeVar("DataT")
ModelT = TypeVar("ModelT", bound=BaseModel)
PathCheck = Callable[[Request], None]

Timestamp = Annotated[
    datetime,
    PlainSerializer(iso, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-11-23T18:05:00Z"]}),
]
"""A moment in an answer: ISO 8601, UTC, whole seconds."""


def _path_id(given: Any) -> int:
    try:
        number = forms.integer(given)
    except ValueError:
        return forms.INTEGER_MAX
    return number if number >= 1 else forms.INTEGER_MAX


PathId = Annotated[int, BeforeValidator(_path_id), Path(ge=1, le=forms.INTEGER_MAX)]
"""An integer id in a path; anything else there is an id that nothing has, so that it is answered as an unknown one."""


class OperationView(BaseModel):
    """The operation that carries a change out; follow it at `GET /operations/{uuid}`."""

    model_config = ConfigDict(frozen=True)

    uuid: UUID
    kind: str
    status: str


class Envelope(BaseModel, Generic[DataT]):
    """Every success: a sentence, what was asked for, and the operation of a change that takes time."""

    message: str
    data: DataT
    operation: OperationView | None = None
    warnings: list[str] | None = None


class RemainingUuid(BaseModel):
    """What a call that is repeated under its Idempotency-Key shows of a thing that has left no row since."""

    model_config = ConfigDict(extra="forbid")

    uuid: UUID


class RemainingId(BaseModel):
    """As `RemainingUuid`, of a thing that is known by a number."""

    model_config = ConfigDict(extra="forbid")

    id: int


Remains = RemainingUuid | RemainingId


class ErrorAnswer(BaseModel):
    """Every refusal and failure. The request id is in the header `x-request-id`."""

    type: str
    message: str
    errors: dict[str, list[str]] | None = None


class EmptyForm(BaseModel):
    """The body of a call without fields."""

    model_config = ConfigDict(extra="forbid")


class Answer(Response):
    """A success that still knows its message and operation, so that it can be remembered."""

    media_type = "application/json"

    def __init__(self, content: bytes, *, status_code: int, message: str) -> None:
        super().__init__(content, status_code=status_code)
        self.message = message
        self.operation: OperationView | None = None


def answer(
    message: str,
    data: Any,
    *,
    status: int = 200,
    operation: OperationView | None = None,
    warnings: list[str] | None = None,
) -> Answer:
    """A success in the shape of `Envelope`. `data` is anything pydantic can write as JSON.

    `operation` stands beside `data` and its uuid in the header `x-operation-id`; without one, both are left out.
    """
    content: dict[str, Any] = {"message": message, "data": data}
    if operation is not None:
        content["operation"] = operation
    if warnings:
        content["warnings"] = warnings
    built = Answer(to_json(content), status_code=status, message=message)
    if operation is not None:
        built.operation = operation
        built.headers["x-operation-id"] = str(operation.uuid)
    return built


def error_answer(refused: Refused) -> Response:
    """A refusal in the one error shape, with Retry-After when it says so."""
    content: dict[str, Any] = {"type": refused.type, "message": refused.message}
    if refused.errors:
        content["errors"] = refused.errors
    response = Response(to_json(content), refused.status, media_type="application/json")
    if refused.retry_after_s is not None:
        response.headers["retry-after"] = str(refused.retry_after_s)
    if refused.status == 401:
        response.headers["www-authenticate"] = CHALLENGE
    return response


def asked_path(scope: Scope) -> str:
    """The path as the client wrote it."""
    return str(scope.get(ASKED_PATH, scope["path"]))


def no_such_route(request: Request) -> NotFound:
    """The refusal of a call to what is no route, or none for this caller: the two must not differ."""
    path = asked_path(request.scope)
    shown = re.sub(r"[^A-Za-z0-9/_.~:-]", "?", path[:PATH_SHOWN_MAX])
    return NotFound(f"There is no such route: {request.method} {shown}")


@dataclass(frozen=True)
class InputSpec:
    """What a dependency made by `form_body` or `query_of` reads: for documentation and checks."""

    model: type[BaseModel]
    in_body: bool
    in_query: bool


_SPECS: dict[Any, InputSpec] = {}


def form_body(
    model: type[ModelT], *, path_check: PathCheck | None = None, or_query: bool = False
) -> Callable[[Request], Awaitable[ModelT]]:
    """A dependency that gives the body as `model`; JSON, urlencoded and multipart alike, see `awan.kit.forms`.

    `path_check` is called when the body is about to be refused as invalid: a NotFound it raises comes first (and a
    ValueError, for a malformed id, counts as one).
    `or_query=True` takes fields from the query string too, each from one place.
    Raises: BadRequest 400, PayloadTooLarge 413, UnsupportedMediaType 415, Invalid 422.
    """

    async def read_body(request: Request) -> ModelT:
        try:
            given = forms.parse_body(
                request.headers.get("content-type", ""), await _body_bytes(request)
            )
            if or_query:
                given = _merged(given, forms.parse_query(request.scope["query_string"]))
            built, request.state.parsed_body = forms.build(model, given)
        except Invalid:
            await _check_path(request, path_check)
            raise
        return built

    _SPECS[read_body] = InputSpec(model, in_body=True, in_query=or_query)
    return read_body


def query_of(
    model: type[ModelT], *, path_check: PathCheck | None = None
) -> Callable[[Request], Awaitable[ModelT]]:
    """A dependency that gives the query parameters as `model`, by the rules of forms.

    Raises: BadRequest 400 (not UTF-8), Invalid 422.
    """

    async def read_query(request: Request) -> ModelT:
        try:
            built, _ = forms.build(model, forms.parse_query(request.scope["query_string"]))
        except Invalid:
            await _check_path(request, path_check)
            raise
        return built

    _SPECS[read_query] = InputSpec(model, in_body=False, in_query=True)
    return read_query


def refuse_unknown_query(request: Request) -> None:
    """Refuses query parameters that the route does not have. Routes with `query_of` or `or_query` judge their own.

    Raises: Invalid naming them.
    """
    if not request.scope["query_string"]:
        return
    facts = route_facts(request.app).get(request.scope["endpoint"])
    if facts is None or facts.reads_query:
        return
    unknown = sorted(set(request.query_params) - facts.query_names)
    if unknown:
        known = sorted(facts.query_names)
        raise Invalid(
            {
                forms.shown(name): [forms.unknown_field(name, known, "query parameter")]
                for name in unknown[: forms.UNKNOWN_NAMED_MAX]
            }
        )


@dataclass(frozen=True)
class RouteFacts:
    """What is known of a route without calling it."""

    path: str
    methods: frozenset[str]
    body: InputSpec | None
    query: InputSpec | None
    query_names: frozenset[str]
    dependencies: frozenset[Any]

    @property
    def reads_query(self) -> bool:
        """Whether a dependency of the route judges the whole query string."""
        return self.query is not None


def route_facts(app: FastAPI) -> dict[Any, RouteFacts]:
    """Every API route of the application by its endpoint, computed once, after the last router was included."""
    facts: dict[Any, RouteFacts] | None = getattr(app.state, "route_facts", None)
    if facts is None:
        facts = {}
        for context in api_routes(app):
            built = _facts_of(context)
            earlier = facts.get(context.endpoint)
            facts[context.endpoint] = (
                replace(built, methods=built.methods | earlier.methods) if earlier else built
            )
        app.state.route_facts = facts
    return facts


def api_routes(app: FastAPI) -> Iterator[RouteContext]:
    """The application's API routes, those of included routers with their whole path."""
    for context in iter_route_contexts(app.routes):
        if isinstance(context.original_route, APIRoute):
            yield context


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """The methods that some route has for this path, sorted. Where GET is, HEAD is too, except for streams."""
    methods = {method for context in _routes_at(app, path) for method in context.methods or ()}
    if "GET" in methods and not is_stream(app, path):
        methods.add("HEAD")
    return sorted(methods)


def is_stream(app: FastAPI, path: str) -> bool:
    """Whether the answer at this path has no end of its own."""
    return any(
        getattr(context.response_class, "media_type", None) == EVENT_STREAM_TYPE
        for context in _routes_at(app, path)
        if isinstance(context.original_route, APIRoute)
    )


def _routes_at(app: FastAPI, path: str) -> Iterator[RouteContext]:
    for context in iter_route_contexts(app.routes):
        pattern = getattr(context, "path_regex", None)
        if pattern is not None and pattern.match(path):
            yield context


def path_naming_nothing(app: FastAPI, path: str) -> str | None:
    """The path of a route, with an id that nothing has for each that cannot be read; None when it fits no route."""
    parts = path.split("/")
    for context in iter_route_contexts(app.routes):
        template = (context.path or "").split("/")
        if len(template) == len(parts):
            filled = [_filled(*both) for both in zip(template, parts, strict=True)]
            if filled != parts and None not in filled:
                return "/".join(map(str, filled))
    return None


def _filled(template: str, part: str) -> str | None:
    parameter = re.fullmatch(r"\{\w+(?::(\w+))?\}", template)
    if parameter is None or not part:
        return part if part == template else None
    kind = parameter[1]
    if kind not in NAMES_NOTHING or re.fullmatch(CONVERTOR_TYPES[kind].regex, part):
        return part
    return NAMES_NOTHING[kind]


def _facts_of(context: RouteContext) -> RouteFacts:
    specs: list[InputSpec] = []
    names: set[str] = set()
    calls: set[Any] = set()

    def walk(dependant: Dependant) -> None:
        calls.add(dependant.call)
        names.update(parameter.alias for parameter in dependant.query_params)
        if dependant.call in _SPECS:
            specs.append(_SPECS[dependant.call])
        for inner in dependant.dependencies:
            walk(inner)

    walk(context.dependant)
    assert context.path_format is not None
    return RouteFacts(
        path=context.path_format,
        methods=frozenset(context.methods or ()),
        body=next((spec for spec in specs if spec.in_body), None),
        query=next((spec for spec in specs if spec.in_query), None),
        query_names=frozenset(names),
        dependencies=frozenset(calls),
    )


async def _body_bytes(request: Request) -> bytes:
    """The body as `BodyMiddleware` read it. Raises: what was wrong with it."""
    refused: Refused | None = request.scope.get(BODY_REFUSED)
    if refused is not None:
        raise refused
    if forms.media_type_of(request.headers.get("content-type", "")) == STREAM_TYPE:
        raise UnsupportedMediaType(f"The body must be one of {', '.join(forms.MEDIA_TYPES)}.")
    return await request.body()


def _merged(body: forms.Values, query: forms.Values) -> forms.Values:
    twice = sorted(set(body) & set(query))
    if twice:
        raise Invalid({name: ["Give it in the body or in the query, not both."] for name in twice})
    return {**body, **query}


async def _check_path(request: Request, check: PathCheck | None) -> None:
    if check is None:
        return
    try:
        await run_in_threadpool(check, request)
    except ValueError as err:  # an id that cannot be read names nothing
        raise no_such_route(request) from err
