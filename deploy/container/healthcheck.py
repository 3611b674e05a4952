"""The image's HEALTHCHECK, with the standard library alone: exit status 0 while GET /health answers 200, else 1."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import sys

TIMEOUT = 2.0  # seconds; the image's HEALTHCHECK gives 3 to the whole process
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def main() -> int:
    """Ask the server where it listens by its environment."""
    connection, place = _connection()
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = response.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        sys.stdout.write(f"no answer from {place}: {error}\n")
        return 1
    finally:
        connection.close()
    sys.stdout.write(f"{response.status} {body}\n")  # `docker inspect` shows it
    return 0 if response.status == 200 else 1


def _connection() -> tuple[http.client.HTTPConnection, str]:
    """To SLIPSTREAM_UDS, or to SLIPSTREAM_HOST and SLIPSTREAM_PORT, with TLS where there is a SLIPSTREAM_TLS_CERT."""
    if path := os.environ.get("SLIPSTREAM_UDS"):
        return _UnixConnection(path), path
    host = os.environ.get("SLIPSTREAM_HOST", "")
    port = int(os.environ.get("SLIPSTREAM_PORT") or 8000)
    address = (_EVERYWHERE.get(host, host), port)
    if os.environ.get("SLIPSTREAM_TLS_CERT"):
        unchecked = ssl._create_unverified_context()  # it is our own; the name in it is not the loopback's
        return http.client.HTTPSConnection(*address, timeout=TIMEOUT, context=unchecked), f"port {port}"
    return http.client.HTTPConnection(*address, timeout=TIMEOUT), f"port {port}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


if __name__ == "__main__":
    sys.exit(main())
