"""Routes of operations: how far a change is, and how it ended."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends

from awan.accounts import Caller, authenticated
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, answer, query_of
from awan.kit.pagination import PageRequest, paged
from awan.operations import service
from awan.operations.schemas import OperationDetail, OperationList, OperationQuery

router = APIRouter(tags=["Operation"])


@router.get("/operations", response_model=Envelope[OperationList])
def list_operations(
    caller: Caller = Depends(authenticated("read")),
    query: OperationQuery = Depends(query_of(OperationQuery)),
) -> Answer:
    """The account's operations, newest first. The operator sees everyone's."""
    page = PageRequest(query.page, query.limit)
    wanted = service.OperationFilter(query.status, query.resource, query.kind)
    with transaction() as session:
        rows, total = service.list_operations(session, caller, wanted, page)
    return answer("Operations", paged([OperationDetail.of(row) for row in rows], page, total))


@router.get("/operations/{uuid:uuid}", response_model=Envelope[OperationDetail])
def get_operation(uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """One operation: poll it until its status is `succeeded`, `failed` or `cancelled`."""
    with transaction() as session:
        row = service.get_operation(session, caller, uuid)
    return answer("Operation detail", OperationDetail.of(row))
