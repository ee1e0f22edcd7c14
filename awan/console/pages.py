"""`/console`: a page that shows an instance's screen. Everything comes from this server, nothing from elsewhere.

Ticket and password reach the page behind the `#` of its address, so that no server and no log sees them.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

from awan.console.build import ASSETS
from awan.kit.http import Request, no_such_route

PAGE = Path(__file__).parent / "page"
PAGE_FILES = ("page.js", "page.css")
# Scripts, styles and connections only from and to this server; noVNC draws its cursor as a data: image.
HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
}
ASSET_HEADERS = {"cache-control": "public, max-age=3600"}

router = APIRouter(include_in_schema=False)


@router.get("/console")
def show_console() -> Response:
    """The page, or how to build what it needs."""
    name = "index.html" if ASSETS.is_built() else "unbuilt.html"
    return HTMLResponse((PAGE / name).read_text(), headers=HEADERS)


@router.get("/console/novnc/{name:path}")
def show_console_asset(name: str, request: Request) -> Response:
    """One of noVNC's files, its licence among them."""
    path = ASSETS.find(name)
    if path is None:
        raise no_such_route(request)
    return FileResponse(path, headers=ASSET_HEADERS)


@router.get("/console/{name}")
def show_console_file(name: str, request: Request) -> Response:
    """The page's own script or style."""
    if name not in PAGE_FILES:
        raise no_such_route(request)
    return FileResponse(PAGE / name, headers=ASSET_HEADERS)
