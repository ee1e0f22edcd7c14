"""`DELETE /admin/images` and `/admin/templates`: what is no longer to be installed goes, with its copies on nodes."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from sqlalchemy.orm import Session

from awan.accounts import Caller, idempotent, operator
from awan.catalogue.images import list_images
from awan.catalogue.models import Template, TemplateImage
from awan.catalogue.present import show_image, show_template
from awan.catalogue.schemas import ImageView, TemplateView
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    PathId,
    Request,
    answer,
    form_body,
)
from awan.operations import Operation, summary, wait_for_success
from awan.operations.models import OperationStatus
from awan.settings import get_settings
from awan.volumes.image_removal import begin_image_removal, begin_template_removal

admin_router = APIRouter()


@admin_router.delete("/images/{image_uuid:uuid}", response_model=Envelope[ImageView])
def remove_image(
    image_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Remove an image on which no instance is based: its file, and its copies on nodes.

    No new instance gets it from now on. 409 while an instance is based on it, or when a node did not let go of its
    copy: the image then stays `removing`, and the removal can be asked for again.
    """

    def show(session: Session) -> ImageView:
        return show_image(session.get_one(TemplateImage, image_uuid))

    return _remove(
        request,
        caller,
        "Image removed",
        image_uuid,
        lambda session: begin_image_removal(session, caller, image_uuid)[1],
        show,
    )


@admin_router.delete("/templates/{template_id}", response_model=Envelope[TemplateView])
def remove_template(
    template_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Remove a template with all its images, as `DELETE /admin/images/{image_uuid}` does with one.

    It is off sale from now on. 409 while an instance is based on one of its images.
    """

    def show(session: Session) -> TemplateView:
        template = session.get_one(Template, template_id)
        return show_template(template, list_images(session, template_id))

    return _remove(
        request,
        caller,
        "Template removed",
        template_id,
        lambda session: begin_template_removal(session, caller, template_id)[1],
        show,
    )


def _remove(
    request: Request,
    caller: Caller,
    message: str,
    thing_id: UUID | int,
    start: Callable[[Session], Operation],
    show: Callable[[Session], BaseModel],
) -> Answer:
    """The thing as its removal left it; 202 when that takes longer. Raises: Conflict with the reason when it failed."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            operation = session.get_one(Operation, call.earlier.operation_id)
        else:
            operation = start(session)
            shown = OperationView(**summary(operation))
            call.keep(answer(message, None, operation=shown), thing_id)
    ended = wait_for_success(operation.operation_id, get_settings().operation_wait_s)
    with transaction() as session:
        view = show(session)
    return answer(
        message,
        view,
        status=200 if ended.status == OperationStatus.SUCCEEDED else 202,
        operation=OperationView(**summary(ended)),
    )
