"""crypt(3) of the system's own library, libxcrypt: it takes a third of the time of the same in Python, and others of
this process go on meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import string

# Debian's libc6 depends on it.
_LIBRARY = ctypes.CDLL("libcrypt.so.1", use_errno=True)
_LIBRARY.crypt_rn.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
_LIBRARY.crypt_rn.restype = ctypes.c_char_p
# sizeof(struct crypt_data), crypt(3).
_DATA_BYTES = 32768

SHA512 = "$6$"
"""The scheme that every Linux guest knows. 5,000 rounds, as none are named, crypt(5): more would slow each login of a
one-CPU guest.
"""
SALT_LETTERS = string.digits + string.ascii_letters + "./"
SALT_LENGTH = 16


def crypt_sha512(password: str) -> str:
    """The SHA-512 crypt hash of the password with a new random salt, as /etc/shadow holds it.

    Raises: ValueError for a password that the library does not take: with a NUL, or longer than 512 bytes.
    """
    salt = "".join(secrets.choice(SALT_LETTERS) for _ in range(SALT_LENGTH))
    text = password.encode()
    if b"\0" in text:
        raise ValueError("a password cannot hold NUL")
    data = ctypes.create_string_buffer(_DATA_BYTES)
    found = _LIBRARY.crypt_rn(text, f"{SHA512}{salt}".encode(), data, _DATA_BYTES)
    if found is None:
        raise ValueError(f"the password cannot be hashed: {os.strerror(ctypes.get_errno())}")
    return str(found, "ascii")
