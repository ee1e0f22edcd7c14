"""Slots: which checkout holds which lab location of this host.

The lock is an flock on /run/awan/slot-k, held by a process that lives as long as the location does;
who it belongs to is written in the slot's state directory, which also survives `down --keep`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError, SlotTaken
from lab.layout import CHECKOUT, SLOT_MAX, SlotLayout
from lab.processes import ProcessTable, start_ticks

HOLDER = "slot-holder"


@dataclass(frozen=True)
class Owner:
    """Whose slot it is. tied_to: (pid, start) of the process whose end makes the slot abandoned."""

    checkout: str
    tied_to: tuple[int, int] | None

    @property
    def is_us(self) -> bool:
        return self.checkout == str(CHECKOUT)

    @property
    def is_gone(self) -> bool:
        """True if the owning checkout was removed, so that nobody else can end its location."""
        return not Path(self.checkout).is_dir()

    @property
    def is_abandoned(self) -> bool:
        return self.tied_to is not None and start_ticks(self.tied_to[0]) != self.tied_to[1]


def find_owner(layout: SlotLayout) -> Owner | None:
    try:
        stored = json.loads(layout.owner_file.read_text())
    except FileNotFoundError:
        return None
    tied_to = stored["tied_to"]
    return Owner(stored["checkout"], None if tied_to is None else (tied_to[0], tied_to[1]))


def is_abandoned_by_us(layout: SlotLayout) -> bool:
    owner = find_owner(layout)
    return owner is not None and owner.is_us and owner.is_abandoned


def check_owner(layout: SlotLayout) -> None:
    """Raises: SlotTaken if the slot, or data kept in it, belongs to another checkout."""
    owner = find_owner(layout)
    if owner is not None and not owner.is_us and not owner.is_gone:
        raise SlotTaken(
            f"slot {layout.slot} belongs to {owner.checkout}: "
            f"run `python -m lab down --slot {layout.slot}` there first, or take another slot"
        )


def claim(layout: SlotLayout, table: ProcessTable) -> None:
    """Make the slot ours and keep it locked beyond the end of this process; safe when it is ours.
    Raises: SlotTaken if another checkout has it."""
    check_owner(layout)
    lock = try_lock(layout.lock_file)
    if lock is None:
        if find_owner(layout) is None:
            raise SlotTaken(f"slot {layout.slot} is just being taken by another process")
        return
    try:
        # Another checkout may have come and gone between the first look and the lock.
        check_owner(layout)
        owner = find_owner(layout)
        if owner is None or not owner.is_us:
            write_owner(layout, tied_to=None)
        _hand_to_holder(layout, lock, table)
    finally:
        os.close(lock)


def release(layout: SlotLayout, table: ProcessTable) -> None:
    """Give the slot up. Safe when it is not held."""
    layout.lock_file.unlink(missing_ok=True)
    table.stop(HOLDER, grace_s=0)


def try_claim_free(layout: SlotLayout, table: ProcessTable, *, tied_to_pid: int | None) -> bool:
    """Take the slot if nobody has it and nothing is kept in it."""
    lock = try_lock(layout.lock_file)
    if lock is None:
        return False
    try:
        if layout.state_dir.exists():
            return False
        write_owner(layout, tied_to=tied_to_pid)
        _hand_to_holder(layout, lock, table)
        return True
    finally:
        os.close(lock)


def write_owner(layout: SlotLayout, *, tied_to: int | None) -> None:
    mark = None
    if tied_to is not None:
        ticks = start_ticks(tied_to)
        if ticks is None:
            raise LabError(f"process {tied_to} is to own slot {layout.slot} but does not run")
        mark = (tied_to, ticks)
    layout.state_dir.mkdir(parents=True, exist_ok=True)
    draft = layout.owner_file.with_suffix(".new")
    draft.write_text(json.dumps({"checkout": str(CHECKOUT), "tied_to": mark}))
    draft.replace(layout.owner_file)


def slots_from(first: int) -> range:
    return range(first, SLOT_MAX + 1)


def try_lock(path: Path) -> int | None:
    """An exclusive flock on the file as an open descriptor, or None if someone has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_same_file(descriptor, path):
            return descriptor
        # The former holder removed the file while we opened it: a lock on it excludes nobody.
        os.close(descriptor)


@contextlib.contextmanager
def change_mutex(layout: SlotLayout, *, timeout_s: float = 180) -> Iterator[None]:
    """Held while the slot is brought up or down. Raises: LabError when not free in time."""
    deadline = time.monotonic() + timeout_s
    while (lock := try_lock(layout.mutex_file)) is None:
        if time.monotonic() > deadline:
            raise LabError(f"another up or down of slot {layout.slot} runs since {timeout_s:g} s")
        time.sleep(0.1)
    try:
        yield
    finally:
        layout.mutex_file.unlink(missing_ok=True)
        os.close(lock)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _hand_to_holder(layout: SlotLayout, lock: int, table: ProcessTable) -> None:
    """Start the process that keeps the lock: it inherits the descriptor, and the lock with it."""
    holder = subprocess.Popen(
        [f"aw{layout.slot}-holder", "infinity"],
        executable="/usr/bin/sleep",
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    # It is meant to outlive us; without this, Popen warns of a child still running.
    holder.returncode = 0
    table.record(HOLDER, holder.pid)
