"""Builds of templates: an uploaded file is kept aside, checked by a worker, and only then may be used.

Files lie below the setting `image_dir`, which API and workers share: `incoming/<image uuid>` while unchecked,
`<sha256>.qcow2` afterwards. How they go again: `awan.volumes.image_removal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue.models import ImageState, Template, TemplateImage
from awan.catalogue.service import stored_path
from awan.engines.volumes import VolumeFormat
from awan.engines.volumes.qemu_img import check_image, normalize
from awan.errors import Conflict, NotFound
from awan.kit.database import transaction
from awan.operations import Failure, Operation, Plan, Step, Target, begin, register
from awan.settings import get_settings

IMPORT_TIMEOUT_S = 1800.0
_LOCK_CONTENT = text("SELECT pg_advisory_xact_lock(hashtext('awan.image'), hashtext(:sha256))")


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
    """The row of an uploaded file and the operation that checks it.

    Raises: NotFound (template), Conflict while the template is being removed.
    """
    # Locked against the template's removal until the image's row is there to be seen by it.
    template = session.get(
        Template,
        template_id,
        with_for_update={"read": True, "key_share": True},
        populate_existing=True,
    )
    if template is None or template.removed_at is not None:
        raise NotFound("Template not found.")
    if template.removal_operation_id is not None:
        raise Conflict("The template is being removed.")
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
    """The builds of a template that are not removed, newest first."""
    return session.scalars(
        select(TemplateImage)
        .where(TemplateImage.template_id == template_id, TemplateImage.state != ImageState.REMOVED)
        .order_by(TemplateImage.created_at.desc())
    ).all()


def stored_contents() -> frozenset[str]:
    """The SHA-256 of every checked image that the control plane keeps."""
    return frozenset(path.stem for path in get_settings().image_dir.glob(stored_path("*").name))


def lock_content(session: Session, sha256: str) -> None:
    """Until the transaction ends, no other one stores, or begins to remove, an image of this content."""
    session.execute(_LOCK_CONTENT, {"sha256": sha256})


def find_twin(session: Session, image: TemplateImage) -> TemplateImage | None:
    """Another image of the same content that is to stay, or None: whose the file and the copies are then."""
    return session.scalars(
        select(TemplateImage)
        .where(
            TemplateImage.sha256 == image.sha256,
            TemplateImage.image_id != image.image_id,
            TemplateImage.state.in_([ImageState.CHECKING, ImageState.READY]),
        )
        .order_by(TemplateImage.created_at)
        .limit(1)
    ).first()


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
    with transaction() as session:
        lock_content(session, facts.sha256)
        if _is_being_removed(session, facts.sha256):
            raise Conflict("An image of the same content is being removed; upload it again then.")
        image = session.get_one(TemplateImage, target.subject_id, with_for_update=True)
        normal.replace(stored_path(facts.sha256))
        image.format = "qcow2"
        image.sha256 = facts.sha256
        image.size_bytes = facts.size_bytes
        image.virtual_size_bytes = facts.virtual_size_bytes
    path.unlink(missing_ok=True)


def _is_being_removed(session: Session, sha256: str) -> bool:
    query = select(TemplateImage.image_id).where(
        TemplateImage.sha256 == sha256, TemplateImage.state == ImageState.REMOVING
    )
    return session.scalars(query.limit(1)).first() is not None


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
