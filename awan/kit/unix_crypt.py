"""SHA-512 crypt by the system's own library, libxcrypt: it takes a third of the time of the same in Python, and other
threads go on meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import string

from passlib.hash import sha512_crypt

# sizeof(struct crypt_data), crypt(3).
DATA_BYTES = 32768
PASSWORD_MAX_BYTES = 511
"""Longer ones are refused by the library."""
SALT_LETTERS = string.digits + string.ascii_letters + "./"
SALT_LENGTH = 16
ROUNDS = 5000
"""The scheme's own number, crypt(5): more would slow each login of a one-CPU guest."""


def _open_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libcrypt.so.1", use_errno=True)
        library.crypt_rn.argtypes = [
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        library.crypt_rn.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


_library = _open_library()


def crypt_sha512(password: str) -> str:
    """The SHA-512 crypt hash ($6$) of the password with a new random salt, as /etc/shadow holds it.

    In Python where the system has no libxcrypt. Raises: ValueError for a password with a NUL, or longer than
    `PASSWORD_MAX_BYTES`.
    """
    text = password.encode()
    if b"\0" in text or len(text) > PASSWORD_MAX_BYTES:
        raise ValueError(f"a password has no NUL and at most {PASSWORD_MAX_BYTES} bytes")
    salt = "".join(secrets.choice(SALT_LETTERS) for _ in range(SALT_LENGTH))
    if _library is None:
        return str(sha512_crypt.using(rounds=ROUNDS, salt=salt).hash(password))  # type: ignore[no-untyped-call]
    data = ctypes.create_string_buffer(DATA_BYTES)
    found: bytes | None = _library.crypt_rn(text, f"$6${salt}".encode(), data, DATA_BYTES)
    if found is None:
        raise ValueError(f"the password cannot be hashed: {os.strerror(ctypes.get_errno())}")
    return found.decode("ascii")
