"""Firewalls: every instance has one, with its rules and its sets of addresses."""

from awan.firewall.models import Firewall
from awan.firewall.service import (
    create_firewall,
    find_firewall,
    firewall_id_of,
    retire_firewall,
)
from awan.firewall.spec import read_spec
from awan.firewall.workflows import (
    note_applied,
    note_pushed,
    push_firewall,
    pushed_revision,
)

__all__ = [
    "Firewall",
    "create_firewall",
    "find_firewall",
    "firewall_id_of",
    "note_applied",
    "note_pushed",
    "push_firewall",
    "pushed_revision",
    "read_spec",
    "retire_firewall",
]
