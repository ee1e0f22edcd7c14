"""How the routes of instances answer: what was begun, what has ended by now, what was changed at once."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from sqlalchemy.orm import Session

from awan.accounts import Caller, once, replay
from awan.accounts.idempotency import EarlierAnswer
from awan.instances import service
from awan.instances.present import show_detail
from awan.kit.database import transaction
from awan.kit.http import Answer, OperationView, Request, answer
from awan.operations import Operation, summary
from awan.operations.quick import status_of, wait_for_success

GOES_ON = "The change was accepted and takes longer: follow its operation."


def operation_view(operation: Operation | None) -> OperationView | None:
    """The operation as answers show it."""
    return OperationView(**summary(operation)) if operation is not None else None


def again(session: Session, earlier: EarlierAnswer) -> Answer:
    """The answer of a call that was made before, with the instance and its operation as they are now."""
    data = show_detail(session, service.get_kept_view(session, UUID(earlier.resource_id)))
    operation = session.get(Operation, earlier.operation_id) if earlier.operation_id else None
    return replay(earlier, data, operation=operation_view(operation))


def quick_with_detail(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], Operation],
) -> Answer:
    """As `quick`, answered with the instance as it is afterwards."""
    ended = quick(request, caller, instance_id, change)
    with transaction() as session:
        data = show_detail(session, service.get_kept_view(session, instance_id))
    return answer(message, data, status=status_of(ended), operation=operation_view(ended))


def quick(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    change: Callable[[Session], Operation],
) -> Operation:
    """Begins a change and waits for its end. Raises: as `wait_for_success`.

    A repeat of the call waits for the same operation: of one that went on at the first answer, it tells the end.
    """

    def begin(session: Session) -> tuple[Answer, UUID]:
        return answer("", None, operation=operation_view(change(session))), instance_id

    def once_more(session: Session, earlier: EarlierAnswer) -> Answer:
        operation = session.get_one(Operation, earlier.operation_id)
        return replay(earlier, None, operation=operation_view(operation))

    first = once(request, caller, begin, once_more)
    assert first.operation is not None
    return wait_for_success(first.operation.uuid)


def changed(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], None],
) -> Answer:
    """A change of rows alone."""

    def make(session: Session) -> tuple[Answer, UUID]:
        change(session)
        data = show_detail(session, service.get_view(session, caller, instance_id))
        return answer(message, data), instance_id

    return once(request, caller, make, again)


def begun(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], Operation],
) -> Answer:
    """A change that an operation makes, which is not waited for."""

    def begin(session: Session) -> tuple[Answer, UUID]:
        operation = change(session)
        data = show_detail(session, service.get_view(session, caller, instance_id))
        return answer(message, data, status=202, operation=operation_view(operation)), instance_id

    return once(request, caller, begin, again)
