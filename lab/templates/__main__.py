"""`python -m lab.templates build debian-12|tiny-1 [--out FILE]`: build a template, print what it is."""

import argparse
import sys
import time
from pathlib import Path

from lab.templates import TemplateBuildError, build_debian12, build_tiny, cached


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.templates")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build a template; without --out, once, in the cache")
    build.add_argument("kind", choices=("debian-12", "tiny-1"))
    build.add_argument("--out", type=Path, help="write the image here instead of the cache")
    options = parser.parse_args()

    started_s = time.monotonic()

    def progress(sentence: str) -> None:
        print(f"[{time.monotonic() - started_s:6.1f} s] {sentence}", file=sys.stderr, flush=True)

    try:
        if options.out is None:
            built = cached(options.kind, progress)
        else:
            builder = build_debian12 if options.kind == "debian-12" else build_tiny
            built = builder(options.out, progress)
    except TemplateBuildError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"{built.path}\n  {built.name} {built.version}, sha256 {built.sha256}")
    print(
        f"  {built.path.stat().st_size / 2**20:.0f} MiB for {built.virtual_size_bytes / 2**20:.0f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
