"""What verify steps decide, by hand-worked cases; and masked copies, which see all but the token they stand for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from engine.attention.sdpa import tree_visibility
from engine.pipelines.verifying import Judgement, Opinion, judge, rejects, with_copies
from engine.runtime.batch import AttentionMode, SeqInput, pack
from tests.numeric.dual_drive import PAGE, runner
from tests.numeric.dual_reference import JUNK, MASK, VOCAB, Plain, tiny_llama

# position, drafted, own, chance of own, of the drafted
AGREES, UNSURE = Opinion(4, 7, 7, 0.95, 0.95), Opinion(5, 8, 8, 0.6, 0.6)
DIFFERS, TORN = Opinion(6, 9, 2, 0.7, 0.1), Opinion(9, 3, 1, 0.7, 0.25)
ALL = (AGREES, UNSURE, DIFFERS, TORN)


@pytest.mark.parametrize(
    ("verify", "gone"),
    [
        ("trust", ()),
        ("exact", (6, 9)),
        ("confidence", (5, 6, 9)),
        ("both", (5, 6, 9)),
        ("masked_copy", (5, 6, 9)),
    ],
)
def test_what_each_rule_takes_back(verify: str, gone: tuple[int, ...]) -> None:
    assert tuple(one.position for one in ALL if rejects(verify, 0.9, one)) == gone
    verdict = judge(verify, 0.9, ALL, progress=False)
    assert verdict == Judgement(tuple(at for at in (4, 5, 6, 9) if at not in gone), gone, ())


def test_rules_are_more_than_their_parts() -> None:
    """`both` takes back what either does; a probability of just the threshold is enough."""
    at_least = Opinion(0, 5, 6, 0.5, 0.4)
    assert [rejects(verify, 0.4, at_least) for verify in ("exact", "confidence", "both")] == [True, False, True]
    assert not rejects("both", 0.6, UNSURE) and rejects("confidence", 0.61, UNSURE)


def test_something_is_always_final() -> None:
    """With nothing else, the surest of the verifier's own tokens; the lowest position on ties."""
    assert judge("exact", 0.9, (DIFFERS, TORN), progress=False) == Judgement((), (9,), (6,))
    assert judge("exact", 0.9, (TORN, DIFFERS), progress=True) == Judgement((), (9, 6), ())
    assert judge("both", 0.9, (UNSURE, TORN), progress=False) == Judgement((), (5,), (9,))
    assert judge("both", 0.9, (AGREES, DIFFERS), progress=False) == Judgement((4,), (6,), ())
    assert judge("both", 2.0, (AGREES,), progress=False) == Judgement((), (), (4,))
    assert judge("both", 2.0, (), progress=False) == Judgement((), (), ())


def test_what_cannot_be_drafted_again_is_the_verifiers() -> None:
    assert judge("both", 0.9, ALL, progress=True, never_again=(6,)) == Judgement((4,), (5, 9), (6,))
    assert judge("exact", 0.9, (DIFFERS, TORN), progress=False, never_again=(9,)) == Judgement((), (6,), (9,))
    assert judge("both", 0.9, (AGREES,), progress=False, never_again=(4,)) == Judgement((4,), (), ())


def canvases() -> list[tuple[list[int], list[int]]]:
    """Ids and drafted positions: at page borders, in a last page that is not full, many and one."""
    rng = random.Random(3)
    found = []
    for length, drafted in (
        (12, [3, 4, 7]),
        (13, [12]),
        (9, [0, 8]),
        (16, [12, 13, 14, 15]),
        (3, [0, 1, 2]),
        (22, [9]),
    ):
        ids = [rng.randrange(VOCAB - 1) for _ in range(length)]
        found.append(([MASK if rng.random() < 0.3 and i not in drafted else at for i, at in enumerate(ids)], drafted))
    return found


