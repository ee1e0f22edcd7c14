"""Wire shapes of the event stream."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field

from awan.events import Position
from awan.kit.forms import Matching

WAIT_MAX_S = 86400
FORM = Matching("^[0-9]+-[0-9]+$", "The position must be the id of an event of the stream.")


def check_position(text: str) -> str:
    """The text itself. Raises: ValueError when it is no position."""
    Position.parse(text)
    return text


class StreamQuery(BaseModel):
    """Where the stream begins and when it ends."""

    after: Annotated[str, FORM, AfterValidator(check_position)] | None = Field(
        None,
        max_length=40,
        description="Begin after this event (`id` of the stream, `position` of an event); `0-0` is the very"
        " beginning. Absent: what happens from now on. The header `Last-Event-ID` goes before it.",
    )
    wait_s: int | None = Field(
        None,
        ge=0,
        le=WAIT_MAX_S,
        description="End after so many seconds; 0 sends what there is. Absent: the stream goes on.",
    )
