"""`python -m benchmarks [NAME ...] [--record]`, and `python -m benchmarks firewall --curve [--record]`."""

from __future__ import annotations

import argparse

from benchmarks import (
    api_scale,
    boot,
    consoles,
    control_plane,
    creates,
    entry_points,
    events,
    firewall,
    firewall_curve,
    flood,
    metrics,
    recovery,
)

BENCHMARKS = {
    "boot": boot.run,
    "control_plane": control_plane.run,
    "api_scale": api_scale.run,
    "metrics": metrics.run,
    "consoles": consoles.run,
    "events": events.run,
    "firewall": firewall.run,
    "flood": flood.run,
    "recovery": recovery.run,
    "creates": creates.run,
    "entry_points": entry_points.run,
}


def main() -> None:
    """Runs the named benchmarks one after the other; without a name, all but `entry_points`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--record", action="store_true", help="put the figures into RESULTS.md")
    parser.add_argument(
        "--curve",
        action="store_true",
        help="instead of `firewall`: how it grows up to 10,000 ports (half an hour)",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    benchmarks = dict(BENCHMARKS)
    if arguments.curve:
        if arguments.names != ["firewall"]:
            parser.error("--curve goes with `firewall` alone")
        benchmarks["firewall"] = firewall_curve.run
    for name in arguments.names or [name for name in benchmarks if name != "entry_points"]:
        benchmarks[name](record=arguments.record)


if __name__ == "__main__":
    main()
