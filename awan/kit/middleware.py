"""What surrounds every call: request id, access log, headers, the body's limits, and the answer to every error.

`install(app)` puts it all in place. Order, from outside: `RequestContextMiddleware` (id, log, headers, 500),
`HeadMiddleware`, `BodyMiddleware` (reads the body, `_method`), then the error handlers and the routes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast
from uuid import uuid4

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import Histogram
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from awan.errors import (
    AwanError,
    BadRequest,
    EngineError,
    Invalid,
    MethodNotAllowed,
    NoCapacity,
    NotFound,
    PayloadTooLarge,
    Refused,
    Unavailable,
)
from awan.kit import forms
from awan.kit.database import LOST_STATES, is_connection_error, is_deadlock, sqlstate_of
from awan.kit.http import (
    ASKED_PATH,
    BODY_REFUSED,
    STREAM_TYPE,
    allowed_methods,
    asked_path,
    error_answer,
    is_stream,
    no_such_route,
    path_naming_nothing,
    route_facts,
)
from awan.settings import get_settings

log = structlog.get_logger("awan.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
REQUESTS = Histogram(
    "awan_http_request_duration_seconds",
    "Calls of the API by route, method and status, and how long they took.",
    ("route", "method", "status"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BODY_TIMEOUT_S = 30.0
# A body over the limit is read on and dropped up to this many times the limit, so that the client sees the answer.
DRAIN_FACTOR = 8
OVERRIDES = frozenset({"PUT", "PATCH", "DELETE"})
# Another one was in the way, or too many connections: a retry may succeed.
RETRYABLE_SQLSTATES = LOST_STATES | {"53300"}

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
STRICT_TRANSPORT = "max-age=31536000"


def install(app: FastAPI) -> None:
    """Adds error handlers and middleware to the application. Call it once, before the first request."""
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.router.default = _unmatched(app)
    # Starlette runs the last one added first.
    app.add_middleware(BodyMiddleware)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RequestContextMiddleware)


def _unmatched(app: FastAPI) -> ASGIApp:
    """What serves the calls that no route takes. An id that cannot be read is answered as one that nothing has."""
    not_found = app.router.default

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ASKED_PATH not in scope:
            path = path_naming_nothing(app, scope["path"])
            if path is not None:
                scope[ASKED_PATH], scope["path"] = scope["path"], path
                await app.router(scope, receive, send)
                return
        await not_found(scope, receive, send)

    return serve


class RequestContextMiddleware:
    """Gives each call its id, its headers and one log line, and turns a bug into 500 without detail."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call. The id is the client's `x-request-id` when that is sane, else a fresh one."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        request_id = wanted if REQUEST_ID.fullmatch(wanted) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        call = _Call(scope, send, request_id)
        try:
            await self.app(scope, receive, call.send)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("request.failed", method=scope["method"], route=_route(scope))
            if call.status is not None:
                raise  # the answer has begun: only closing the connection says that it is not whole
            await error_answer(_Internal("Something went wrong on our side."))(
                scope, receive, call.send
            )
        finally:
            call.write_access_line()


class _Internal(Refused):
    status = 500
    type = "INTERNAL"


class _Call:
    """One call on its way: its status and time, and the headers its answer gets."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.scope = scope
        self.request_id = request_id
        self.status: int | None = None
        self._send = send
        # `_method` may change it on the way in.
        self._method = scope["method"]
        self._started_at = time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if self.scope.get("scheme") == "https":
                headers.setdefault("strict-transport-security", STRICT_TRANSPORT)
        await self._send(message)

    def write_access_line(self) -> None:
        duration_s = time.perf_counter() - self._started_at
        route = _route(self.scope)
        log.info(
            "request",
            method=self._method,
            route=route,
            path=asked_path(self.scope),
            status=self.status,
            duration_ms=round(duration_s * 1000, 1),
        )
        if route is not None:
            # Only of routes there are: the label must not take whatever a client writes.
            REQUESTS.labels(route, self.scope["method"], self.status).observe(duration_s)


def _route(scope: Scope) -> str | None:
    """The path of the route that served the call, with its parameters' names; None when there was none."""
    if "endpoint" not in scope or "app" not in scope:
        return None
    facts = route_facts(scope["app"]).get(scope["endpoint"])
    return facts.path if facts else None


class HeadMiddleware:
    """Serves HEAD as GET without the body (RFC 9110 9.1, 9.3.2). A stream has no HEAD: its head would never end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call."""
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        if not is_head or is_stream(scope["app"], scope["path"]):
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            # The server writes by the method, and shares the scope.
            scope["method"] = "HEAD"
            if message["type"] == "http.response.start":
                await send(message)
            elif not message.get("more_body", False):
                await send({"type": "http.response.body", "body": b""})

        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_head)
        finally:
            scope["method"] = "HEAD"


