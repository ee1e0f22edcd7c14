"""Answers of quick calls: those that wait for their operation, and then say how it ended."""

from __future__ import annotations

from uuid import UUID

from awan.errors import Conflict, OperationFailed, Unavailable
from awan.operations.models import Operation, OperationStatus
from awan.operations.watch import wait_for_end
from awan.settings import get_settings


def wait_for_success(operation_id: UUID) -> Operation:
    """The operation once it has succeeded, or as it stands after `operation_wait_s`: the answer is then 202.

    Blocks; call it outside transactions. Raises: Conflict when the state of the thing did not allow it, or it was
    cancelled; Unavailable when an engine did not answer; OperationFailed.
    """
    operation = wait_for_end(operation_id, get_settings().operation_wait_s)
    message = operation.error_message or "The operation failed."
    if operation.status == OperationStatus.CANCELLED or (
        operation.status == OperationStatus.FAILED and operation.error_type == Conflict.type
    ):
        raise Conflict(message)
    if operation.status == OperationStatus.FAILED:
        kind = Unavailable if operation.error_type == Unavailable.type else OperationFailed
        raise kind(message)
    return operation


def status_of(operation: Operation) -> int:
    """200 for an operation that has succeeded, 202 for one that goes on."""
    return 200 if operation.status == OperationStatus.SUCCEEDED else 202
