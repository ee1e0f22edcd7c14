"""The OpenAPI document: what FastAPI knows, completed by what our own dependencies read and refuse.

FastAPI does not see bodies and queries that `form_body` and `query_of` read, nor the refusals that every route can
give; both are added here from the routes themselves, so that no route has to repeat them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from awan import errors
from awan.kit import forms
from awan.kit.http import CHALLENGE, EmptyForm, ErrorAnswer, InputSpec, RouteFacts, route_facts

Document = dict[str, Any]

DESCRIPTION = """
Instances, networks and exact billing behind one HTTP API.

**Key.** Send it in the header `x-apikey`. **Bodies** are JSON, urlencoded or multipart alike: in forms, arrays are
written `k[]`, `k[0]` or as a repeated `k`, booleans true/false/1/0/on/off, numbers in digits; an empty string is null.
Unknown fields and unknown query parameters are refused. In a POST, `_method=PUT`, `PATCH` or `DELETE` stands for that
verb.

**Answers** are `{message, data}`. A change that takes time has its `operation` beside them, and its id in the header
`x-operation-id`: follow it at `GET /operations/{uuid}`. **Errors** are `{type, message}`, with `errors` per field when
the input was wrong. Each answer has an `x-request-id`: quote it when you ask for help.

**Repeats.** With an `Idempotency-Key` a changing call can be sent again safely for 24 hours: it has one effect. The
repeat has the same status and ids and shows the thing as it is then; of one that is gone meanwhile it shows what is
still known of it, at the least its id. A secret, such as the text of a new API key or a console's ticket, is not shown
again. After a `202`, the repeat of a call that waits for its operation tells how that ended. **Rates** are limited per
key and minute; `429` says when to go on.
""".strip()

REFUSALS: tuple[tuple[str, type[errors.Refused]], ...] = (
    ("BadRequest", errors.BadRequest),
    ("Unauthenticated", errors.Unauthenticated),
    ("Forbidden", errors.Forbidden),
    ("NotFound", errors.NotFound),
    ("Conflict", errors.Conflict),
    ("PayloadTooLarge", errors.PayloadTooLarge),
    ("UnsupportedMediaType", errors.UnsupportedMediaType),
    ("Invalid", errors.Invalid),
    ("RateLimited", errors.RateLimited),
    ("Unavailable", errors.Unavailable),
)
DESCRIPTIONS = {
    400: "The request cannot be parsed.",
    401: "The API key is missing or not valid: it goes into the header x-apikey.",
    403: "The key's scope, the account's state or a quota does not allow it.",
    404: "Absent, or not yours.",
    409: "The present state does not allow it, or the Idempotency-Key stands for another call.",
    413: "The body is too large.",
    415: "The body is neither JSON nor a form.",
    422: "A field is wrong: see `errors`.",
    429: "The key's calls per minute are used up.",
    500: "A fault of ours.",
    502: "An engine of the cloud failed.",
    503: "The database, an engine or capacity is not available at the moment.",
}
NAMES = {refused.status: name for name, refused in REFUSALS} | {500: "Internal", 502: "EngineError"}
WAITING = {409, 429, 503}
BODY_REFUSALS = {400, 413, 415, 422}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Makes repeating this call safe for 24 hours.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}
REQUEST_ID = {"description": "Names this call in our log.", "schema": {"type": "string"}}
OPERATION_ID = {
    "description": "The operation that carries the change out.",
    "schema": {"type": "string", "format": "uuid"},
}
REF = "#/components/schemas/{model}"


def build_openapi(app: FastAPI) -> Document:
    """The document of all routes of the application. Computed anew at each call."""
    document = get_openapi(
        title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes
    )
    schemas: Document = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    facts = list(route_facts(app).values())
    inputs = _input_schemas(facts, schemas)
    _add_errors(document, schemas)
    for fact in facts:
        for method, operation in document["paths"].get(fact.path, {}).items():
            if method.upper() in fact.methods:
                _complete(operation, method.upper(), fact, inputs)
    _leave_items(document)
    _check_operation_ids(document)
    return document


def _leave_items(document: Document) -> None:
    """An answer whose items are described is not described as one text besides."""
    for operations in document["paths"].values():
        for operation in operations.values():
            for answer in operation["responses"].values():
                for content in answer.get("content", {}).values():
                    if "itemSchema" in content:
                        content.pop("schema", None)


def _input_schemas(
    facts: Iterable[RouteFacts], schemas: Document
) -> dict[type[BaseModel], Document]:
    """The schema of every input model; what they refer to becomes a component."""
    models = {spec.model for fact in facts for spec in _specs(fact)}
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (model, "validation") for model in sorted(models, key=lambda model: model.__name__)
    ]
    by_model, shared = models_json_schema(wanted, ref_template=REF)
    definitions: Document = shared.get("$defs", {})
    for name, schema in definitions.items():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        known: Document = schemas.setdefault(name, schema) or {}
        if known is not schema and _core(known) != _core(schema):
            raise ValueError(f"an input and an output differ and are both called {name}")
    return {model: _resolved(by_model[model, "validation"], definitions) for model, _ in wanted}


def _core(schema: Document) -> Document:
    return {key: value for key, value in schema.items() if key != "additionalProperties"}


def _resolved(schema: Document, definitions: Document) -> Document:
    reference = schema.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else schema


def _specs(fact: RouteFacts) -> Iterator[InputSpec]:
    for spec in (fact.body, fact.query):
        if spec is not None:
            yield spec


def _complete(
    operation: Document, method: str, fact: RouteFacts, inputs: dict[type[BaseModel], Document]
) -> None:
    """Adds body, parameters and refusals to one operation."""
    is_open = "security" not in operation
    is_change = method not in {"GET", "HEAD"}
    parameters = operation.setdefault("parameters", [])
    if fact.query is not None:
        parameters += _query_parameters(inputs[fact.query.model], are_optional=fact.query.in_body)
    if is_change and not is_open:
        parameters.append(IDEMPOTENCY_KEY)
    if not parameters:
        del operation["parameters"]
    if fact.body is not None and fact.body.model is not EmptyForm:
        operation["requestBody"] = _request_body(fact.body, inputs[fact.body.model])
    statuses = set() if is_open else {401, 403, 422, 429}
    statuses |= {500, 503}
    if "{" in fact.path or fact.path.startswith("/api/v1/admin/"):
        statuses.add(404)
    if fact.query is not None:
        statuses.add(400)
    if fact.body is not None:
        statuses |= BODY_REFUSALS
    if is_change and not is_open:
        statuses |= {409, 502}
    _add_responses(operation, statuses, is_change=is_change)


def _request_body(spec: InputSpec, schema: Document) -> Document:
    reference = {"$ref": REF.format(model=_component_name(spec.model))}
    return {
        "required": bool(schema.get("required")) and not spec.in_query,
        "content": {media_type: {"schema": reference} for media_type in forms.MEDIA_TYPES},
    }


def _component_name(model: type[BaseModel]) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", model.__name__)


def _query_parameters(schema: Document, *, are_optional: bool) -> Iterator[Document]:
    for name, field in schema.get("properties", {}).items():
        shape = {key: value for key, value in field.items() if key not in {"title", "description"}}
        alternatives = [one for one in shape.get("anyOf", []) if one.get("type") != "null"]
        if len(alternatives) == 1:
            shape = {
                **{k: v for k, v in shape.items() if k not in {"anyOf", "default"}},
                **alternatives[0],
            }
        parameter = {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", []) and not are_optional,
            "schema": shape,
        }
        if "description" in field:
            parameter["description"] = field["description"]
        yield parameter


def _add_responses(operation: Document, statuses: set[int], *, is_change: bool) -> None:
    responses: Document = operation["responses"]
    for code, response in responses.items():
        if not code.startswith("2"):
            continue
        headers = response.setdefault("headers", {})
        headers["x-request-id"] = REQUEST_ID
        if is_change:
            headers["x-operation-id"] = OPERATION_ID
    if "422" in responses:  # FastAPI's own shape
        del responses["422"]
    for status in sorted(statuses):
        responses.setdefault(str(status), {"$ref": f"#/components/responses/{NAMES[status]}"})


def _add_errors(document: Document, schemas: Document) -> None:
    """The error shape, and one shared response per status."""
    schemas["Error"] = {
        **ErrorAnswer.model_json_schema(),
        "title": "Error",
        "properties": {
            "type": {"type": "string", "enum": _error_types()},
            "message": {"type": "string"},
            "errors": {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"type": "string"}},
            },
        },
        "additionalProperties": False,
    }
    responses = document["components"].setdefault("responses", {})
    for status, name in NAMES.items():
        headers: Document = {"x-request-id": REQUEST_ID}
        if status in WAITING:
            headers["Retry-After"] = {
                "description": "Seconds after which a repeat may succeed.",
                "schema": {"type": "integer"},
            }
        if status == 401:
            headers["WWW-Authenticate"] = {
                "description": f"`{CHALLENGE}`",
                "schema": {"type": "string"},
            }
        responses[name] = {
            "description": DESCRIPTIONS[status],
            "headers": headers,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }


def _error_types() -> list[str]:
    def walk(kind: type[errors.Refused]) -> Iterator[str]:
        yield kind.type
        for inner in kind.__subclasses__():
            if inner.__module__ == errors.__name__:
                yield from walk(inner)

    return sorted({*walk(errors.Refused), "ENGINE_ERROR", "INTERNAL"})


def _check_operation_ids(document: Document) -> None:
    seen: set[str] = set()
    for path in document["paths"].values():
        for operation in path.values():
            name = operation["operationId"]
            if name in seen:
                raise ValueError(f"two routes are called {name}")
            seen.add(name)
