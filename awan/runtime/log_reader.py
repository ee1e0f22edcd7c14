"""Reads the log files of the processes back: merged by time, filtered, followed over rotation."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLLOW_INTERVAL_S = 0.2
# Own lines of PostgreSQL (`2026-11-24 08:11:17.150 UTC [12282] ...`) and supervisord (`2026-11-24 08:11:17,150 INFO`).
_TEXT_TIME = re.compile(r"^(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)[.,](\d{3})(?: UTC)? ?")
# The keys under which a line names the operation it belongs to.
OPERATION_KEYS = ("operation", "operation_id", "workflow", "workflow_id")


@dataclass(frozen=True)
class LogLine:
    """One line: when (ISO 8601, empty if it does not say), whose, and the rest."""

    at: str
    process: str
    level: str
    message: str
    fields: dict[str, Any] = field(default_factory=dict)

    def belongs_to(self, operation: str) -> bool:
        """Whether the line names this operation (or a workflow derived from it)."""
        named = [str(self.fields.get(key, "")) for key in OPERATION_KEYS]
        return any(name.startswith(operation) for name in named) or operation in self.message


def parse_line(process: str, text: str) -> LogLine:
    """A line of `<process>.log`: JSON as our processes write it, or text as others do."""
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if isinstance(values, dict):
            return LogLine(
                at=str(values.pop("at", "")),
                process=str(values.pop("process", process)),
                level=str(values.pop("level", "info")),
                message=str(values.pop("message", "")),
                fields=values,
            )
    found = _TEXT_TIME.match(text)
    at = f"{found[1]}T{found[2]}.{found[3]}Z" if found else ""
    if found and process == "supervisord":
        # supervisord writes local time.
        local = datetime.fromisoformat(f"{found[1]}T{found[2]}.{found[3]}").astimezone(UTC)
        at = local.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    rest = text[found.end() :] if found else text
    upper = rest[:200].upper()
    level = (
        "error" if any(word in upper for word in ("ERROR", "FATAL", "PANIC", "CRIT")) else "info"
    )
    return LogLine(at=at, process=process, level=level, message=rest)


def log_files(log_dir: Path, names: list[str]) -> list[Path]:
    """The present log files of these processes (of all, when empty), without rotated ones."""
    return sorted(path for path in log_dir.glob("*.log") if not names or path.stem in names)


def read_lines(log_dir: Path, names: list[str], *, with_rotated: bool = False) -> list[LogLine]:
    """All lines in the order of their times; a line without a time stays behind the one before it."""
    lines: list[LogLine] = []
    for path in log_files(log_dir, names):
        rotated = path.parent.glob(f"{path.name}.*") if with_rotated else []
        oldest_first = sorted(rotated, key=lambda file: int(file.suffix[1:]), reverse=True)
        at = ""
        for file in [*oldest_first, path]:
            for text in file.read_text(errors="replace").splitlines():
                line = parse_line(path.stem, text)
                at = line.at or at
                lines.append(LogLine(at, line.process, line.level, line.message, line.fields))
    return sorted(lines, key=lambda line: line.at)


def follow_lines(log_dir: Path, names: list[str]) -> Iterator[LogLine]:
    """New lines as they come, for ever; files that appear or are rotated are followed too."""
    offsets = {
        path: (path.stat().st_ino, path.stat().st_size) for path in log_files(log_dir, names)
    }
    while True:
        for path in log_files(log_dir, names):
            inode, offset = offsets.get(path, (0, 0))
            try:
                with path.open("rb") as file:
                    found = path.stat()
                    if found.st_ino != inode or found.st_size < offset:
                        offset = 0
                    file.seek(offset)
                    data = file.read()
            except FileNotFoundError:
                continue  # between two steps of a rotation
            whole = data[: data.rfind(b"\n") + 1]
            offsets[path] = (found.st_ino, offset + len(whole))
            for text in whole.decode(errors="replace").splitlines():
                yield parse_line(path.stem, text)
        time.sleep(FOLLOW_INTERVAL_S)
