"""The one visible list of what Awan is made of: routers, workflows, periodic tasks, audits."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from fastapi import APIRouter

import awan.accounts.routes
import awan.catalogue.admin_routes
import awan.catalogue.routes
import awan.credentials.routes
import awan.event_stream.routes
import awan.fleet.routes
import awan.instances.routes
import awan.networks.routes
import awan.operations.routes
import awan.reconcile.routes
import awan.volumes.routes
import awan.webhooks.routes
from awan.accounts import forget_old_answers
from awan.kit.database import transaction
from awan.networks.service import end_quarantines
from awan.webhooks.deliveries import forget_old
from awan.webhooks.sender import deliver_due

# Fixed paths before paths with parameters: /instances/size-templates is not an instance's uuid.
ROUTERS: tuple[APIRouter, ...] = (
    awan.catalogue.routes.sizes_router,
    awan.instances.routes.router,
    awan.networks.routes.router,
    awan.credentials.routes.router,
    awan.catalogue.routes.router,
    awan.operations.routes.router,
    awan.accounts.routes.router,
    awan.event_stream.routes.router,
    awan.webhooks.routes.router,
)
ADMIN_ROUTERS: tuple[APIRouter, ...] = (
    awan.accounts.routes.admin_router,
    awan.catalogue.admin_routes.admin_router,
    awan.fleet.routes.admin_router,
    awan.volumes.routes.admin_router,
    awan.networks.routes.admin_router,
    awan.reconcile.routes.admin_router,
)
WORKFLOW_MODULES = (
    "awan.catalogue.images",
    "awan.fleet.workflows",
    "awan.volumes.image_removal",
    "awan.instances.workflows",
    "awan.reconcile.workflows",
)


def _end_quarantines() -> None:
    with transaction() as session:
        end_quarantines(session)


def _forget_old_answers() -> None:
    with transaction() as session:
        forget_old_answers(session)


# name, seconds between two runs, function; one worker at a time runs each.
WORKER_TASKS: tuple[tuple[str, float, Callable[[], object]], ...] = (
    ("networks.end_quarantines", 60.0, _end_quarantines),
    ("accounts.forget_old_answers", 3600.0, _forget_old_answers),
    ("webhooks.deliver", 1.0, deliver_due),
    ("webhooks.forget_old", 3600.0, forget_old),
)


def import_workflows() -> None:
    """Makes every workflow known to this process."""
    for module in WORKFLOW_MODULES:
        importlib.import_module(module)
