"""Log lines: JSON, with their context, without secrets; read back over rotation."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from awan.runtime import log_reader
from awan.runtime.log_reader import LogLine, follow_lines, parse_line, read_lines
from awan.runtime.logs import MASK, configure_logging

MARKER = "planted-marker-8461"


@pytest.fixture
def configured() -> Iterator[None]:
    """Logging as a process has it, and put back afterwards."""
    loggers = [logging.getLogger(name) for name in (None, "dbos", "uvicorn.error")]
    before = [(log, log.handlers[:], log.level, log.propagate) for log in loggers]
    configure_logging("api")
    yield
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    logging.captureWarnings(False)
    for log, handlers, level, propagate in before:
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_own_and_library_lines_have_one_shape(
    capsys: pytest.CaptureFixture[str], configured: None
) -> None:
    configure_logging("api")  # again, now that stderr is captured
    structlog.contextvars.bind_contextvars(request_id="r-1", instance="i-1")
    structlog.get_logger("awan.test").info("made", count=2)
    logging.getLogger("uvicorn.error").warning("port %s", 8080)
    dbos = logging.getLogger("dbos")
    dbos.error("step failed", extra={"operationUUID": "w-1"})
    own, uvicorn, workflow = lines(capsys)
    assert own["message"] == "made"
    assert own["count"] == 2
    assert own["level"] == "info"
    assert own["process"] == "api"
    assert uvicorn["message"] == "port 8080"
    assert workflow["workflow"] == "w-1"
    assert {line["request_id"] for line in (own, uvicorn, workflow)} == {"r-1"}
    assert all(str(line["at"]).endswith("Z") for line in (own, uvicorn, workflow))


def test_secrets_are_masked(capsys: pytest.CaptureFixture[str], configured: None) -> None:
    configure_logging("api")
    log = structlog.get_logger("awan.test")
    log.info("by name", password=MARKER, user_data=MARKER, nested={"x-apikey": MARKER})
    log.info(f"key awan_ab12_{'f' * 64} and postgresql://awan:{MARKER}@db/awan")
    try:
        raise ValueError(
            f"[parameters: {{'secret': '{MARKER}'}}] DETAIL: Failing row contains ({MARKER}, 1)."
        )
    except ValueError:
        log.exception("failed")
    logging.getLogger("sqlalchemy").warning("Failing row contains (1, %s).", MARKER)
    log.info("an id is no secret", secret_id="s-1")
    text = capsys.readouterr().err
    assert MARKER not in text
    assert "f" * 64 not in text
    assert MASK in text
    assert '"secret_id": "s-1"' in text


def test_lines_of_all_kinds_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "api.log.1").write_text(
        '{"message": "older", "at": "2026-11-24T08:00:00.000Z", "operation": "op-1"}\n'
    )
    (tmp_path / "api.log").write_text(
        '{"message": "newer", "at": "2026-11-24T08:00:02.000Z", "level": "error", "process": "api"}\n'
        "a line that is no JSON\n"
    )
    (tmp_path / "postgres.log").write_text(
        "2026-11-24 08:00:01.500 UTC [7] awan@awan x ERROR:  division by zero\n"
    )
    found = read_lines(tmp_path, [], with_rotated=True)
    assert [line.message[:6] for line in found] == ["older", "[7] aw", "newer", "a line"]
    assert [line.level for line in found] == ["info", "error", "error", "info"]
    assert [line for line in found if line.belongs_to("op-1")] == [found[0]]
    assert next(line.message for line in read_lines(tmp_path, ["api"])) == "newer"


def test_following_survives_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "FOLLOW_INTERVAL_S", 0.01)
    log = tmp_path / "api.log"
    log.write_text("before\n")
    following = follow_lines(tmp_path, [])
    steps = iter(["append", "rotate", "more"])

    def write_next() -> None:
        step = next(steps)
        if step == "rotate":
            log.rename(tmp_path / "api.log.1")
        with log.open("a") as file:
            file.write(f"{step}\n")

    monkeypatch.setattr(log_reader.time, "sleep", lambda _: write_next())
    seen = [next(following).message for _ in range(3)]
    assert seen == ["append", "rotate", "more"]


def test_broken_json_is_shown_as_text() -> None:
    assert parse_line("api", '{"half": ') == LogLine("", "api", "info", '{"half": ')
