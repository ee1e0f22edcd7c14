"""New ids, and ids derived from other ids.

Everything an operation makes is named from the operation, so that a repeated step finds what it made before.
"""

from __future__ import annotations

from uuid import UUID, uuid4, uuid5


def new_id() -> UUID:
    """A random uuid (version 4)."""
    return uuid4()


def derived_id(parent: UUID, purpose: str) -> UUID:
    """The uuid of the thing that `parent` makes for `purpose`: always the same for the same two (version 5)."""
    return uuid5(parent, purpose)


def derived_mac(parent: UUID) -> str:
    """A locally administered unicast MAC address derived from a uuid: `52:xx:..` in lower case."""
    tail = parent.bytes[-5:]
    return ":".join(f"{byte:02x}" for byte in (0x52, *tail))
