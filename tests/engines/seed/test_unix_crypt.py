"""Hashes of passwords, by the library that checks them at a login; compared with another implementation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from passlib.hash import sha512_crypt

from awan.kit.unix_crypt import crypt_sha512


@pytest.mark.parametrize("password", ["simple", "é漢字😀", "x" * 511, " ", ""])
def test_it_is_the_hash_of_the_password(password: str) -> None:
    stored = crypt_sha512(password)
    assert sha512_crypt.verify(password, stored)
    assert not sha512_crypt.verify(password + "x", stored)
    assert crypt_sha512(password) != stored, "the salt must be new each time"


@pytest.mark.parametrize("password", ["a\0b", "x" * 512])
def test_what_would_be_cut_short_is_refused(password: str) -> None:
    with pytest.raises(ValueError, match="password"):
        crypt_sha512(password)


def test_threads_do_not_mix_their_hashes() -> None:
    passwords = [f"Password-{number}" for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(crypt_sha512, passwords))
    assert all(map(sha512_crypt.verify, passwords, stored))
