"""Customers who keep changing tiny guests, each one change after the other, through whatever happens to the cloud.

    storm = Storm(cloud, customers, random.Random(seed))
    with storm.going_on(changes=12):      # in threads, one for each customer
        ...                               # break something; `storm.wait_for(4)` returns when four were accepted
    storm.assert_each_once()

A change is asked for with one Idempotency-Key until it is accepted: 503 and 409 mean later, anything else is noted as
wrong. Then its end is waited for, and the guest must be as that end says.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from tests.support.lab_cloud import FINAL, LabCloud

ACCEPT_MAX_S = 240.0
END_MAX_S = 240.0
PAUSE_S = 0.3
GUESTS_MAX = 2
# What may be done to a guest in this state.
CHANGES = {
    "Running": ("stop", "restart", "reset", "hostname", "delete"),
    "Stopped": ("start", "hostname", "delete"),
    "Error": ("delete",),
}
# What a guest is after a change that succeeded; a name changes nothing.
AFTER = {"start": "Running", "restart": "Running", "reset": "Running", "stop": "Stopped"}


@dataclass(frozen=True)
class Accepted:
    """A change that was accepted, and how it ended."""

    verb: str
    instance: str
    operation: str
    status: str


@dataclass
class _Customer:
    """One customer, with a connection and guests of its own. Used by one thread."""

    name: str
    http: httpx.Client
    chance: random.Random
    guests: dict[str, str] = field(default_factory=dict)


class Storm:
    """Mixed changes of several customers. `accepted`: so far; `statuses`: of all answers; `wrong` must be empty."""

    def __init__(
        self, cloud: LabCloud, customers: dict[str, httpx.Client], chance: random.Random
    ) -> None:
        self._cloud = cloud
        self._customers = [
            _Customer(name, http, random.Random(f"{chance.random()}"))
            for name, http in customers.items()
        ]
        self._lock = threading.Lock()
        self._left = 0
        self.accepted: list[Accepted] = []
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self._taken = 0

    @contextmanager
    def going_on(self, changes: int) -> Iterator[None]:
        """So many changes; returns when all have ended. Raises: AssertionError with what went wrong."""
        self._left, self._taken = changes, 0
        threads = [threading.Thread(target=self._run, args=(it,)) for it in self._customers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()
        assert not self.wrong, self.wrong

    def wait_for(self, count: int, timeout_s: float = 120.0) -> None:
        """Returns when so many changes of this round have been begun, or none is left."""
        deadline = time.monotonic() + timeout_s
        while self._taken < count and self._left > 0:
            assert time.monotonic() < deadline, "the storm does not come up"
            time.sleep(0.05)

    def assert_each_once(self, before: set[str]) -> None:
        """Each accepted change is one operation that was begun once and ended once; no others came from customers.

        One that was refused only after it had been tried, since a quick call waits for its end, is a failed operation
        that nobody was given: it must have failed. `before`: the operations that there were before the storm.
        """
        known = {it.operation: it.status for it in self.accepted}
        assert len(known) == len(self.accepted), "two changes have the same operation"
        rows = self._cloud.query(
            "SELECT operation_id::text, operation.kind, status,"
            " (SELECT array_agg(event.kind ORDER BY event_id) FROM event"
            "  WHERE event.operation_id = operation.operation_id AND event.kind LIKE 'operation.%%')"
            " FROM operation JOIN account USING (account_id)"
            " WHERE actor LIKE 'key:%%' AND account.name = ANY(%s)",
            [it.name for it in self._customers],
        )
        found = {
            uuid: (kind, status, events)
            for uuid, kind, status, events in rows
            if uuid not in before
        }
        assert known.keys() <= found.keys(), "an operation is lost"
        for uuid, (kind, status, events) in found.items():
            if uuid not in known:
                assert status == "failed", f"{kind} {uuid} was done and nobody was told: {status}"
            assert events == ["operation.queued", f"operation.{status}"], (kind, uuid, events)
            assert known.get(uuid, status) == status, (kind, uuid, status)

    def guests(self) -> dict[str, str]:
        """The guests as the ends of their changes left them."""
        return {uuid: state for it in self._customers for uuid, state in it.guests.items()}

    def _run(self, customer: _Customer) -> None:
        try:
            while self._take():
                self._change(customer)
        except Exception as err:
            with self._lock:
                self._left = 0
                self.wrong.append(f"{customer.name}: {type(err).__name__}: {err}")
            raise

    def _take(self) -> bool:
        with self._lock:
            if self._left <= 0:
                return False
            self._left -= 1
            self._taken += 1
            return True

    def _change(self, customer: _Customer) -> None:
        guests = customer.guests
        is_new = len(guests) < GUESTS_MAX and (not guests or customer.chance.random() < 0.3)
        if is_new:
            answer = self._insist(customer, "POST", "/instances", self._cloud.order(ssh_keys=None))
            assert answer is not None
            uuid, verb = str(answer["data"]["uuid"]), "create"
        else:
            uuid = customer.chance.choice(sorted(guests))
            verb, answer = self._change_one(customer, uuid)
        ended = self._wait(customer, str(answer["operation"]["uuid"]))
        with self._lock:
            self.accepted.append(Accepted(verb, uuid, str(ended["uuid"]), str(ended["status"])))
        self._note(customer, uuid, verb, str(ended["status"]))

    def _change_one(self, customer: _Customer, uuid: str) -> tuple[str, dict[str, Any]]:
        """A change that suits the guest as it is: it may have died twice and stay off, or not be ready for a name."""
        deadline = time.monotonic() + ACCEPT_MAX_S
        while True:
            verb = customer.chance.choice(CHANGES[customer.guests[uuid]])
            answer = self._insist(customer, *_call(uuid, verb), guest=uuid)
            if answer is not None:
                return verb, answer
            assert time.monotonic() < deadline, f"nothing suits {uuid}"
            customer.guests[uuid] = self._settled(customer, uuid)

    def _note(self, customer: _Customer, uuid: str, verb: str, status: str) -> None:
        """What the guest must be from now on. After a failure it is what the API says, which the audit compares."""
        if verb == "delete" and status == "succeeded":
            del customer.guests[uuid]
        elif verb == "create" and status == "succeeded":
            customer.guests[uuid] = "Running"
        elif status == "succeeded":
            customer.guests[uuid] = AFTER.get(verb, customer.guests[uuid])
        else:
            customer.guests[uuid] = self._settled(customer, uuid)

    def _settled(self, customer: _Customer, uuid: str) -> str:
        deadline = time.monotonic() + END_MAX_S
        while True:
            answer = self._get(customer, f"/instances/{uuid}")
            if answer is not None and answer["data"]["status"] in CHANGES:
                return str(answer["data"]["status"])
            assert time.monotonic() < deadline, f"{uuid} is never in a state of its own: {answer}"
            time.sleep(PAUSE_S)

    def _insist(
        self,
        customer: _Customer,
        method: str,
        path: str,
        body: dict[str, Any],
        guest: str | None = None,
    ) -> dict[str, Any] | None:
        """The answer that accepts the call, repeated under its key until it comes; None: it does not suit `guest`."""
        key, deadline = str(uuid4()), time.monotonic() + ACCEPT_MAX_S
        while True:
            answer = customer.http.request(
                method, path, json=body, headers={"Idempotency-Key": key}
            )
            self._count(answer, f"{method} {path}")
            if answer.is_success and answer.json().get("operation"):
                return dict(answer.json())
            assert answer.status_code in (409, 503), f"{method} {path}: {answer.text}"
            assert time.monotonic() < deadline, f"{method} {path} is never accepted: {answer.text}"
            time.sleep(PAUSE_S)
            if answer.status_code == 409 and guest is not None:
                return None

    def _wait(self, customer: _Customer, operation: str) -> dict[str, Any]:
        deadline = time.monotonic() + END_MAX_S
        while True:
            answer = self._get(customer, f"/operations/{operation}")
            if answer is not None and answer["data"]["status"] in FINAL:
                return dict(answer["data"])
            assert time.monotonic() < deadline, f"operation {operation} never ends: {answer}"
            time.sleep(PAUSE_S)

    def _get(self, customer: _Customer, path: str) -> dict[str, Any] | None:
        answer = customer.http.get(path)
        self._count(answer, f"GET {path}")
        if answer.status_code == 503:
            return None
        assert answer.status_code == 200, f"GET {path}: {answer.text}"
        return dict(answer.json())

    def _count(self, answer: httpx.Response, call: str) -> None:
        with self._lock:
            self.statuses[answer.status_code] += 1
            if answer.status_code >= 500 and answer.status_code != 503:
                self.wrong.append(f"{call}: {answer.status_code} {answer.text}")


def _call(uuid: str, verb: str) -> tuple[str, str, dict[str, Any]]:
    """Method, path and body of a change."""
    path = f"/instances/{uuid}"
    if verb == "delete":
        return "DELETE", path, {"remove_ip": True, "remove_block_storage": True}
    if verb == "hostname":
        return "PUT", f"{path}/hostname", {"hostname": f"vm-{uuid4().hex[:8]}"}
    # A guest that still boots hears no power button: its power is cut.
    return "POST", f"{path}/{verb}", {"force": True} if verb in ("stop", "restart") else {}
