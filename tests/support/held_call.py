"""A call of a simulated engine that waits until it is let go, however long the machine takes for the rest.

with held("ensure_port") as call:
    ...                             # something in this process calls the verb
    assert call.entered.wait(20)
    ...                             # what happens meanwhile
    assert not call.left.is_set()
    call.let_go.set()               # as the end of the block does
    assert call.left.wait(20)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock

import pytest

from awan.engines.sim import SimStore

HELD_MAX_S = 60.0


class HeldCall:
    """`entered` is set when the call has come, `left` after its effect; the call waits until `let_go` is set."""

    def __init__(self) -> None:
        self.entered, self.let_go, self.left = Event(), Event(), Event()


@contextmanager
def held(verb: str) -> Iterator[HeldCall]:
    """The first call of the verb within the block waits before its effect; later ones pass.

    Gives the call, which is let go at the end of the block at the latest.
    """
    it, first, real = HeldCall(), Lock(), SimStore.call

    @contextmanager
    def call(
        store: SimStore, engine: str, called: str, target: str, *, is_long: bool = False
    ) -> Iterator[None]:
        with real(store, engine, called, target, is_long=is_long):
            is_held = called == verb and first.acquire(blocking=False)
            if is_held:
                it.entered.set()
                assert it.let_go.wait(HELD_MAX_S), f"{verb} was never let go"
            try:
                yield
            finally:
                if is_held:
                    it.left.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimStore, "call", call)
        try:
            yield it
        finally:
            it.let_go.set()
