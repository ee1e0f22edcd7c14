"""Files of npm packages that our own pages need: fetched once at build, copied, served by ourselves.

The versions are those of a `package-lock.json`; no install script of any package is run. Needs npm.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NPM_TIMEOUT_S = 300
STAMP = "lock.sha256"


@dataclass(frozen=True)
class WebAssets:
    """What of `package` is copied into `directory/assets`. `patterns` are relative to the package, `**` allowed.

    `directory` holds `package.json` and `package-lock.json`.
    """

    directory: Path
    package: str
    patterns: tuple[str, ...]

    @property
    def assets(self) -> Path:
        """Where the copies are."""
        return self.directory / "assets"

    def is_built(self) -> bool:
        """Whether the assets of the present lock file are in place."""
        stamp = self.assets / STAMP
        return stamp.exists() and stamp.read_text() == self._stamp()

    def find(self, name: str) -> Path | None:
        """The copy of a file by its path within the package; None when there is none of that name."""
        path = (self.assets / name).resolve()
        is_ours = path.is_relative_to(self.assets.resolve()) and path.name != STAMP
        return path if is_ours and path.is_file() else None

    def build(self) -> None:
        """Puts the assets in place; nothing is done when they are. Raises: RuntimeError with npm's words."""
        if self.is_built():
            return
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            self._fetch(work)
            package = work / "node_modules" / self.package
            shutil.rmtree(self.assets, ignore_errors=True)
            for pattern in self.patterns:
                found = [path for path in package.glob(pattern) if path.is_file()]
                if not found:
                    raise RuntimeError(f"{self.package} has no {pattern}")
                for path in found:
                    target = self.assets / path.relative_to(package)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
        (self.assets / STAMP).write_text(self._stamp())

    def _fetch(self, work: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(self.directory / name, work / name)
        try:
            subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=work,
                check=True,
                capture_output=True,
                text=True,
                timeout=NPM_TIMEOUT_S,
            )
        except FileNotFoundError as err:
            raise RuntimeError("npm is not installed: it fetches the pages' assets") from err
        except subprocess.TimeoutExpired as err:
            raise RuntimeError(f"npm did not end within {NPM_TIMEOUT_S} s") from err
        except subprocess.CalledProcessError as err:
            raise RuntimeError(f"npm could not fetch the assets: {err.stderr.strip()}") from err

    def _stamp(self) -> str:
        lock = (self.directory / "package-lock.json").read_bytes()
        return hashlib.sha256(lock + "\n".join(self.patterns).encode()).hexdigest()
