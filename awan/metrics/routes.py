"""Operation 5 of the public API, and what Prometheus reads."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse

from awan.accounts import Caller, authenticated, operator
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, answer, query_of
from awan.metrics import export, service
from awan.metrics.schemas import RrdData, RrdQuery
from awan.resources import ResourceKind, in_path

router = APIRouter(tags=["Instance"])
root_router = APIRouter(tags=["Health"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")


@router.get("/instances/{instance_uuid:uuid}/rrd", response_model=Envelope[RrdData])
def get_instance_rrd(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: RrdQuery = Depends(query_of(RrdQuery, path_check=_check_path)),
) -> Answer:
    """Get RRD data: what the instance used, step by step. What was not measured is null."""
    with transaction() as session:
        data = service.chart(
            session, caller, instance_uuid, periode=query.periode, consolidation=query.cf
        )
    return answer("RRD data", data)


@router.get("/metrics/instances", response_class=PlainTextResponse)
def get_instance_metrics(
    caller: Caller = Depends(authenticated("read", or_bearer=True)),
) -> Response:
    """The newest figures of all your instances in Prometheus' text format.

    The key may also come as `Authorization: Bearer`. Counters begin anew when an instance starts.
    """
    with transaction() as session:
        text = export.of_account(session, caller.account_id)
    return Response(text, media_type=export.CONTENT_TYPE)


@root_router.get("/metrics", include_in_schema=False)
def get_control_plane_metrics(
    caller: Caller = Depends(operator("read", or_bearer=True)),
) -> Response:
    """The control plane in Prometheus' text format, with an operator's key, also as `Authorization: Bearer`.

    Calls are counted by the process that answers; all else is read from the database and the same everywhere.
    """
    with transaction() as session:
        text = export.of_control_plane(session)
    return Response(text, media_type=export.CONTENT_TYPE)
