"""Around the routes: ids, headers, limits of bodies, methods, errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import structlog
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from awan.kit.database import dispose_engine
from tests.support.changed_settings import changed_settings
from tests.support.tenants import make_tenant

GOOD = {"name": "n", "count": "1"}


def shape(answer: Any) -> tuple[int, str]:
    """Status and type of an error, after a look at its shape."""
    body = answer.json()
    assert set(body) <= {"type", "message", "errors"}
    assert isinstance(body["message"], str)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return answer.status_code, body["type"]


def test_request_id(probe: TestClient) -> None:
    for given in ("abc-1.2_X", "x" * 64):
        answer = probe.get("/nowhere", headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given
    for bad in ("", "a b", "x" * 65, "ä", "a\tb"):
        answer = probe.get("/nowhere", headers={"x-request-id": bad.encode("latin-1")})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_security_headers(probe: TestClient) -> None:
    headers = probe.post("/everything", data=GOOD).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "access-control-allow-origin" not in headers
    assert headers["cache-control"] == "no-store"


def test_unknown_routes_and_methods(probe: TestClient) -> None:
    assert shape(probe.get("/nowhere")) == (404, "NOT_FOUND")
    unknown = probe.get("/nowhere").json()["message"]
    assert unknown == "There is no such route: GET /api/v1/nowhere"
    answer = probe.get("/search/")
    assert shape(answer) == (404, "NOT_FOUND")
    assert "without the slash" in answer.json()["message"]
    assert "without" not in probe.get("/nowhere/").json()["message"]
    answer = probe.get("/%3Cscript%3E%0A%C3%A9" + "x" * 200)
    assert answer.json()["message"] == f"There is no such route: GET /api/v1/?script???{'x' * 82}"
    answer = probe.get("/everything")
    assert shape(answer) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "POST, PUT"


def test_head_is_get_without_the_body(probe: TestClient) -> None:
    tenant = make_tenant()
    for path, status in (("/who", 200), ("/who?x=1", 422), ("/nowhere", 404), ("/fail/bug", 500)):
        answers = [
            probe.request(method, path, headers=tenant.headers) for method in ("GET", "HEAD")
        ]
        assert [answer.status_code for answer in answers] == [status, status]
        assert answers[1].content == b""
        lengths = [answer.headers["content-length"] for answer in answers]
        assert path == "/nowhere" or lengths[0] == lengths[1], "its words name the method"
    assert probe.head("/who").status_code == 401
    answer = probe.head("/everything")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST, PUT")
    assert probe.post("/who").headers["allow"] == "GET, HEAD"
    with capture_logs() as entries:
        probe.head("/who", headers=tenant.headers)
    assert entries[0]["method"] == "HEAD"


def test_path_ids(probe: TestClient) -> None:
    assert probe.get("/things/12").json()["data"] == 12
    for bad in ("0", "-1", "+1", "1.0", "x", "٣", str(2**63), "9" * 100, "1_0"):
        answer = probe.get(f"/things/{bad}")
        assert shape(answer) == (404, "NOT_FOUND")
        assert answer.json()["message"] == "Thing not found."


def test_ids_that_cannot_be_read_are_answered_as_unknown_ones(probe: TestClient) -> None:
    headers = make_tenant().headers
    flags = {"remove_ip": "1", "remove_block_storage": "1"}
    for flags_given in (flags, {}):
        for key in (headers, {}):
            answers = [
                probe.request("DELETE", f"/instances/{bad}", headers=key, data=flags_given)
                for bad in (str(uuid4()), "no-uuid", "%00", "x" * 500)
            ]
            expected = (404, "Instance not found.") if key else (401, answers[0].json()["message"])
            for answer in answers:
                assert (answer.status_code, answer.json()["message"]) == expected
    with capture_logs() as entries:
        probe.delete("/instances/no-uuid", headers=headers)
    assert entries[-1]["path"] == "/api/v1/instances/no-uuid"
    assert entries[-1]["route"] == "/api/v1/instances/{uuid}"


def test_operation_in_body_and_header(probe: TestClient) -> None:
    answer = probe.post("/start")
    assert answer.json()["operation"]["uuid"] == answer.headers["x-operation-id"]
    assert answer.json()["data"] is None
    assert shape(probe.post("/start", json={"x": 1})) == (422, "VALIDATION_ERROR")
    assert probe.post("/start", json={}).status_code == 200


def test_query(probe: TestClient) -> None:
    answer = probe.get("/search?page=2&search=&flag=on")
    assert answer.json()["data"] == {"page": 2, "search": None, "flag": True}
    for bad in ("page=0", "page=%2B1", "page=1&page=2", "other=1", "flag=maybe"):
        assert shape(probe.get(f"/search?{bad}")) == (422, "VALIDATION_ERROR"), bad
    assert shape(probe.get("/search?search=%ff")) == (400, "BAD_REQUEST")
    assert shape(probe.get("/search?search=%00")) == (422, "VALIDATION_ERROR")


def test_unknown_query_on_a_route_without_any(probe: TestClient) -> None:
    tenant = make_tenant()
    answer = probe.get("/who?x=1", headers=tenant.headers)
    assert shape(answer) == (422, "VALIDATION_ERROR")
    assert list(answer.json()["errors"]) == ["x"]
    assert shape(probe.get("/who?x=1")) == (401, "UNAUTHENTICATED")


@pytest.fixture
def small_bodies(probe: TestClient) -> Iterator[None]:
    """Bodies of at most 100 bytes."""
    with changed_settings(request_body_max_bytes="100"):
        yield


@pytest.mark.usefixtures("small_bodies")
def test_large_bodies(probe: TestClient) -> None:
    assert probe.post("/everything", data=GOOD).status_code == 200
    for size in (101, 700, 5000):
        assert shape(probe.post("/everything", content=b"x" * size)) == (413, "PAYLOAD_TOO_LARGE")

    def chunks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"x" * 30

    for count in (4, 100):
        assert shape(probe.post("/everything", content=chunks(count))) == (413, "PAYLOAD_TOO_LARGE")
    # The key comes first.
    assert shape(probe.post("/instances", content=b"x" * 200)) == (401, "UNAUTHENTICATED")


@pytest.mark.parametrize("how", ["data", "json", "files"])
def test_method_override(probe: TestClient, how: str) -> None:
    fields: Any = {**GOOD, "_method": "put"}
    if how == "files":
        fields = {name: (None, text) for name, text in fields.items()}
    answer = probe.post("/everything", **{how: fields})
    assert answer.json()["message"] == "Put", answer.text


def test_method_override_only_to_changing_methods(probe: TestClient) -> None:
    assert shape(probe.post("/everything", data={**GOOD, "_method": "GET"})) == (
        422,
        "VALIDATION_ERROR",
    )
    assert shape(probe.post("/everything", data={**GOOD, "_method": "DELETE"})) == (
        405,
        "METHOD_NOT_ALLOWED",
    )
    # Only a POST stands for another verb, and only by a field of the body.
    assert probe.put("/everything", data={**GOOD, "_method": "DELETE"}).json()["message"] == "Put"
    assert probe.post("/everything", data={**GOOD, "title": "_method"}).status_code == 200


def test_bugs_show_nothing(probe: TestClient) -> None:
    with capture_logs() as entries:
        for how in ("bug", "sql"):
            answer = probe.get(f"/fail/{how}")
            assert shape(answer) == (500, "INTERNAL")
            assert "marker" not in answer.text
    assert [entry["event"] for entry in entries] == ["request.failed", "request"] * 2


def test_what_passes_says_when_to_retry(probe: TestClient) -> None:
    answer = probe.get("/fail/timeout")
    assert shape(answer) == (503, "UNAVAILABLE")
    assert int(answer.headers["retry-after"]) > 0
    answer = probe.get("/fail/capacity")
    assert shape(answer) == (503, "NO_CAPACITY")
    assert "node-1" not in answer.text
    answer = probe.get("/fail/engine")
    assert shape(answer) == (502, "ENGINE_ERROR")
    assert "marker" not in answer.text


def test_database_away(probe: TestClient) -> None:
    tenant = make_tenant()
    with changed_settings(database_url="postgresql:///awan?host=/nowhere"):
        dispose_engine()
        answer = probe.get("/who", headers=tenant.headers)
    dispose_engine()
    assert shape(answer) == (503, "UNAVAILABLE")
    assert answer.headers["retry-after"]
    assert probe.get("/who", headers=tenant.headers).status_code == 200


def test_one_access_line_without_secrets(probe: TestClient) -> None:
    tenant = make_tenant()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as entries:
        probe.post(
            "/instances?marker=2",
            headers={**tenant.headers, "x-request-id": "r-1"},
            json={"name": "n", "password": "marker-1"},
        )
        probe.get("/things/5")
    first, second = entries
    assert first["route"] == "/api/v1/instances"
    assert (first["method"], first["status"], first["request_id"]) == ("POST", 422, "r-1")
    assert first["account"] == str(tenant.account_id)
    assert first["key"] in tenant.key
    assert first["duration_ms"] > 0
    assert tenant.key.rpartition("_")[2] not in str(entries)
    assert "marker" not in str(entries)
    assert second["route"] == "/api/v1/things/{thing_id}"
    assert "account" not in second
