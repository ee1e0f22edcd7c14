"""The one visible list of what Awan is made of: routers, workflows, periodic tasks, audits."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

from fastapi import APIRouter

import awan.accounts.routes
import awan.catalogue.admin_routes
import awan.catalogue.routes
import awan.console.pages
import awan.console.routes
import awan.credentials.routes
import awan.event_stream.routes
import awan.firewall.group_routes
import awan.firewall.routes
import awan.fleet.routes
import awan.instances.admin_routes
import awan.instances.card_routes
import awan.instances.guest_routes
import awan.instances.ipv6_routes
import awan.instances.network_routes
import awan.instances.power_routes
import awan.instances.routes
import awan.metrics.graph_routes
import awan.metrics.routes
import awan.networks.prefix_routes
import awan.networks.private_routes
import awan.networks.routes
import awan.operations.routes
import awan.reconcile.routes
import awan.volumes.routes
import awan.webhooks.routes
from awan.accounts import forget_old_answers
from awan.console.service import end_lost
from awan.firewall.trial import end_trials
from awan.instances.captures import forget_captures
from awan.instances.password_boots import LOOK_INTERVAL_S, scrub_booted
from awan.kit.database import transaction
from awan.metrics import collector as metrics_collector
from awan.metrics import history as metrics_history
from awan.networks.addresses import end_quarantines
from awan.networks.names import push_stale_names
from awan.networks.prefixes import end_prefix_quarantines
from awan.networks.private_names import push_stale_private_names
from awan.reconcile.watching import run_watches
from awan.webhooks.deliveries import forget_old
from awan.webhooks.sender import deliver_due

# Fixed paths before paths with parameters: /instances/size-templates is not an instance's uuid.
ROUTERS: tuple[APIRouter, ...] = (
    awan.catalogue.routes.sizes_router,
    awan.networks.routes.instances_router,
    awan.firewall.routes.router,
    awan.firewall.group_routes.instances_router,
    awan.instances.routes.router,
    awan.instances.power_routes.router,
    awan.instances.guest_routes.router,
    awan.instances.card_routes.router,
    awan.instances.ipv6_routes.router,
    awan.metrics.routes.router,
    awan.console.routes.router,
    awan.networks.routes.router,
    awan.instances.card_routes.addresses_router,
    awan.networks.private_routes.router,
    awan.firewall.group_routes.router,
    awan.instances.network_routes.router,
    awan.metrics.graph_routes.router,
    awan.credentials.routes.router,
    awan.catalogue.routes.router,
    awan.operations.routes.router,
    awan.accounts.routes.router,
    awan.event_stream.routes.router,
    awan.webhooks.routes.router,
)
# Pages, at the root.
PAGE_ROUTERS: tuple[APIRouter, ...] = (awan.console.pages.router,)
ADMIN_ROUTERS: tuple[APIRouter, ...] = (
    awan.accounts.routes.admin_router,
    awan.catalogue.admin_routes.admin_router,
    awan.fleet.routes.admin_router,
    awan.volumes.routes.admin_router,
    awan.instances.admin_routes.admin_router,
    awan.networks.routes.admin_router,
    awan.networks.prefix_routes.admin_router,
    awan.reconcile.routes.admin_router,
)
# Outside the API's prefix.
ROOT_ROUTERS: tuple[APIRouter, ...] = (awan.metrics.routes.root_router,)
WORKFLOW_MODULES = (
    "awan.catalogue.images",
    "awan.console.workflows",
    "awan.firewall.workflows",
    "awan.fleet.workflows",
    "awan.networks.workflows",
    "awan.networks.private_workflows",
    "awan.volumes.image_removal",
    "awan.instances.workflows",
    "awan.instances.first_boot",
    "awan.instances.private_workflows",
    "awan.instances.ipv6_workflows",
    "awan.instances.guest_workflows",
    "awan.instances.capture_workflows",
    "awan.instances.public_network_workflows",
    "awan.instances.recover",
    "awan.reconcile.workflows",
)


def _end_quarantines() -> None:
    with transaction() as session:
        end_quarantines(session)
        end_prefix_quarantines(session)


def _forget_old_answers() -> None:
    with transaction() as session:
        forget_old_answers(session)


def _end_lost_consoles() -> None:
    with transaction() as session:
        end_lost(session)


# name, seconds between two runs, function; one worker at a time runs each.
WORKER_TASKS: tuple[tuple[str, float, Callable[[], object]], ...] = (
    ("networks.end_quarantines", 60.0, _end_quarantines),
    ("networks.push_names", 1.0, push_stale_names),
    ("networks.push_private_names", 1.0, push_stale_private_names),
    ("console.end_lost", 30.0, _end_lost_consoles),
    ("accounts.forget_old_answers", 3600.0, _forget_old_answers),
    ("instances.forget_captures", 60.0, forget_captures),
    ("instances.scrub_booted", LOOK_INTERVAL_S, scrub_booted),
    ("webhooks.deliver", 1.0, deliver_due),
    ("firewall.end_trials", 1.0, end_trials),
    ("webhooks.forget_old", 3600.0, forget_old),
    ("metrics.keep", metrics_history.KEEP_INTERVAL_S, metrics_history.keep),
)
# The same, run by every worker: these share their work by themselves.
SHARED_TASKS: tuple[tuple[str, float, Callable[[], object]], ...] = (
    ("metrics.collect", metrics_collector.POLL_S, metrics_collector.tick),
)
# name, function; each runs in a thread of every worker until the event is set.
WORKER_SERVICES: tuple[tuple[str, Callable[[threading.Event], None]], ...] = (
    ("reconcile.watches", run_watches),
)


def import_workflows() -> None:
    """Makes every workflow known to this process."""
    for module in WORKFLOW_MODULES:
        importlib.import_module(module)
