"""Builds of templates: an uploaded file is kept aside, checked by a worker, and only then may be used.

Files lie below the setting `image_dir`, which API and workers share: `incoming/<image uuid>` while unchecked,
`<sha256>.qcow2` afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue.models import ImageState, Template, TemplateImage
from awan.engines.volumes import VolumeFormat
from awan.engines.volumes.qemu_img import check_image, normalize
from awan.errors import Conflict, NotFound
from awan.events import record
from awan.kit.database import transaction
from awan.operations import Failure, Operation, Plan, Step, Target, begin, register
from awan.settings import get_settings

IMPORT_TIMEOUT_S = 1800.0


def incoming_path(image_id: UUID) -> Path:
    """Where an upload is kept until it is checked."""
    return get_settings().image_dir / "incoming" / str(image_id)


def begin_import(
    session: Session,
    caller: Caller,
    *,
    template_id: int,
    image_id: UUID,
    declared_format: str,
    has_agent: bool,
) -> tuple[TemplateImage, Operation]:
    """The row of an uploaded file and the operation that checks it. Raises: NotFound (template)."""
    if session.get(Template, template_id) is None:
        raise NotFound("Template not found.")
    image = TemplateImage(
        image_id=image_id,
        template_id=template_id,
        state=ImageState.CHECKING,
        declared_format=declared_format,
        has_agent=has_agent,
    )
    session.add(image)
    session.flush()
    operation = begin(
        session,
        caller=caller,
        plan=IMPORT,
        resource=None,
        resource_kind="template_image",
        subject_id=image_id,
    )
    return image, operation


def list_images(session: Session, template_id: int) -> Sequence[TemplateImage]:
    """The builds of a template, newest first."""
    return session.scalars(
        select(TemplateImage)
        .where(TemplateImage.template_id == template_id)
        .order_by(TemplateImage.created_at.desc())
    ).all()


def delete_image(session: Session, caller: Caller, image_id: UUID) -> None:
    """Forgets a build that no disk is based on. Raises: NotFound, Conflict (in use, or being checked)."""
    image = session.get(TemplateImage, image_id, with_for_update=True)
    if image is None:
        raise NotFound("Image not found.")
    if image.state == ImageState.CHECKING:
        raise Conflict("The image is being checked.")
    if is_in_use(session, image_id):
        raise Conflict("Instances are based on the image; it can be removed when they are gone.")
    image.state = ImageState.REFUSED
    image.refusal = "Removed by the operator."
    record(
        session,
        kind="template_image.removed",
        actor=caller.actor,
        account_id=None,
        data={"image": str(image_id)},
    )


def is_in_use(session: Session, image_id: UUID) -> bool:
    """Whether a disk is based on the image. The tables of disks belong to rooms above, so this asks by name."""
    return bool(
        session.scalar(
            text(
                "SELECT EXISTS (SELECT 1 FROM volume WHERE image_id = :image AND state <> 'deleted')"
            ),
            {"image": image_id},
        )
    )


def check_upload(target: Target) -> None:
    """The file is what it was declared to be, has no reference to other files and sane sizes; stored as qcow2.

    Raises: Invalid with the reason, which the image keeps.
    """
    path, settings = incoming_path(target.subject_id), get_settings()
    with transaction() as session:
        image = session.get_one(TemplateImage, target.subject_id)
        if image.sha256 is not None:
            path.unlink(missing_ok=True)
            return
        declared: VolumeFormat = "raw" if image.declared_format == "raw" else "qcow2"
    check_image(
        path,
        declared,
        max_virtual_bytes=settings.image_virtual_max_bytes,
        max_file_bytes=settings.image_upload_max_bytes,
    )
    normal = path.with_suffix(".qcow2")
    facts = normalize(path, declared, normal)
    normal.replace(settings.image_dir / f"{facts.sha256}.qcow2")
    with transaction() as session:
        image = session.get_one(TemplateImage, target.subject_id, with_for_update=True)
        image.format = "qcow2"
        image.sha256 = facts.sha256
        image.size_bytes = facts.size_bytes
        image.virtual_size_bytes = facts.virtual_size_bytes
    path.unlink(missing_ok=True)


def discard_upload(target: Target) -> None:
    """Nothing of the upload is kept."""
    path = incoming_path(target.subject_id)
    path.unlink(missing_ok=True)
    path.with_suffix(".qcow2").unlink(missing_ok=True)


def mark_ready(session: Session, target: Target) -> None:
    """New instances get this build from now on."""
    session.get_one(TemplateImage, target.subject_id).state = ImageState.READY


def mark_refused(session: Session, target: Target, failure: Failure) -> None:
    """The build is never used; the reason stays."""
    image = session.get_one(TemplateImage, target.subject_id)
    image.state = ImageState.REFUSED
    image.refusal = failure.message


IMPORT = register(
    Plan(
        workflow="template.import.v1",
        kind="template.import",
        steps=(
            Step("check", check_upload, discard_upload, percent=10, timeout_s=IMPORT_TIMEOUT_S),
        ),
        succeed=mark_ready,
        fail=mark_refused,
        deadline_s=IMPORT_TIMEOUT_S,
    )
)
