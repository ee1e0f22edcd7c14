"""The HTTP API as one application: `uvicorn awan.api:app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy import text

from awan import __version__, apidocs, assembly
from awan.kit import middleware
from awan.kit.database import dispose_engine, transaction
from awan.kit.http import Answer, Envelope, answer
from awan.settings import get_settings

PREFIX = "/api/v1"
# Handlers run in threads. Many may wait for their operation at once, so there are more of them than connections.
THREADS_MAX = 200

root_router = APIRouter(tags=["Health"])


class WorkerHealth(BaseModel):
    """A worker and the seconds since it was last heard of."""

    id: str
    age_s: float
    is_alive: bool


class Health(BaseModel):
    """`ok`: calls are answered and carried out. `degraded`: answered, but no worker is alive to carry out changes."""

    status: str
    version: str
    workers: list[WorkerHealth]


@root_router.get("/health", response_model=Envelope[Health])
def get_health() -> Answer:
    """Whether this server can work. 503 when the database is away."""
    with transaction() as session:
        rows = session.execute(
            text(
                "SELECT executor_id, extract(epoch FROM now() - seen_at)::float8 AS age_s"
                " FROM worker ORDER BY executor_id"
            )
        ).all()
    lease_s = get_settings().worker_lease_s
    workers = [
        WorkerHealth(id=row.executor_id, age_s=round(row.age_s, 1), is_alive=row.age_s <= lease_s)
        for row in rows
    ]
    status = "ok" if any(worker.is_alive for worker in workers) else "degraded"
    return answer("Health", Health(status=status, version=__version__, workers=workers))


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS_MAX
    yield
    dispose_engine()


def _operation_id(route: APIRoute) -> str:
    """The function's name: stable, and unique over all rooms (the OpenAPI document is refused otherwise)."""
    return route.name


def create_app() -> FastAPI:
    """A fresh application with the routes of all rooms."""
    app = FastAPI(
        title="Awan API",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        lifespan=_lifespan,
    )
    for router in assembly.ROUTERS:
        app.include_router(router, prefix=PREFIX)
    for router in assembly.ADMIN_ROUTERS:
        app.include_router(router, prefix=f"{PREFIX}/admin", tags=["Operator"])
    for router in (root_router, *assembly.ROOT_ROUTERS, *assembly.PAGE_ROUTERS):
        app.include_router(router)
    app.include_router(apidocs.router)
    middleware.install(app)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(apidocs.build_openapi(app))
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


app = create_app()
