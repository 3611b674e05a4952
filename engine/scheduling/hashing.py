"""Digests of KV blocks: a chain, so that equal digests mean equal tokens from the first position on.

BLAKE2b with a secret key that is drawn at every start, 128 bits: neither chance nor a client that knows the
source can make two different prefixes meet, so a hit needs no comparison of tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


class BlockHasher:
    """digest(block) = H(digest of the block before it, its token ids); the chain starts at H(cache salt)."""

    def __init__(self, seed: bytes) -> None:
        assert 16 <= len(seed) <= blake2b.MAX_KEY_SIZE, "the seed must have 16 to 64 bytes"
        self._root = blake2b(digest_size=DIGEST_BYTES, key=seed, person=b"root")
        self._block = blake2b(digest_size=DIGEST_BYTES, key=seed, person=b"block")

    def root(self, cache_salt: str) -> bytes:
        """What stands before the first block of every sequence with this salt."""
        state = self._root.copy()
        state.update(cache_salt.encode("utf-8", "surrogatepass"))
        return state.digest()

    def extend(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The digest of the block that follows `parent` and holds `token_ids` (each within 64 bits)."""
        state = self._block.copy()
        state.update(parent)
        state.update(array("q", token_ids).tobytes())
        return state.digest()
