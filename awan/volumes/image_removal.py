"""Removing template images: the file of the control plane, and the copies on nodes.

template_image.remove   copies gone -> files gone          (no undo: a removal that failed can be asked for again)

One operation removes one image, or all of a template; which ones, their `removal_operation_id` says. An image on which
an instance is based stays: its disks read from the copy. From the moment the removal is accepted, no new instance gets
the image. Where another image has the same content, file and copies are that one's from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue import engines
from awan.catalogue.images import find_twin, incoming_path, lock_content
from awan.catalogue.models import ImageState, Template, TemplateImage
from awan.catalogue.service import stored_path
from awan.engines.hypervisor import NodeEndpoint
from awan.errors import Conflict, NotFound
from awan.events import record
from awan.fleet import Node, NodeImage, endpoint, forget_copies
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.ids import new_id
from awan.operations import Failure, Operation, Plan, Step, Target, begin, register
from awan.operations.models import FINAL, OperationStatus

COPIES_TIMEOUT_S = 60.0

# Instances belong to a room above, so this asks by name. One whose creation failed counts until it is deleted: its
# deletion still asks for the image.
_BASED_ON = text(
    """
    SELECT count(*) FROM (
        SELECT instance_id FROM instance WHERE image_id = ANY (:images) AND deleted_at IS NULL
        UNION
        SELECT coalesce(instance_id, volume_id) FROM volume
        WHERE image_id = ANY (:images) AND state <> 'deleted'
    ) AS dependent
    """
)


@dataclass(frozen=True)
class Copy:
    """An image that lies on a node."""

    node: NodeEndpoint
    location_id: int
    sha256: str


def begin_image_removal(
    session: Session, caller: Caller, image_id: UUID
) -> tuple[TemplateImage, Operation]:
    """Takes an image out of use and starts its removal.

    Raises: NotFound; Conflict while an instance is based on it, or while it is being checked or removed.
    """
    image = session.get(TemplateImage, image_id, with_for_update=True, populate_existing=True)
    if image is None or image.state == ImageState.REMOVED:
        raise NotFound("Image not found.")
    return image, _begin(session, caller, [image], "template_image", image_id)


def begin_template_removal(
    session: Session, caller: Caller, template_id: int
) -> tuple[Template, Operation]:
    """Takes a template off sale and starts the removal of all its images.

    Raises: NotFound; Conflict while an instance is based on one of them, or one is being checked or removed.
    """
    template = session.get(Template, template_id, with_for_update=True, populate_existing=True)
    if template is None or template.removed_at is not None:
        raise NotFound("Template not found.")
    _refuse_if_running(session, template.removal_operation_id, "The template is being removed.")
    images = session.scalars(
        select(TemplateImage)
        .where(TemplateImage.template_id == template_id, TemplateImage.state != ImageState.REMOVED)
        .order_by(TemplateImage.image_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    operation = _begin(session, caller, images, "template", new_id())
    template.is_enabled = False
    template.removal_operation_id = operation.operation_id
    session.flush()
    return template, operation


def _begin(
    session: Session,
    caller: Caller,
    images: Sequence[TemplateImage],
    kind: str,
    subject_id: UUID,
) -> Operation:
    for image in images:
        if image.state == ImageState.CHECKING:
            raise Conflict("An image is being checked; it can be removed afterwards.")
        _refuse_if_running(session, image.removal_operation_id, "The image is being removed.")
    dependents = session.scalar(_BASED_ON, {"images": [image.image_id for image in images]})
    if dependents:
        raise Conflict(
            f"{dependents} instances are based on it; it can be removed when they are gone."
        )
    for sha256 in sorted({image.sha256 for image in images if image.sha256 is not None}):
        lock_content(session, sha256)
    operation = begin(
        session,
        caller=caller,
        plan=REMOVE,
        resource=None,
        resource_kind=kind,
        subject_id=subject_id,
    )
    for image in images:
        image.state = ImageState.REMOVING
        image.refusal = None
        image.removal_operation_id = operation.operation_id
    session.flush()
    return operation


def _refuse_if_running(session: Session, operation_id: UUID | None, sentence: str) -> None:
    if operation_id is not None:
        operation = session.get_one(Operation, operation_id)
        if OperationStatus(operation.status) not in FINAL:
            raise Conflict(sentence)


def remove_copies(target: Target) -> None:
    """No copy of the images lies on a node, nor does a row say so; copies of a twin stay, as the twin's."""
    with transaction() as session:
        copies = [
            copy for image in _images(session, target) for copy in _copies_to_remove(session, image)
        ]
    for copy in copies:
        with transaction() as session:
            volumes = engines(session, copy.location_id).volumes
        volumes.delete_image(copy.node, copy.sha256)
        with transaction() as session:
            forget_copies(session, copy.node.node_id, copy.sha256)


