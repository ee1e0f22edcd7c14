"""The assets of the API pages: `python -m awan.apidocs` fetches them."""

from __future__ import annotations

from pathlib import Path

from awan.kit.web_assets import WebAssets

ASSETS = WebAssets(
    Path(__file__).parent,
    "swagger-ui-dist",
    ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png", "LICENSE", "NOTICE"),
)
