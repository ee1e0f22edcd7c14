"""Where a reader of the event log stands."""

from __future__ import annotations

import re
from dataclasses import dataclass

XID_MAX = 2**64 - 1
EVENT_ID_MAX = 2**63 - 1

_FORM = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,18})", re.ASCII)


@dataclass(frozen=True, order=True)
class Position:
    """After the event `event_id` of the transaction `xid`; `event_id` 0: before the first one of that transaction."""

    xid: int
    event_id: int

    def __str__(self) -> str:
        return f"{self.xid}-{self.event_id}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position that `str` wrote. Raises: ValueError when it is none."""
        match = _FORM.fullmatch(text)
        if match is None or int(match[1]) > XID_MAX or int(match[2]) > EVENT_ID_MAX:
            raise ValueError("The position must be the id of an event of the stream.")
        return cls(int(match[1]), int(match[2]))
