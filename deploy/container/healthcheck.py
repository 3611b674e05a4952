"""The image's HEALTHCHECK, with the standard library alone: exit status 0 while GET /health answers 200, else 1."""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT = 2.0  # seconds; the image's HEALTHCHECK gives 3 to the whole process
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def main() -> int:
    """Ask the server where it listens by its environment (SLIPSTREAM_HOST and SLIPSTREAM_PORT)."""
    host = os.environ.get("SLIPSTREAM_HOST", "")
    port = int(os.environ.get("SLIPSTREAM_PORT") or 8000)
    connection = http.client.HTTPConnection(_EVERYWHERE.get(host, host), port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = response.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        sys.stdout.write(f"no answer from port {port}: {error}\n")
        return 1
    finally:
        connection.close()
    sys.stdout.write(f"{response.status} {body}\n")  # `docker inspect` shows it
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
