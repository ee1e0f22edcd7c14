"""Which instances are behind which firewall groups: who may change that, and which groups still count."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from awan.firewall.models import FirewallGroup


def lock_membership(session: Session, account_id: UUID) -> None:
    """Until the transaction ends nobody else changes which instances of the account are behind which groups."""
    name = hashlib.sha256(f"firewall groups of {account_id}".encode()).digest()
    number = int.from_bytes(name[:8], "big", signed=True)
    session.execute(select(func.pg_advisory_xact_lock(number)))


def living_groups(session: Session, group_ids: Collection[UUID]) -> set[UUID]:
    """Those of these groups that are not deleted."""
    if not group_ids:
        return set()
    query = select(FirewallGroup.group_id).where(
        FirewallGroup.group_id.in_(group_ids), FirewallGroup.deleted_at.is_(None)
    )
    return set(session.scalars(query))