class BodyMiddleware:
    """Reads the whole body within its limits before the application runs, and applies `_method`.

    What is wrong with the body is kept for the route that wants it, so that an unknown key is still told 401 first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call. Bodies of `STREAM_TYPE` are left to their route."""
        content_type = Headers(scope=scope).get("content-type", "") if "headers" in scope else ""
        if (
            scope["type"] != "http"
            or scope["method"] in {"GET", "HEAD", "OPTIONS"}
            or forms.media_type_of(content_type) == STREAM_TYPE
        ):
            await self.app(scope, receive, send)
            return
        body = b""
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read(receive, get_settings().request_body_max_bytes)
            if scope["method"] == "POST" and b"_method" in body:
                scope["method"] = _overridden(content_type, body)
        except ClientDisconnect:
            return
        except TimeoutError:
            scope[BODY_REFUSED] = BadRequest(
                f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s."
            )
        except Refused as refused:
            scope[BODY_REFUSED] = refused

        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


async def _read(receive: Receive, most: int) -> bytes:
    """The body. Raises: PayloadTooLarge above `most` bytes, however it was announced; ClientDisconnect."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
        else:
            chunks.clear()
        if not message.get("more_body", False) or size > most * DRAIN_FACTOR:
            break
    if size > most:
        raise PayloadTooLarge(f"The body is larger than {most} bytes.")
    return b"".join(chunks)


def _overridden(content_type: str, body: bytes) -> str:
    """The method that a POST stands for. Raises: Invalid when `_method` names another than a changing one."""
    try:
        values = forms.parse_body(content_type, body)
    except Refused:
        return "POST"  # the route parses it again and says what is wrong
    if "_method" not in values:
        return "POST"
    given = values["_method"]
    texts = given.texts if isinstance(given, forms.FormNode) else [given]
    method = texts[0].upper() if len(texts) == 1 and isinstance(texts[0], str) else ""
    if method not in OVERRIDES | {"POST"}:
        raise Invalid.field("_method", "The _method must be PUT, PATCH or DELETE.")
    return method


# --- errors ---


def _on_refused(request: Request, err: AwanError) -> Response:
    refused = cast(Refused, err)
    if isinstance(refused, NoCapacity):
        log.warning("request.no_capacity", detail=refused.detail)
    return error_answer(refused)


def _on_engine_error(request: Request, err: EngineError) -> Response:
    log.error("request.engine_error", engine=err.engine, call=err.call, words=err.words)
    refused = Refused("An engine of the cloud failed. Please try again later.")
    refused.status, refused.type = 502, "ENGINE_ERROR"
    return error_answer(refused)


def _on_validation_error(request: Request, err: RequestValidationError) -> Response:
    """FastAPI's own parameters. A malformed id in the path names nothing: 404."""
    details = [{**detail, "loc": detail["loc"][1:]} for detail in err.errors()]
    if any(detail["loc"][:1] == ("path",) for detail in err.errors()):
        return error_answer(no_such_route(request))
    return error_answer(Invalid(forms.field_errors(cast(Any, details))))


def _no_route(request: Request) -> NotFound:
    path = request.url.path
    refused = no_such_route(request)
    if path.endswith("/") and allowed_methods(request.app, path.rstrip("/")):
        return NotFound(f"{refused.message} (there is one without the slash at its end)")
    return refused


def _on_http_exception(request: Request, err: HTTPException) -> Response:
    """What Starlette raises itself: no such route, no such method, unreadable requests."""
    if err.status_code == 404:
        return error_answer(_no_route(request))
    if err.status_code == 405:
        methods = allowed_methods(request.app, request.url.path)
        response = error_answer(
            MethodNotAllowed(f"{request.method} is not possible here, only {', '.join(methods)}.")
        )
        response.headers["allow"] = ", ".join(methods)
        return response
    refused = BadRequest(str(err.detail)) if err.status_code < 500 else _Internal("Internal error.")
    refused.status = err.status_code
    return error_answer(refused)


def _on_database_error(request: Request, err: DBAPIError) -> Response:
    """An unreachable or overloaded database passes; any other of its errors is a bug."""
    state = sqlstate_of(err)
    if not is_connection_error(err) and state not in RETRYABLE_SQLSTATES:
        raise err
    log.warning("request.database_unavailable", sqlstate=state, detail=str(err.orig))
    if is_deadlock(err):
        return error_answer(Unavailable("Another change got in the way. Please try again."))
    return error_answer(Unavailable("The database is not available at the moment."))


def _on_pool_timeout(request: Request, err: PoolTimeoutError) -> Response:
    log.warning("request.database_pool_exhausted")
    return error_answer(Unavailable("Too many calls at once. Please try again."))


Handler = Callable[[Request, Any], Response | Awaitable[Response]]
HANDLERS: dict[type[Exception], Handler] = {
    Refused: _on_refused,
    EngineError: _on_engine_error,
    RequestValidationError: _on_validation_error,
    HTTPException: _on_http_exception,
    DBAPIError: _on_database_error,
    PoolTimeoutError: _on_pool_timeout,
}
