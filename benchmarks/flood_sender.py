"""Sends frames of ever new flows, or of ever new cards, at a steady rate: `benchmarks.flood` runs it as a process.

`python -m benchmarks.flood_sender SOCKET KIND RATE SECONDS FRAME`: the number of an open packet socket; `flows` or
`cards`; frames a second, 0 for as many as go; how long; the frame in hexadecimal, a TCP SYN over IPv4 with ports and
sequence number 0. Prints how many frames were sent and how many seconds that took.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

CARD, SOURCE_PORT, SEQUENCE_LOW = 6, 34, 40
PORTS_FIRST, PORTS = 1024, 60_000
STEP_S, STEP_FRAMES = 0.001, 200


def write_flow(frame: bytearray, number: int) -> None:
    """The ports of flow `number`; what they add to the checksum, the sequence number takes away."""
    source, target = PORTS_FIRST + number % PORTS, 1 + number // PORTS
    struct.pack_into("!HH", frame, SOURCE_PORT, source, target)
    struct.pack_into("!H", frame, SEQUENCE_LOW, -(source + target) % 0xFFFF)


def write_card(frame: bytearray, number: int) -> None:
    """A source address that no card of the location has."""
    struct.pack_into("!HI", frame, CARD, 0x0666, number)


def send(
    sock: socket.socket, frame: bytearray, *, kind: str, rate: int, seconds: float
) -> tuple[int, float]:
    """How many frames were sent, and in how many seconds."""
    write = {"flows": write_flow, "cards": write_card}[kind]
    sent = 0
    began_at = time.monotonic()
    while (passed := time.monotonic() - began_at) < seconds:
        due = int(rate * passed) if rate else sent + STEP_FRAMES
        for number in range(sent, due):
            write(frame, number)
            sock.send(frame)
        sent = max(sent, due)
        if rate:
            time.sleep(STEP_S)
    return sent, time.monotonic() - began_at


def main() -> None:
    """Reads the arguments, sends, and prints."""
    descriptor, kind, rate, seconds, frame = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as sock:
        sent, took = send(
            sock,
            bytearray.fromhex(frame),
            kind=kind,
            rate=int(rate),
            seconds=float(seconds),
        )
    print(sent, took)


if __name__ == "__main__":
    main()
