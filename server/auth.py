"""API keys. Every route that is made of `server.body.GuardedRoute` asks for one when the server has any.

Open without a key: `/`, /health, /ready, /version, /metrics, the OpenAPI pages and CORS preflights. /metrics is open
because scrapers seldom carry keys, and it tells load and model names but nothing of any request; keep it away
from the public at the proxy.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from server.errors import ApiError

HOW = "Put your key in an Authorization header, as in 'Authorization: Bearer YOUR_KEY'."
CALLER = "slipstream.caller"  # in the scope of a request that was let in: what `KeyRing.check` has returned


class KeyRing:
    """Knows the digests of the accepted keys. Every comparison takes the same time whatever is presented."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def check(self, authorization: str | None, x_api_key: str | None = None) -> str:
        """Who asks: a name for the caller's key that does not tell it; empty where no keys are set.

        The headers are latin-1 text; a bearer token counts before the X-Api-Key that Anthropic's clients send.
        Raises ApiError 401 unless one of them is an accepted key.
        """
        if not self._digests:
            return ""
        scheme, _, presented = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            presented = x_api_key or ""
        if not presented.strip():
            raise _unauthorized(f"You didn't provide an API key. {HOW}")
        digest = _digest(presented.strip().encode("latin-1", "replace"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _unauthorized("Incorrect API key provided.")
        return digest.hex()


def caller_id(key: str) -> str:
    """What `KeyRing.check` returns of this key."""
    return _digest(key.encode()).hex()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
