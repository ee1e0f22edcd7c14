"""How long the two commands of the README take: `make demo` cold and warm, `make test`."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.report import Row, publish

CHECKOUT = Path(__file__).resolve().parent.parent
TITLE = "The two commands"


def run(*, record: bool) -> None:
    """`make demo` after `make down` with and without what an earlier run left, then `make test`.

    Cold means without data and templates, packages and environment installed: what a registry takes is not ours.
    """
    _make("down")
    for path in (CHECKOUT / "var", Path("/var/cache/awan/templates")):
        subprocess.run(["rm", "-rf", str(path)], check=True)
    cold_s = _make("demo")
    warm_s = _make("demo")
    test_s = _make("test")
    rows = [
        Row("make demo, no data and no templates", f"{cold_s:.0f} s"),
        Row("make demo, again", f"{warm_s:.1f} s"),
        Row("make test", f"{test_s:.0f} s", "≤ 1800 s"),
    ]
    publish(TITLE, "python -m benchmarks entry_points", rows, record=record)


def _make(target: str) -> float:
    began_at = time.monotonic()
    subprocess.run(["make", target], cwd=CHECKOUT, check=True)
    return time.monotonic() - began_at
