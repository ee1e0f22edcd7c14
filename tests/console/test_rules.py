"""Tickets, passwords and origins."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.console.rules import (
    check_origin,
    node_password,
    read_ticket,
    ticket,
    viewer_password,
    websocket_origin,
)
from awan.engines.hypervisor.domain_xml import check_console_password
from awan.engines.rfb import respond
from awan.errors import Forbidden, Unauthenticated
from awan.settings import Settings
from tests.support.console_viewer import des_answer

OWN = ("https://cloud.example",)


def test_a_ticket_names_its_console_and_no_other(settings: Settings) -> None:
    console, other = uuid4(), uuid4()
    assert read_ticket(ticket(console)) == console
    for forged in (ticket(console)[:-1], ticket(console) + "x", console.hex, ""):
        with pytest.raises(Unauthenticated):
            read_ticket(forged)
    with pytest.raises(Unauthenticated):
        read_ticket(f"{console.hex}.{ticket(other).partition('.')[2]}")


@given(st.text(max_size=80))
def test_no_text_is_a_ticket_by_chance(text: str) -> None:
    with pytest.raises(Unauthenticated):
        read_ticket(text)


@pytest.fixture(autouse=True)
def _key(settings: Settings) -> None:
    """Everything is derived under the key file of the settings."""


def test_passwords_are_whole_and_differ(settings: Settings) -> None:
    console = UUID(int=7)
    passwords = {viewer_password(console), node_password(console), viewer_password(uuid4())}
    assert len(passwords) == 3
    for password in passwords:
        assert len(password) == 8
        check_console_password(password)


@given(
    st.binary(min_size=16, max_size=16),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12),
)
def test_answers_to_challenges(challenge: bytes, password: str) -> None:
    assert respond(challenge, password) == des_answer(challenge, password)


def test_an_answer_that_is_known() -> None:
    """DES of zeros under a password of zero bytes: the classic vector of FIPS 81's key of zeros."""
    assert respond(bytes(16), "") == bytes.fromhex("8ca64de9c1b123a7") * 2


@pytest.mark.parametrize(
    "origin",
    [None, "https://cloud.example", "https://CLOUD.example:443", "https://panel.example:8443"],
)
def test_pages_that_may(origin: str | None) -> None:
    check_origin(origin, own=OWN, others=["https://panel.example:8443"])


@pytest.mark.parametrize(
    "origin",
    [
        *("", "null", "http://cloud.example", "https://cloud.example.evil", "https://evil"),
        *("https://cloud.example:8443", "file://", "https://[", "https://cloud.example:x"),
        "chrome-extension://cloud.example",
    ],
)
def test_pages_that_may_not(origin: str) -> None:
    with pytest.raises(Forbidden):
        check_origin(origin, own=OWN, others=["https://panel.example:8443"])


def test_websockets_beside_pages() -> None:
    assert websocket_origin("https://cloud.example") == "wss://cloud.example"
    assert websocket_origin("http://127.0.0.1:8080") == "ws://127.0.0.1:8080"
