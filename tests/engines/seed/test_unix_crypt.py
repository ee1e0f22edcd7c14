"""Hashes of passwords, by the library that checks them at a login and without it; each compared with the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from passlib.hash import sha512_crypt

from awan.kit import unix_crypt
from awan.kit.unix_crypt import PASSWORD_MAX_BYTES, crypt_sha512


@pytest.fixture(params=["library", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's library, which Debian has, and on a system that has none."""
    assert unix_crypt._library is not None
    if request.param == "python":
        monkeypatch.setattr(unix_crypt, "_library", None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("password", ["simple", "é漢字😀", "x" * PASSWORD_MAX_BYTES, " ", ""])
def test_it_is_the_hash_of_the_password(password: str) -> None:
    stored = crypt_sha512(password)
    assert sha512_crypt.verify(password, stored)
    assert not sha512_crypt.verify(password + "x", stored)
    assert len(stored.split("$")[2]) == 16
    assert crypt_sha512(password) != stored, "the salt must be new each time"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("password", ["a\0b", "x" * (PASSWORD_MAX_BYTES + 1), "é" * 256])
def test_what_would_be_cut_short_is_refused(password: str) -> None:
    with pytest.raises(ValueError, match="password"):
        crypt_sha512(password)


def test_the_library_is_asked_and_takes_as_much_as_we_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_crypt, "sha512_crypt", None)
    assert crypt_sha512("x" * PASSWORD_MAX_BYTES).startswith("$6$")


def test_threads_do_not_mix_their_hashes() -> None:
    passwords = [f"Password-{number}" for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(crypt_sha512, passwords))
    assert all(map(sha512_crypt.verify, passwords, stored))
