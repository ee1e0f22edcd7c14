"""Logging of our processes: one JSON object a line, with the request, operation and instance it belongs to.

    logger = structlog.get_logger()
    structlog.contextvars.bind_contextvars(request_id=..., instance=...)   # on every line of this context
    logger.info("instance.created", node="node-1")

Everything that logs through the standard library (uvicorn, DBOS, SQLAlchemy) comes out in the same form. What looks
like a secret is masked here as the last line of defence; nobody should log one in the first place.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog
from structlog.typing import Processor

MASK: Final = "[secret]"
_SECRET_NAME = re.compile(
    r"passw|secret|token|api[_-]?key|authorization|cookie|user[_-]?data|private[_-]?key",
    re.IGNORECASE,
)
# Names that hold such a word and are ids, not secrets.
_HARMLESS_NAME = re.compile(r"(_id|_file|_uuid)$")
_SECRET_TEXT: Final = (
    (re.compile(r"\bawan_([A-Za-z0-9]+)_[A-Za-z0-9_-]{20,}"), r"awan_\1_" + MASK),
    # The server's own line for a websocket repeats its address.
    (re.compile(r"([?&#](?:token|password)=)[^&\s\"']+"), rf"\1{MASK}"),
    (re.compile(r"(://[^:/@\s]+):[^@\s]+@"), rf"\1:{MASK}@"),
    (re.compile(r"\$(?:6|y|argon2id?)\$[^\s'\"]+"), MASK),
    # PostgreSQL and SQLAlchemy repeat the values of a row that was refused.
    (re.compile(r"Failing row contains \(.*?\)\.?(?=\s|$)"), f"Failing row contains {MASK}"),
    (re.compile(r"\[parameters: .*?\](?=\s|$)", re.DOTALL), f"[parameters: {MASK}]"),
)
# Libraries that print whole tracebacks for what we handle ourselves, or a line for each call.
QUIET_LOGGERS: Final = {
    "ovsdbapp": logging.CRITICAL,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "alembic": logging.WARNING,
    "asyncio": logging.WARNING,
}


def mask_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A structlog processor: masks values by their name, and texts by what they look like."""
    for name, value in event.items():
        if _SECRET_NAME.search(name) and not _HARMLESS_NAME.search(name):
            event[name] = MASK
        else:
            event[name] = _masked(value)
    return event


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        for pattern, replacement in _SECRET_TEXT:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, dict):
        return mask_secrets(None, "", dict(value))
    if isinstance(value, (list, tuple)):
        return [_masked(item) for item in value]
    return value


def _add_workflow(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """DBOS marks its records with the workflow they belong to; its id is the operation's."""
    record = event.get("_record")
    workflow = getattr(record, "operationUUID", None)
    if workflow:
        event.setdefault("workflow", workflow)
    return event


def configure_logging(process: str, *, level: str = "INFO", is_json: bool = True) -> None:
    """Sets up logging of this process to stderr; calling it again replaces what was set.

    `process` (`api`, `worker`, ...) is on every line. `is_json=False` is for a terminal.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.StackInfoRenderer(),
    ]
    render: list[Processor] = (
        [
            structlog.processors.format_exc_info,
            structlog.processors.UnicodeDecoder(),
            mask_secrets,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(sort_keys=False, default=str, ensure_ascii=False),
        ]
        if is_json
        else [
            structlog.processors.format_exc_info,
            mask_secrets,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                timestamp_key="at",
                # Without the locals of every frame: they are slow to draw, and may hold secrets.
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    )

    def add_process(
        _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(["request_id", "operation"]), *shared],
        processors=[
            _add_workflow,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            add_process,
            *render,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)

    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    # DBOS installs a console handler of its own unless it finds one.
    dbos = logging.getLogger("dbos")
    dbos.handlers[:] = [handler]
    dbos.propagate = False
    for name, lowest in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(lowest)
    logging.captureWarnings(True)

    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
