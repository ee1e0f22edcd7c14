"""Wire shapes of consoles."""

from __future__ import annotations

from pydantic import BaseModel, Field

from awan.kit.http import Timestamp


class ConsoleTicket(BaseModel):
    """How to reach the screen, once. The ticket must be used before it expires; an open console stays open.

    Ticket and password are shown once: in the repeat of a call, whatever holds one of them is null.
    """

    url: str | None = Field(
        description="The websocket, ticket included. It carries RFB 3.8 in binary messages."
    )
    token: str | None = Field(description="The ticket alone.")
    protocol: str = Field(description="Always `rfb`.")
    password: str | None = Field(description="What the RFB server asks for (VNC authentication).")
    expires_at: Timestamp
    page_url: str | None = Field(
        description="A page that shows the screen. Ticket and password stand behind `#`: no server sees them."
    )