def _copies_to_remove(session: Session, image: TemplateImage) -> list[Copy]:
    if image.sha256 is None:
        return []
    twin = find_twin(session, image)
    if twin is not None:
        _hand_over(session, image, twin)
        return []
    nodes = session.scalars(
        select(Node)
        .join(NodeImage, NodeImage.node_id == Node.node_id)
        .where(NodeImage.image_id == image.image_id)
        .order_by(Node.name)
    )
    return [Copy(endpoint(node), node.location_id, image.sha256) for node in nodes]


def _hand_over(session: Session, image: TemplateImage, twin: TemplateImage) -> None:
    held = (
        delete(NodeImage).where(NodeImage.image_id == image.image_id).returning(NodeImage.node_id)
    )
    for node_id in session.scalars(held).all():
        session.execute(
            insert(NodeImage)
            .values(node_id=node_id, image_id=twin.image_id)
            .on_conflict_do_nothing()
        )


def remove_files(target: Target) -> None:
    """The control plane keeps no file of the images either, except a twin's."""
    with transaction() as session:
        for image in _images(session, target):
            incoming_path(image.image_id).unlink(missing_ok=True)
            if image.sha256 is not None and find_twin(session, image) is None:
                stored_path(image.sha256).unlink(missing_ok=True)


def _images(session: Session, target: Target) -> Sequence[TemplateImage]:
    return session.scalars(
        select(TemplateImage)
        .where(TemplateImage.removal_operation_id == target.operation_id)
        .order_by(TemplateImage.image_id)
    ).all()


def mark_removed(session: Session, target: Target) -> None:
    """The images are gone, and the template when it was asked for; the rows stay for instances of the past."""
    actor = session.get_one(Operation, target.operation_id).actor
    removed: list[tuple[str, dict[str, str | int]]] = []
    for image in _images(session, target):
        image.state = ImageState.REMOVED
        removed.append(("template_image.removed", {"image": str(image.image_id)}))
    for template in session.scalars(
        select(Template).where(Template.removal_operation_id == target.operation_id)
    ):
        template.removed_at = now()
        removed.append(("template.removed", {"template_id": template.template_id}))
    for kind, data in removed:
        record(
            session,
            kind=kind,
            actor=actor,
            account_id=None,
            operation_id=target.operation_id,
            data=data,
        )


def mark_not_removed(session: Session, target: Target, failure: Failure) -> None:
    """A removal that could not be finished stays wanted: the images stay out of use and say why they are there."""
    for image in _images(session, target):
        image.refusal = failure.detail


REMOVE = register(
    Plan(
        workflow="template_image.remove.v1",
        kind="template_image.remove",
        steps=(
            Step(
                "copies",
                remove_copies,
                percent=10,
                timeout_s=COPIES_TIMEOUT_S,
                cancellable=False,
            ),
            Step("files", remove_files, percent=90, cancellable=False),
        ),
        succeed=mark_removed,
        fail=mark_not_removed,
        deadline_s=600,
    )
)
