"""How the API's server speaks websocket: as uvicorn does, and a refusal is no error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent


class RefusingWebSockets(WebSocketsSansIOProtocol):
    """Takes a handshake that was answered with an HTTP refusal for complete.

    uvicorn does not, and writes an error line after each: whoever has no ticket could fill the log.
    Source: github.com/Kludex/uvicorn, pull request 3138; with it this is not needed any more.
    """

    async def send(self, message: ASGISendEvent) -> None:
        """As uvicorn's. Raises: ClientDisconnected, RuntimeError."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True
