"""`/docs`: the API's description for people. Everything comes from this server, nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

from awan.apidocs.build import ASSETS
from awan.kit.http import Request, no_such_route

PAGE = Path(__file__).parent / "page"
# Scripts and calls only from and to this server. The pages set styles from their script, hence the one exception.
HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
}
ASSET_HEADERS = {"cache-control": "public, max-age=3600"}

router = APIRouter(include_in_schema=False)


@router.get("/docs")
def show_docs() -> Response:
    """The page, or how to build what it needs."""
    name = "index.html" if ASSETS.is_built() else "unbuilt.html"
    return HTMLResponse((PAGE / name).read_text(), headers=HEADERS)


@router.get("/docs/page.js")
def show_script() -> Response:
    """The page's own script."""
    return FileResponse(PAGE / "page.js", headers=ASSET_HEADERS)


@router.get("/docs/assets/{name}")
def show_asset(name: str, request: Request) -> Response:
    """One of the built files."""
    path = ASSETS.find(name)
    if path is None:
        raise no_such_route(request)
    return FileResponse(path, headers=ASSET_HEADERS)
