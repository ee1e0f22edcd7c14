"""Figures of a benchmark, as a table for people."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Row:
    """One figure: what, how much, and what it should be."""

    what: str
    value: str
    goal: str = ""


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest value that at least `p` percent of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)]


def spread(values: Sequence[float], unit: str = "s", digits: int = 2) -> str:
    """Median with minimum and maximum."""
    return (
        f"{percentile(values, 50):.{digits}f} {unit}"
        f" (min {min(values):.{digits}f}, max {max(values):.{digits}f}, n={len(values)})"
    )


def machine() -> str:
    """The machine in one line: CPU, cores, memory, acceleration; load and speed of a core when asked."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    flags = Path("/proc/cpuinfo").read_text()
    acceleration = "KVM possible" if "vmx" in flags or "svm" in flags.split() else "no KVM (TCG)"
    qemu = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
    ).stdout.partition("\n")[0]
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {acceleration};"
        f" {qemu or 'no QEMU'}; load when started {load:.1f}; a million additions of Python {_additions_ms():.0f} ms"
    )


def _additions_ms() -> float:
    """What a core does here and now, the best of five: machines of one name differ by a factor of three."""
    took = []
    for _ in range(5):
        began, total = time.perf_counter(), 0
        for number in range(1_000_000):
            total += number
        took.append(time.perf_counter() - began)
    return 1000 * min(took)


def publish(title: str, command: str, rows: Sequence[Row], *, record: bool) -> None:
    """Prints the table; with `record` it replaces the section of this title in RESULTS.md."""
    head = ("what", "measured", "goal")
    publish_table(
        title, command, head, [(it.what, it.value, it.goal) for it in rows], record=record
    )


def publish_table(
    title: str,
    command: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    record: bool,
    notes: Sequence[str] = (),
) -> None:
    """As `publish`, with columns of its own; `notes` are lines below the table."""
    lines = [
        f"## {title}",
        "",
        f"`{command}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {machine()}",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)),
        "",
    ]
    if notes:
        lines += [*notes, ""]
    text = "\n".join(lines)
    print(text)
    if record:
        sections = RESULTS.read_text() if RESULTS.exists() else "# Results\n\n"
        head_text, *parts = sections.split("\n## ")
        kept = [part for part in parts if not part.startswith(f"{title}\n")]
        joined = "\n## ".join(
            [head_text.rstrip("\n") + "\n", *(p.rstrip("\n") + "\n" for p in kept)]
        )
        RESULTS.write_text(joined + "\n" + text)
