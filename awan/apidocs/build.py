"""Fetches the API pages' assets: `python -m awan.apidocs`.

The versions are those of `package-lock.json`; no install script of any package is run. Needs npm. When the assets
are there for the present lock file, nothing is done.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ASSETS = HERE / "assets"
STAMP = ASSETS / "lock.sha256"
PACKAGE = Path("node_modules/swagger-ui-dist")
FILES = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png", "LICENSE", "NOTICE")
NPM_TIMEOUT_S = 300


def is_built() -> bool:
    """Whether the assets of the present lock file are in place."""
    return STAMP.exists() and STAMP.read_text() == _lock_sha256()


def build() -> None:
    """Puts the assets in place. Raises: RuntimeError with npm's words when they cannot be fetched."""
    if is_built():
        return
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, work / name)
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
            raise RuntimeError("npm is not installed: it fetches the API pages' assets") from err
        except subprocess.TimeoutExpired as err:
            raise RuntimeError(f"npm did not end within {NPM_TIMEOUT_S} s") from err
        except subprocess.CalledProcessError as err:
            raise RuntimeError(f"npm could not fetch the assets: {err.stderr.strip()}") from err
        ASSETS.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy(work / PACKAGE / name, ASSETS / name)
    STAMP.write_text(_lock_sha256())


def _lock_sha256() -> str:
    return hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()
