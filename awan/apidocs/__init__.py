"""The API as people and machines read it: `/openapi.json` and the pages at `/docs`."""

from awan.apidocs.openapi import build_openapi
from awan.apidocs.pages import router

__all__ = ["build_openapi", "router"]
