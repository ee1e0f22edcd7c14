"""SSH public keys whose private halves nobody has: well-formed lines with fixed content."""

from __future__ import annotations

import base64


def ed25519_line(number: int, comment: str = "test") -> str:
    """The line of the `number`-th key: always the same for the same number."""
    name = b"ssh-ed25519"
    point = number.to_bytes(32, "big")
    blob = len(name).to_bytes(4, "big") + name + len(point).to_bytes(4, "big") + point
    return f"ssh-ed25519 {base64.b64encode(blob).decode()} {comment}"


ED25519_KEYS = [ed25519_line(number) for number in range(1, 9)]
