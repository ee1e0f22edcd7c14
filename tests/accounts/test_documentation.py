"""The OpenAPI document tells what the routes do; the pages and the health check answer without a key."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from awan import apidocs
from awan.kit.forms import MEDIA_TYPES
from awan.kit.web_assets import WebAssets
from tests.support.probe_app import make_probe_app


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Every operation with its path and method."""
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def references(value: Any) -> set[str]:
    """Every `$ref` in a document."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(inner) for inner in value.values()))
    if isinstance(value, list):
        return set().union(*(references(inner) for inner in value))
    return set()


def test_document_of_all_routes(api: TestClient) -> None:
    answer = api.get("http://api.test/openapi.json")
    document = answer.json()
    assert document["components"]["securitySchemes"]["ApiKeyAuth"]["name"] == "x-apikey"
    for reference in references(document):
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    for path, method, operation in operations(document):
        if path == "/health":
            continue
        name = operation["operationId"]
        assert operation["security"] == [{"ApiKeyAuth": []}], name
        assert {"401", "403", "422", "429", "500", "503"} <= set(operation["responses"]), name
        assert operation.get("description"), name
        if path.startswith("/api/v1/admin"):
            assert operation["tags"] == ["Operator"], name
        headers = {parameter["name"] for parameter in operation.get("parameters", [])}
        assert ("Idempotency-Key" in headers) == (method != "get"), name
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_bodies_and_queries_are_described() -> None:
    document = apidocs.build_openapi(make_probe_app())
    body = document["paths"]["/api/v1/everything"]["post"]["requestBody"]
    assert set(body["content"]) == set(MEDIA_TYPES)
    assert body["required"] is True
    assert document["components"]["schemas"]["Everything"]["additionalProperties"] is False
    parameters = document["paths"]["/api/v1/search"]["get"]["parameters"]
    assert [(one["name"], one["required"], one["schema"]) for one in parameters] == [
        ("page", False, {"default": 1, "minimum": 1, "type": "integer"}),
        ("search", False, {"type": "string"}),
        ("flag", False, {"type": "boolean"}),
    ]
    deletion = document["paths"]["/api/v1/instances/{uuid}"]["delete"]
    assert deletion["requestBody"]["required"] is False
    assert {"remove_ip", "Idempotency-Key"} <= {one["name"] for one in deletion["parameters"]}
    assert "requestBody" not in document["paths"]["/api/v1/start"]["post"]


def test_pages(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = api.get("http://api.test/docs")
    assert answer.status_code == 200
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert api.get("http://api.test/docs/page.js").status_code == 200
    for name in ("nothing.js", "lock.sha256", "..%2fbuild.py"):
        assert api.get(f"http://api.test/docs/assets/{name}").status_code == 404
    monkeypatch.setattr(WebAssets, "is_built", lambda _: False)
    assert "python -m awan.apidocs" in api.get("http://api.test/docs").text


def test_health(api: TestClient) -> None:
    answer = api.get("http://api.test/health")
    assert answer.status_code == 200
    assert answer.json()["data"]["status"] == "degraded"
    assert answer.json()["data"]["workers"] == []
