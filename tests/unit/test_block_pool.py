"""The block pool: order of reuse, sharing, eviction, and guards against books that don't add up."""

from __future__ import annotations

import pytest

from engine.errors import IntegrityError
from engine.scheduling.block_pool import BlockPool


def cached(pool: BlockPool, *names: bytes) -> list[int]:
    """Take, publish and release one block per name, in this order."""
    blocks = [pool.take() for _ in names]
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
    for block in blocks:
        pool.release(block)
    return blocks


def test_clean_blocks_go_first_and_then_the_one_released_longest_ago() -> None:
    pool = BlockPool(4)
    a, b = cached(pool, b"a", b"b")
    assert (pool.num_free, pool.num_cached, pool.num_used) == (4, 2, 0)
    assert {pool.take(), pool.take()} == {0, 1, 2, 3} - {a, b}
    assert pool.lookup(b"a") == a
    assert pool.take() == a
    assert pool.lookup(b"a") is None and pool.lookup(b"b") == b
    assert pool.take() == b
    assert (pool.num_free, pool.num_cached, pool.num_used) == (0, 0, 4)


def test_a_hit_makes_a_block_the_youngest_again() -> None:
    pool = BlockPool(2)
    a, b = cached(pool, b"a", b"b")
    pool.share(a)
    pool.release(a)
    assert [pool.take(), pool.take()] == [b, a]


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.publish(block, b"a")
    pool.share(block)
    pool.release(block)
    assert pool.num_free == 0 and pool.references(block) == 1
    pool.release(block)
    assert pool.num_free == 1 and pool.lookup(b"a") == block


def test_the_first_block_with_a_digest_keeps_it() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.publish(first, b"b")
    assert pool.lookup(b"a") == first and pool.lookup(b"b") is None
    pool.release(second)
    assert pool.num_cached == 0, "a block that can't be found is clean"
    pool.check({first: 1})


def test_an_unpublished_block_is_not_found_whether_used_or_idle() -> None:
    pool = BlockPool(2)
    idle, used = cached(pool, b"a", b"b")
    pool.share(used)
    pool.unpublish(idle)
    pool.unpublish(used)
    assert pool.lookup(b"a") is None and pool.lookup(b"b") is None
    pool.check({used: 1})
    pool.release(used)
    pool.check({})
    assert pool.num_cached == 0


def test_all_blocks_are_unpublished_at_once() -> None:
    pool = BlockPool(4)
    cached(pool, b"a", b"b", b"c")
    used = pool.lookup(b"b")
    assert used is not None
    pool.share(used)
    assert pool.unpublish_all() == 3
    assert [pool.lookup(name) for name in (b"a", b"b", b"c")] == [None] * 3
    assert (pool.num_used, pool.num_free, pool.num_cached) == (1, 3, 0)
    pool.check({used: 1})
    assert pool.unpublish_all() == 0
    pool.release(used)
    pool.check({})


def test_guards() -> None:
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(IntegrityError, match="none free"):
        pool.take()
    pool.release(block)
    with pytest.raises(IntegrityError, match="freed twice"):
        pool.release(block)
    with pytest.raises(IntegrityError, match="could be shared"):
        pool.share(block)
    with pytest.raises(IntegrityError, match="published while free"):
        pool.publish(block, b"a")


def test_check_finds_each_kind_of_mismatch() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.publish(block, b"a")
    pool.check({block: 1})
    with pytest.raises(IntegrityError, match="2 sequences hold it"):
        pool.check({block: 2})
    pool._by_digest[b"b"] = block
    with pytest.raises(IntegrityError, match="digests"):
        pool.check({block: 1})
    del pool._by_digest[b"b"]
    free = pool._clean.pop()
    with pytest.raises(IntegrityError, match="unused"):
        pool.check({block: 1})
    pool._idle[free] = None
    with pytest.raises(IntegrityError, match="wrong list"):
        pool.check({block: 1})
