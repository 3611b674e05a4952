"""Which KV blocks are free, who shares them, and which free ones still hold a prefix worth reusing.

A block is in one of three states: used (referenced by sequences), idle (free, but its content can be found by
its digest) or clean (free, nothing to find). Every operation on a block takes constant time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import cast

from engine.errors import IntegrityError


class BlockPool:
    """Ids 0 .. num_blocks - 1. Clean blocks are taken first, then the idle one that was released longest ago."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._clean = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest release first

    @property
    def num_free(self) -> int:
        return len(self._clean) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._idle)

    def references(self, block: int) -> int:
        return self._references[block]

    def take(self) -> int:
        """A block for one owner; evicts the oldest idle one if none is clean. Raises IntegrityError if none is free."""
        if self._clean:
            block = self._clean.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            raise IntegrityError("a block was taken from a pool that has none free")
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner for a block that is used or idle."""
        if self._references[block] == 0:
            if block not in self._idle:
                raise IntegrityError(f"block {block} holds nothing that could be shared")
            del self._idle[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One owner less. Release a sequence's blocks last one first, so that long suffixes are evicted first."""
        if self._references[block] <= 0:
            raise IntegrityError(f"block {block} was freed twice")
        self._references[block] -= 1
        if self._references[block]:
            return
        if self._digests[block] is None:
            self._clean.append(block)
        else:
            self._idle[block] = None

    def lookup(self, digest: bytes) -> int | None:
        """The block that holds this content, used or idle."""
        return self._by_digest.get(digest)

    def lookup_chain(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the leading digests that can be found; a lookup each, without Python in between."""
        found = [*map(self._by_digest.get, digests)]
        return cast("list[int]", found[: found.index(None)] if None in found else found)

    def count_unused(self, blocks: Sequence[int]) -> int:
        """How many of these blocks no sequence holds."""
        return [*map(self._references.__getitem__, blocks)].count(0)

    def publish(self, block: int, digest: bytes) -> None:
        """Let a used block be found. The first block with a digest keeps it; a block never changes its own."""
        if self._references[block] <= 0:
            raise IntegrityError(f"block {block} was published while free")
        if self._digests[block] is None and digest not in self._by_digest:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def unpublish(self, block: int) -> None:
        """Make sure that a block can't be found any more; its owners keep it."""
        if block in self._idle:
            del self._idle[block]
            self._clean.append(block)
        self._forget(block)

    def unpublish_all(self) -> int:
        """No block can be found any more; owners keep theirs. Returns how many could be found."""
        found = list(self._by_digest.values())
        for block in found:
            self.unpublish(block)
        return len(found)

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None

    def check(self, owners: Mapping[int, int]) -> None:
        """Recount; `owners`: how many sequences hold a block, by block. Raises IntegrityError with details."""
        for block, count in enumerate(self._references):
            held = owners.get(block, 0)
            if count != held:
                raise IntegrityError(f"block {block} counts {count} references, but {held} sequences hold it")
        unused = sorted(block for block, count in enumerate(self._references) if count == 0)
        if unused != sorted([*self._clean, *self._idle]):
            raise IntegrityError(f"unused: {unused}, but clean: {self._clean} and idle: {list(self._idle)}")
        published = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        if published != self._by_digest:
            raise IntegrityError("the map from digests to blocks does not match the blocks' own digests")
        wrong = [block for block in unused if (self._digests[block] is None) == (block in self._idle)]
        if wrong:
            raise IntegrityError(f"free blocks in the wrong list for whether they can be found: {wrong}")
