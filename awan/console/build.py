"""The assets of the console's page, which is noVNC: `python -m awan.console` fetches them."""

from __future__ import annotations

from pathlib import Path

from awan.kit.web_assets import WebAssets

ASSETS = WebAssets(
    Path(__file__).parent,
    "@novnc/novnc",
    (
        "core/**/*.js",
        "vendor/**/*.js",
        "vendor/**/LICENSE",
        "LICENSE.txt",
        "docs/LICENSE.*",
        "AUTHORS",
    ),
)
