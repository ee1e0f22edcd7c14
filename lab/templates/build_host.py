"""What a template build needs of the machine it runs on: root, tools, apt sources, a way to run them."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

RELEASE = "bookworm"
_SUITES = (RELEASE, f"{RELEASE}-updates", f"{RELEASE}-security")


class TemplateBuildError(Exception):
    """A template could not be built; the sentence says what to do about it or what a tool said."""


def require_root_and_tools(tools: dict[str, str]) -> None:
    """Check once, before any work, that the build can succeed here.

    `tools` maps a command to the Debian package that holds it.
    Raises: TemplateBuildError naming everything that is missing.
    """
    if os.geteuid() != 0:
        raise TemplateBuildError(
            "building a template needs root: the boot loader is installed into a loop-mounted file"
        )
    missing = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    if missing:
        raise TemplateBuildError(f"missing Debian packages: {', '.join(missing)}")


def run(
    command: Sequence[str | Path],
    *,
    input_text: str | None = None,
    timeout_s: float = 900,
) -> str:
    """Run one tool and give its standard output.

    Raises: TemplateBuildError with the tool's last words, also when it is not done in `timeout_s`.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=input_text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
            env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.TimeoutExpired as err:
        raise TemplateBuildError(f"{words[0]} was not done after {timeout_s:g} s") from err
    except subprocess.CalledProcessError as err:
        last_words = "\n".join((err.stderr or err.stdout or "").strip().splitlines()[-15:])
        raise TemplateBuildError(
            f"{words[0]} failed with status {err.returncode}: {last_words}"
        ) from err
    return done.stdout


def apt_sources() -> list[str]:
    """One-line apt sources (`deb [...] URI SUITE main`) of this machine for the Debian release.

    They come from apt's own view of its configuration, so that a local mirror or a snapshot is
    used as configured.   Raises: TemplateBuildError if apt knows no source for the release.
    """
    listing = run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)",
            "Created-By: Packages",
        ]
    )
    lines: list[str] = []
    for target in listing.splitlines():
        uri, suite, component, signed_by = target.split("|")
        if suite in _SUITES and component == "main":
            option = f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
            line = f"deb {option}{uri} {suite} {component}"
            if line not in lines:
                lines.append(line)
    if not lines:
        raise TemplateBuildError(f"apt has no source for Debian {RELEASE}; run apt-get update")
    return lines


def mmdebstrap(root: Path, variant: str, packages: Sequence[str], options: Sequence[str]) -> None:
    """Fill the new directory `root` with Debian packages from this machine's own mirror.

    `variant` is mmdebstrap's: `extract` only unpacks, `minbase` installs.   Source: mmdebstrap(1).
    """
    run(
        [
            "mmdebstrap",
            "--quiet",
            f"--variant={variant}",
            "--aptopt=APT::Install-Recommends false",
            f"--include={','.join(packages)}",
            *options,
            RELEASE,
            root,
            "-",
        ],
        input_text="\n".join(apt_sources()) + "\n",
    )
