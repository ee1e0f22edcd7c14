"""OVSDB over TLS, with keys of its own for each location.

The library knows one set of keys for the whole process. Here each set gets a stream class under a name of its own, and
the library's is set and used under a lock while a connection is opened. The server's certificate must be signed by the
given authority; its name is not compared, as everywhere in OVN.
"""

from __future__ import annotations

import errno
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovs import poller, stream

SCHEME = "ssl:"


@dataclass(frozen=True)
class TlsKeys:
    """PEM files by which we show who we are and know the servers. Read at each connection, so they may be renewed."""

    private_key: Path
    certificate: Path
    ca_certificate: Path

    def check(self) -> None:
        """Raises: OSError (also ssl.SSLError) when they cannot be read or do not belong together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.ca_certificate)
        context.load_cert_chain(self.certificate, self.private_key)


_lock = threading.Lock()
_schemes: dict[TlsKeys, str] = {}


def private_remote(remote: str, keys: TlsKeys | None) -> str:
    """The (comma-separated) remotes with each `ssl:` replaced by the scheme under which the library uses these keys."""
    if keys is None:
        return remote
    scheme = _scheme_of(keys)
    return ",".join(
        f"{scheme}:{one.removeprefix(SCHEME)}" if one.startswith(SCHEME) else one
        for one in remote.split(",")
    )


def _scheme_of(keys: TlsKeys) -> str:
    with _lock:
        if keys not in _schemes:
            scheme = f"ssl-{len(_schemes)}"
            stream.Stream.register_method(scheme, _stream_class(keys))
            _schemes[keys] = scheme
        return _schemes[keys]


def _stream_class(keys: TlsKeys) -> type[Any]:
    class KeyedStream(stream.SSLStream):  # type: ignore[misc]
        @staticmethod
        def _open(suffix: str, dscp: int) -> tuple[int, Any]:
            with _lock:
                stream.Stream.ssl_set_private_key_file(str(keys.private_key))
                stream.Stream.ssl_set_certificate_file(str(keys.certificate))
                stream.Stream.ssl_set_ca_cert_file(str(keys.ca_certificate))
                try:
                    opened: tuple[int, Any] = stream.SSLStream._open(suffix, dscp)
                except OSError as err:
                    # Files that are just being exchanged: an attempt that failed, and the next one comes.
                    return err.errno or errno.EIO, None
                return opened

        _waits_for_handshake = False

        def connect(self) -> int:
            error: int = super().connect()
            is_open = self.state == stream.Stream._Stream__S_CONNECTED
            self._waits_for_handshake = is_open and error == errno.EAGAIN
            return error

        def wait(self, waiter: Any, wait: int) -> None:
            if self._waits_for_handshake:
                # It waits for the server; a socket that can be written to would wake us at once, for ever.
                waiter.fd_wait(self.socket, poller.POLLIN)
            elif wait == stream.Stream.W_RECV and self.socket.pending():
                # What is decrypted already does not make the socket readable again.
                waiter.immediate_wake()
            else:
                super().wait(waiter, wait)

    return KeyedStream
