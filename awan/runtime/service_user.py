"""The operating-system user that API and worker run as when root starts them.

They need no rights of the machine: hypervisors and OVN are spoken to over the network, PostgreSQL over its socket. What
they need is the key file and the directory of images, which therefore belong to this user.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SERVICE_USER = "awan"
USERADD_NAME_TAKEN = 9


class ServiceUserError(Exception):
    """The user cannot be made; the text says why."""


@dataclass(frozen=True)
class ServiceUser:
    """An unprivileged user of this machine."""

    name: str
    uid: int
    gid: int
    home: str

    def can_enter(self, directory: Path) -> bool:
        """Whether the user may pass through `directory` and all above it."""
        return self._can("-x", directory)

    def can_read(self, file: Path) -> bool:
        """Whether the user may read the file."""
        return self._can("-r", file)

    def own(self, path: Path) -> None:
        """The file, or the directory with all that is in it, belongs to the user from now on.

        What belongs to the user already is not looked into: the user may have put links there for root to follow.
        """
        if path.lstat().st_uid == self.uid:
            return
        if path.is_dir() and not path.is_symlink():
            for folder, folders, files in os.walk(path):
                for name in (*folders, *files):
                    self._give(Path(folder, name))
        self._give(path)

    def _give(self, path: Path) -> None:
        os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def _can(self, flag: str, path: Path) -> bool:
        result = subprocess.run(
            ["/usr/bin/test", flag, path],
            check=False,
            cwd="/",
            user=self.uid,
            group=self.gid,
            extra_groups=[],
        )
        return result.returncode == 0


def ensure_service_user() -> ServiceUser | None:
    """The user, made if absent; None when we are not root, for then everything runs as who started it.

    Raises: ServiceUserError.
    """
    if os.geteuid() != 0:
        return None
    try:
        return _find(SERVICE_USER)
    except KeyError:
        _make(SERVICE_USER)
    return _find(SERVICE_USER)


def _find(name: str) -> ServiceUser:
    entry = pwd.getpwnam(name)
    return ServiceUser(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def _make(name: str) -> None:
    try:
        result = subprocess.run(
            [
                *("/usr/sbin/useradd", "--system", "--user-group", "--no-create-home"),
                *("--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", name),
            ],
            check=False,
            capture_output=True,
            text=True,
        )
    except OSError as err:
        raise ServiceUserError(f"the user '{name}' cannot be made: {err}") from err
    # Another start of ours may have been faster.
    if result.returncode not in (0, USERADD_NAME_TAKEN):
        raise ServiceUserError(f"the user '{name}' cannot be made: {result.stderr.strip()}")


def unreachable(user: ServiceUser, code_dir: Path, directories: list[Path]) -> Path | None:
    """What the user would need and cannot get at (a checkout in root's home), or None."""
    for file in (code_dir / "__init__.py", Path(sys.executable), Path(subprocess.__file__)):
        if not user.can_read(file):
            return file
    return next((path for path in directories if not user.can_enter(path)), None)
