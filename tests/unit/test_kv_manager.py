"""Block tables and the prefix cache: what is found, what is published, and digests that can't be mistaken."""

from __future__ import annotations

from math import lcm

import pytest

from engine.errors import IntegrityError
from engine.scheduling.hashing import DIGEST_BYTES, BlockHasher
from engine.scheduling.kv_manager import KVManager
from engine.types import Sequence
from tests.unit.fakes import SEED, make_request


def manager(blocks: int = 8, *, prefix_cache: bool = True) -> KVManager:
    return KVManager(blocks, 4, SEED, prefix_cache=prefix_cache)


def sequence(tokens: int, cache_salt: str = "", prompt_logprobs: int | None = None) -> Sequence:
    return Sequence(make_request("a", tokens, cache_salt=cache_salt, prompt_logprobs=prompt_logprobs))


def computed(kv: KVManager, seq: Sequence) -> Sequence:
    """Run a whole prompt through the manager: its KV is final and published."""
    kv.admit(seq, kv.match(seq), seq.num_tokens)
    seq.num_computed = seq.num_reserved = seq.num_tokens
    kv.publish(seq)
    return seq


@pytest.mark.parametrize(("tokens", "blocks"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 2)])
def test_a_match_leaves_at_least_one_token_to_compute(tokens: int, blocks: int) -> None:
    kv = manager()
    first = computed(kv, sequence(11))
    assert kv.match(sequence(tokens)) == first.block_ids[:blocks]


def test_only_full_blocks_of_computed_tokens_are_published() -> None:
    kv = manager()
    seq = sequence(9)
    kv.admit(seq, [], 12)
    for done, blocks in ((7, 1), (8, 2), (11, 2), (12, 3)):
        seq.output_ids += range(100 + seq.num_tokens, 100 + done)
        seq.num_computed = done
        kv.publish(seq)
        assert len(kv.match(sequence(13))) == blocks


def test_salts_and_different_beginnings_do_not_share() -> None:
    kv = manager()
    computed(kv, sequence(8, cache_salt="a"))
    assert len(kv.match(sequence(9, cache_salt="a"))) == 2
    assert kv.match(sequence(9)) == kv.match(sequence(9, cache_salt="b")) == []
    other = Sequence(make_request("b", (1, *range(101, 109)), cache_salt="a"))
    assert kv.match(other) == []


def test_a_match_stops_at_the_first_block_that_was_evicted() -> None:
    kv = manager(3)
    kv.release(computed(kv, sequence(12)))
    assert len(kv.match(sequence(13))) == 3
    thief = sequence(3, cache_salt="x")
    kv.admit(thief, [], 3)
    assert len(kv.match(sequence(13))) == 2, "the tail goes first"


def test_shortage_counts_matched_blocks_that_are_free_as_well() -> None:
    kv = manager(4)
    kv.release(computed(kv, sequence(8)))
    assert kv.shortage(kv.match(sequence(9)), 16) == 0
    assert kv.shortage(kv.match(sequence(9)), 17) == 1
    computed(kv, sequence(9))
    assert kv.shortage(kv.match(sequence(9)), 12) == 0, "those in use cost nothing"


def test_growing_is_all_or_nothing_and_keeps_the_planned_table() -> None:
    kv = manager(3)
    seq = sequence(5)
    kv.admit(seq, [], 5)
    table = seq.block_table
    assert kv.grow(seq, 8) and seq.block_table is table
    assert not kv.grow(seq, 13) and seq.block_table is table
    assert kv.grow(seq, 12) and seq.block_table == tuple(seq.block_ids) == (*table, seq.block_ids[2])
    kv.check([seq])
    kv.release(seq)
    assert kv.pool.num_free == 3 and seq.block_table == ()
    kv.check([seq])


def test_kv_in_doubt_is_not_found_again_matched_blocks_included() -> None:
    kv = manager()
    computed(kv, sequence(8))
    second = computed(kv, sequence(12))
    kv.withdraw(second)
    assert kv.match(sequence(13)) == []


def test_prompt_log_probabilities_need_every_position_computed_once() -> None:
    kv = manager()
    computed(kv, sequence(12))
    seq = sequence(12, prompt_logprobs=0)
    assert kv.match(seq) == []
    seq.num_scored = 5
    assert len(kv.match(seq)) == 1
    seq.num_scored = 11
    assert len(kv.match(seq)) == 2


