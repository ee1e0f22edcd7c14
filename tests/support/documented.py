"""Answers against what the API's own description says of them."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import httpx
import jsonschema_rs

from awan.api import create_app


@cache
def _document() -> dict[str, Any]:
    return create_app().openapi()


def assert_documented(answer: httpx.Response) -> None:
    """The answer's body is as the description has it for the call's method and path and the answer's status."""
    method, path = answer.request.method.lower(), answer.request.url.path
    said = [
        operations[method]["responses"]
        for template, operations in _document()["paths"].items()
        if method in operations and _matches(template, path)
    ]
    assert said, f"{method} {path} is not documented"
    schema = said[0][str(answer.status_code)]["content"]["application/json"]["schema"]
    whole = {**schema, "components": _document()["components"]}
    jsonschema_rs.validator_for(whole).validate(answer.json())


def _matches(template: str, path: str) -> bool:
    pattern = "".join(
        "[^/]+" if part.startswith("{") else re.escape(part)
        for part in re.split(r"(\{[^}]+\})", template)
    )
    return re.fullmatch(pattern, path) is not None
