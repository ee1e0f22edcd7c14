"""The environment of our processes, kept in one private file of the state directory.

`runtime.env` (0600) holds the settings `AWAN_...` that the running control plane was started with, so that each
`awan` command on the same machine works on the same database without anything being exported. `awan.env` (0600) is
for people and scripts: address of the API and keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PREFIX = "AWAN_"
RUNTIME_FILE = "runtime.env"
KEYS_FILE = "awan.env"
# Names that are not settings of a process: keys of users, and what says where to look.
NOT_SETTINGS = {"AWAN_API_URL", "AWAN_API_KEY", "AWAN_ADMIN_KEY", "AWAN_ENV_FILE"}


def state_dir() -> Path:
    """The state directory that this process was told of (`AWAN_STATE_DIR`), else `var` here; absolute."""
    return Path(os.environ.get("AWAN_STATE_DIR", "var")).resolve()


def read_env_file(path: Path) -> dict[str, str]:
    """Lines `NAME=value` of a file; empty when it does not exist. No quoting, no expansion."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def write_env_file(path: Path, values: Mapping[str, str]) -> None:
    """Writes such a file, readable by its owner alone, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in values.items())
    fresh.replace(path)


def settings_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that our processes are configured by."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in NOT_SETTINGS
    }


def load_environment(*, with_keys: bool = False) -> None:
    """Fills this process's environment from the file `AWAN_ENV_FILE`, else from the state directory.

    What is set already stays. `with_keys` adds the API's address and keys, for commands that speak HTTP.
    """
    runtime_file = Path(os.environ.get("AWAN_ENV_FILE", state_dir() / RUNTIME_FILE))
    values = read_env_file(runtime_file)
    if with_keys:
        values |= read_env_file(runtime_file.with_name(KEYS_FILE))
    for name, value in values.items():
        os.environ.setdefault(name, value)