def test_without_a_prefix_cache_nothing_is_hashed() -> None:
    kv = manager(prefix_cache=False)
    seq = computed(kv, sequence(12))
    assert seq.digests == [] and kv.match(sequence(12)) == []
    kv.release(seq)
    assert kv.pool.num_cached == 0


def test_check_finds_tables_that_do_not_add_up() -> None:
    kv = manager()
    seq = computed(kv, sequence(8))
    seq.num_reserved = 9
    with pytest.raises(IntegrityError, match="9 positions in 2 blocks"):
        kv.check([seq])
    seq.num_reserved = 8
    with pytest.raises(IntegrityError, match="references"):
        kv.check([])
    seq.block_table = ()
    with pytest.raises(IntegrityError, match="planned block table"):
        kv.check([seq])


def test_digests_depend_on_seed_salt_parent_and_every_token() -> None:
    hasher = BlockHasher(SEED)
    root = hasher.root("")
    digest = hasher.extend(root, (1, 2, 3))
    assert len(digest) == DIGEST_BYTES == 16
    assert digest == BlockHasher(SEED).extend(root, [1, 2, 3])
    others = [
        hasher.extend(root, (1, 2, 4)),
        hasher.extend(root, (1, 2)),
        hasher.extend(root, (1, 2 + (3 << 32))),
        hasher.extend(digest, (1, 2, 3)),
        hasher.extend(hasher.root("salt"), (1, 2, 3)),
        BlockHasher(SEED[::-1]).extend(root, (1, 2, 3)),
    ]
    assert len({digest, *others}) == 7
    assert hasher.root("\ud800") != hasher.root(""), "half a surrogate pair is a salt like any other"


# ---- models whose KV becomes final in units ----------------------------------------------------------------


def units(unit: int, blocks: int = 16) -> KVManager:
    return KVManager(blocks, 4, SEED, prefix_cache=True, unit=unit)


def of(*tokens: int) -> Sequence:
    return Sequence(make_request("a", tokens))


@pytest.mark.parametrize(("unit", "tokens", "blocks"), [
    (2, 9, 2), (4, 9, 2), (8, 8, 0), (8, 9, 2), (8, 16, 2), (8, 17, 4), (6, 12, 0), (6, 13, 3), (6, 24, 3), (6, 25, 6),
])  # fmt: skip
def test_a_match_ends_where_units_and_blocks_end_together(unit: int, tokens: int, blocks: int) -> None:
    kv = units(unit)
    first = computed(kv, sequence(36))
    assert kv.match(sequence(tokens)) == first.block_ids[:blocks]


def test_a_unit_that_is_not_final_as_a_whole_is_not_published() -> None:
    kv = units(8)
    seq = sequence(15)
    kv.admit(seq, [], 15)
    seq.num_computed = seq.num_reserved = 15
    kv.publish(seq)
    assert kv.match(sequence(17)) == seq.block_ids[:2] and seq.num_published == 2


@pytest.mark.parametrize("unit", [8, 6])
def test_a_block_of_a_unit_that_goes_on_otherwise_is_never_shared_not_even_by_a_third(unit: int) -> None:
    """The first 4 tokens are the same, but their KV is not: it looks ahead to the end of the unit."""
    kv = units(unit)
    alike, rest = (1, 2, 3, 4, 5), tuple(range(20, 30))
    first = computed(kv, of(*alike, 6, *rest))
    assert kv.match(of(*alike, 7, *rest)) == []
    second = computed(kv, of(*alike, 7, *rest))
    assert not set(first.block_ids) & set(second.block_ids)
    own = list(second.block_ids)
    kv.release(second)
    found = kv.match(of(*alike, 7, *rest))
    assert found == own[: lcm(unit, 4) // 4], "a page of the first request holds KV of other tokens"


def test_a_unit_with_a_hole_is_not_found() -> None:
    kv = units(8, blocks=5)
    kv.release(computed(kv, sequence(16)))
    for salt in "xy":
        thief = sequence(3, cache_salt=salt)
        kv.admit(thief, [], 3)
    assert len(kv.match(sequence(17))) == 2, "one clean block went, and the last one of the second unit"
