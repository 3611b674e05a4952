"""Block tables: finds a sequence's cached prefix, grows its table, publishes what is final, gives all back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import lcm

from engine.errors import IntegrityError
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.hashing import BlockHasher
from engine.types import Sequence


class KVManager:
    """Tables are append-only between `admit` and `release`; with `prefix_cache` off nothing is hashed at all.

    What is shared are groups of blocks, as few as hold whole units: where the KV of `unit` positions becomes final
    together, a position's KV depends on tokens behind its own block. So a block's digest covers its whole group,
    groups are found and published whole, and a block is never taken for one of another group that begins like it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, hash_seed: bytes, *, prefix_cache: bool, unit: int = 1
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.share_size = lcm(block_size, unit)  # tokens of a group
        self._group = self.share_size // block_size  # its blocks
        self._hasher = BlockHasher(hash_seed)

    def match(self, seq: Sequence) -> list[int]:
        """Published blocks that hold the leading tokens of a waiting sequence. Takes none of them yet.

        At least one token is always left to compute, because a step that feeds nothing can't say what follows.
        A request for prompt log-probabilities reuses only positions whose log-probabilities it has already had, and one
        that reads only those before the first that it reads.
        """
        if not self.prefix_cache:
            return []
        usable = seq.num_tokens - 1
        if seq.request.sampling.prompt_logprobs is not None and seq.num_scored < len(seq.request.prompt_ids) - 1:
            usable = seq.num_scored
        if seq.request.reading is not None:
            usable = min(usable, seq.request.reading.first_needed(seq.num_tokens))
        most = usable // self.share_size * self._group
        found = self.pool.lookup_chain(seq.digests[:most])
        if len(found) == len(seq.digests):  # hash no more than what may be found
            for index in range(len(found), most):
                block = self.pool.lookup(self._digest(seq, index))
                if block is None:
                    break
                found.append(block)
        return found[: len(found) // self._group * self._group]

    def shortage(self, found: list[int], end: int) -> int:
        """Free blocks that are missing to admit a sequence with these matched blocks up to position `end`."""
        return self._blocks(end) - len(found) + self.pool.count_unused(found) - self.pool.num_free

    def admit(self, seq: Sequence, found: list[int], end: int) -> None:
        """Give a sequence its matched blocks and fresh ones up to position `end`; there must be no shortage."""
        for block in found:
            self.pool.share(block)
        seq.block_ids.extend(found)
        seq.block_table = tuple(found)
        seq.num_computed = seq.num_reserved = len(found) * self.block_size
        seq.num_published = len(found)
        self.grow(seq, end)

    def grow(self, seq: Sequence, end: int) -> bool:
        """Cover positions 0 .. end - 1. False, and nothing changed, if the pool has too few free blocks."""
        held = len(seq.block_ids)
        if end <= held * self.block_size:  # nearly always
            return True
        missing = self._blocks(end) - held
        if missing > self.pool.num_free:
            return False
        seq.block_ids.extend([self.pool.take() for _ in range(missing)])
        seq.block_table = tuple(seq.block_ids)
        return True

    def publish(self, seq: Sequence) -> None:
        """Let every full block be found whose KV is final; such positions hold committed tokens."""
        if not self.prefix_cache:
            return
        full = seq.num_computed // self.share_size * self._group
        if full <= seq.num_published:
            return
        for index in range(seq.num_published, full):
            self.pool.publish(seq.block_ids[index], self._digest(seq, index))
        seq.num_published = full

    def withdraw(self, seq: Sequence) -> None:
        """Its KV is in doubt: no block of it, its own or matched, may be found from now on."""
        for block in seq.block_ids:
            self.pool.unpublish(block)

    def release(self, seq: Sequence) -> None:
        """Give all blocks back, the last one first; what was published stays findable until it is evicted."""
        for block in reversed(seq.block_ids):
            self.pool.release(block)
        seq.block_ids.clear()
        seq.block_table = ()
        seq.num_computed = seq.num_reserved = seq.num_published = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Recount every block against the block tables. Raises IntegrityError with details."""
        owners: Counter[int] = Counter()
        for seq in sequences:
            if seq.block_table != tuple(seq.block_ids):
                raise IntegrityError(f"{seq.request.id}: the planned block table is not the sequence's own")
            if len(set(seq.block_ids)) != len(seq.block_ids):
                raise IntegrityError(f"{seq.request.id}: a block stands twice in the block table {seq.block_ids}")
            if self._blocks(max(seq.num_computed, seq.num_reserved)) > len(seq.block_ids):
                raise IntegrityError(f"{seq.request.id}: {seq.num_reserved} positions in {len(seq.block_ids)} blocks")
            owners.update(seq.block_ids)
        self.pool.check(owners)

    def _blocks(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def _digest(self, seq: Sequence, index: int) -> bytes:
        """Digest of block `index` of a group that is full; hashes each group of a sequence once in its life.

        The first block of a group has the digest of all the group's tokens, the others that of their place in it.
        """
        digests, size = seq.digests, self.share_size
        while len(digests) <= index:
            start = len(digests) * self.block_size
            parent = digests[-self._group] if digests else self._hasher.root(seq.request.cache_salt)
            whole = self._hasher.extend(parent, seq.ids(start, start + size))
            digests.append(whole)
            digests.extend(self._hasher.extend(whole, (place,)) for place in range(1, self._group))
        return digests[index]