@pytest.mark.parametrize(("ids", "drafted"), canvases())
def test_who_sees_whom(ids: list[int], drafted: list[int]) -> None:
    """Canvas rows see the canvas; a copy sees itself, and every place of the canvas but its own."""
    table = (5, 3, 0, 8, 2, 9, 1, 7)
    copies = with_copies(ids, drafted, MASK, table, PAGE)
    batch = pack([copies.input], PAGE, torch.device("cpu"), AttentionMode.TREE)
    assert batch.tree_starts is not None and batch.tree_masks is not None
    end, size = len(ids), len(ids) + len(drafted)
    visible = tree_visibility(
        batch.tree_starts[None], batch.tree_masks[None], batch.positions[None], batch.kv_lens, size, None
    )[0]
    of_position = [copies.rows[position] for position in range(end)]
    assert sorted([*of_position, *range(end, size)]) == list(range(size))
    want = torch.zeros(size, size, dtype=torch.bool)
    want[:, :end] = True
    for number, position in enumerate(drafted):
        want[end + number, of_position[position]] = False
        want[end + number, end + number] = True
    assert torch.equal(visible, want)
    assert batch.positions[of_position].tolist() == list(range(end))
    assert batch.ids[of_position].tolist() == ids
    slots = [table[position // PAGE] * PAGE + position % PAGE for position in range(end)]
    assert batch.slots[of_position].tolist() == slots, "a canvas row's KV lies where later passes look for it"
    assert batch.positions[end:].tolist() == drafted and batch.ids[end:].tolist() == [MASK] * len(drafted)
    places = [table[place // PAGE] * PAGE + place % PAGE for place in range(end, size)]
    assert batch.slots[end:].tolist() == places
    assert batch.tree_masks.shape[1] == 1, "masks are no longer than a few pages"


@pytest.mark.parametrize("layers", [1, 2])
def test_copies_against_passes_with_one_mask_each(layers: int) -> None:
    """With one layer a copy says just what its position would, masked, in a pass of its own.

    With more, it does not: there the other rows would have seen the mask, while beside a copy they see the token. What
    holds for any depth is the sight that the test above checks, which the plain network is given here. The rows of the
    canvas, and their KV, are those of a pass without copies.
    """
    model = tiny_llama(4, layers)
    mine, plain = runner(model), Plain(model)
    for ids, drafted in canvases():
        end, table = len(ids), list(range(11, 30))
        copies = with_copies(ids, drafted, MASK, table, PAGE)
        rows = [*copies.rows, *range(end, end + len(drafted))]
        got = mine.forward([copies.input], rows, AttentionMode.TREE).double()
        kept = [layer.joint.clone() for layer in mine.cache.layers]
        alone = mine.forward([SeqInput(ids, 0, table, end)], range(end), AttentionMode.BIDIRECTIONAL).double()
        assert torch.allclose(got[:end], alone, atol=2e-4)
        slots = [table[at // PAGE] * PAGE + at % PAGE for at in range(end)]
        for before, layer in zip(kept, mine.cache.layers, strict=True):
            assert torch.allclose(before[slots], layer.joint[slots], atol=2e-5)
            layer.joint.fill_(JUNK)
        said = [one_masked(plain, ids, at)[at] for at in drafted]
        near = [torch.allclose(row, want, atol=2e-4) for row, want in zip(got[end:], said, strict=True)]
        assert all(near) if layers == 1 else not any(near)
        assert torch.allclose(got, seen(plain, ids, drafted), atol=2e-4)


def one_masked(plain: Plain, ids: Sequence[int], position: int) -> torch.Tensor:
    masked = [MASK if at == position else token for at, token in enumerate(ids)]
    return plain.run(masked, range(len(ids)), torch.ones(len(ids), len(ids), dtype=torch.bool), plain.cache())


def seen(plain: Plain, ids: Sequence[int], drafted: Sequence[int]) -> torch.Tensor:
    """Canvas, then copies, by a table of who sees whom."""
    end, size = len(ids), len(ids) + len(drafted)
    table = torch.zeros(size, size, dtype=torch.bool)
    for row, key in itertools.product(range(size), range(size)):
        own = row >= end and drafted[row - end] == key
        table[row, key] = (key < end and not own) or (row >= end and key == row)
    return plain.run([*ids, *[MASK] * len(drafted)], [*range(end), *drafted], table, plain.cache())
