"""triton_paged in Triton's interpreter against the sdpa backend, over pools that are NaN where nothing was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.kernels.cases import Case, Report

Interpreted = Callable[..., Report]
MODES = ("causal", "block_causal", "bidirectional", "tree")
OPTIONS = {
    "plain": Case(),
    "window": Case(window=7),
    "softcap": Case(softcap=3.0),
    "sinks": Case(sinks=True),
    "all": Case(window=20, softcap=2.0, sinks=True),
}
# Pages of part of a tile, of a tile, of many tiles, and such that do not fit.
PAGES = {1: (16, 32), 7: (32, 32), 16: (64, 64), 32: (16, 16), 256: (128, 32)}
EXACT = 2e-6


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mask_option_and_page_size(interpreted: Interpreted, mode: str, options: str, page: int) -> None:
    case = replace(OPTIONS[options], mode=mode, page=page, tile=PAGES[page])
    assert interpreted("attend", case).error < EXACT


@pytest.mark.parametrize("mode", MODES)
def test_decode_verify_and_prefill_in_one_step(interpreted: Interpreted, mode: str) -> None:
    """Tiles as they are on a GPU, in 16 bits: low ones for the short queries, high ones for the long."""
    lengths = ((1, 70), (2, 90), (5, 5), (17, 100), (32, 40), (40, 90), (1, 1))
    report = interpreted("attend", Case(mode, lengths, dtype="float16", fold=4, dims=(64, 64)))
    assert report.error < 2e-3 and report.launches == 2


@pytest.mark.parametrize("fold", [1, 3, 4, 7, 8, 71])
def test_any_number_of_query_heads_shares_a_kv_head(interpreted: Interpreted, fold: int) -> None:
    case = Case(lengths=((1, 9), (5, 40)), fold=fold, kv_heads=1 if fold > 8 else 2, tile=(32, 32))
    assert interpreted("attend", case).error < EXACT


@pytest.mark.parametrize("dims", [(16, 16), (24, 24), (64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (20, 36)])
def test_any_head_dimension(interpreted: Interpreted, dims: tuple[int, int]) -> None:
    assert interpreted("attend", Case(lengths=((1, 9), (5, 40)), dims=dims)).error < 5e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_pools(interpreted: Interpreted, mode: str, dtype: str, tolerance: float) -> None:
    assert interpreted("attend", Case(mode, dtype=dtype, fold=4, dims=(80, 80), window=20)).error < tolerance


@pytest.mark.parametrize("options", ["plain", "all"])
def test_eight_bit_pools(interpreted: Interpreted, options: str) -> None:
    """Read in place and widened to the query's type, whatever the pool holds where nothing was written."""
    case = replace(OPTIONS[options], dtype="float16", pool="float8_e4m3fn", fold=4, dims=(64, 32))
    assert interpreted("attend", case).error < 2e-3


@pytest.mark.parametrize("query", [1, 2, 5, 17, 32])
@pytest.mark.parametrize("mode", MODES)
def test_keys_are_split_for_every_short_query(interpreted: Interpreted, mode: str, query: int) -> None:
    report = interpreted("attend", Case(mode, ((query, 300), (1, 70)), tile=(64, 16)))
    assert report.error < EXACT and report.splits > 2


@pytest.mark.parametrize(
    ("options", "splits"), [("window", 2), ("window", 8), ("softcap", 3), ("sinks", 8), ("all", 2)]
)
@pytest.mark.parametrize("mode", MODES)
def test_splits_know_every_option(interpreted: Interpreted, mode: str, options: str, splits: int) -> None:
    """Some rows see nothing in some splits, some splits have no keys at all, and a sink counts once."""
    case = replace(OPTIONS[options], mode=mode, lengths=((30, 90), (1, 33)), tile=(128, 16), page=7, splits=splits)
    assert interpreted("attend", case).error < EXACT


@pytest.mark.parametrize("mode", MODES)
def test_lengths_are_read_on_the_device(interpreted: Interpreted, mode: str) -> None:
    """The host may know no more than a bound: most splits find nothing to do."""
    report = interpreted("attend", Case(mode, ((5, 40), (1, 3)), bound=1000, tile=(16, 16)))
    assert report.error < EXACT and report.splits > 8


def test_a_busy_machine_is_not_split_for(interpreted: Interpreted) -> None:
    assert interpreted("attend", Case(lengths=((1, 100), (2, 90)), processors=1)).splits == 1


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("grown", "nodes"), [(0, 90), (30, 40)])
def test_trees_of_many_words_and_trees_fed_in_parts(
    interpreted: Interpreted, grown: int, nodes: int, window: int | None
) -> None:
    case = Case("tree", ((1, 20), (nodes, 60 + grown + nodes)), grown=grown, tile=(64, 32), window=window)
    assert interpreted("attend", case).error < EXACT


def test_layers_of_different_windows_share_a_step(interpreted: Callable[..., list[float]]) -> None:
    errors = interpreted("attend_layers", Case(lengths=((2, 150), (1, 80))), (None, 30, None, 100, 30))
    assert max(errors) < EXACT


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_without_keys_gives_zero(interpreted: Callable[..., list[float]], sinks: bool) -> None:
    """Rows that only pad a captured batch: no NaN, which would reach a check for it."""
    empty, full = interpreted("attend_empty", Case(lengths=((3, 40), (2, 30)), sinks=sinks))
    assert empty == 0.0 and full > 0.1


@pytest.mark.parametrize(
    ("options", "query", "mode"),
    [*((options, 1, "causal") for options in OPTIONS), ("all", 9, "causal"), ("all", 9, "bidirectional")],
)
def test_a_plan_made_on_the_device(interpreted: Interpreted, options: str, query: int, mode: str) -> None:
    """One long sequence among short ones, in a launch that was sized for the longest there can be."""
    lengths = ((query, 10 + query), (query, 300), (query, query))
    case = replace(OPTIONS[options], mode=mode, lengths=lengths, bound=900, bounded=True, tile=(16, 16), processors=4)
    report = interpreted("attend", case)
    assert report.error < EXACT and report.launches == 1
    assert report.splits > 2 or OPTIONS[options].window is not None


def test_rows_that_pad_a_planned_step_give_zero(interpreted: Callable[..., list[float]]) -> None:
    empty, full = interpreted("attend_empty", Case(lengths=((3, 40), (3, 30)), bounded=True, bound=300, processors=4))
    assert empty == 0.0 and full > 0.1


@pytest.mark.parametrize(
    ("count", "query", "fold", "kv_heads", "window"),
    [
        (1, 1, 4, 8, None),
        (32, 1, 4, 8, None),
        (8, 16, 8, 2, 100),
        (5, 3, 3, 1, 20),
        (256, 1, 4, 8, None),
        (3, 40, 4, 8, None),
    ],
)
def test_the_device_plans_as_its_twin(
    interpreted: Callable[..., list[int]], count: int, query: int, fold: int, kv_heads: int, window: int | None
) -> None:
    used = interpreted("plan_on_device", count, query, fold, kv_heads, window, 6000)
    assert min(used) >= count


@pytest.mark.parametrize("vocabulary", [259, 2060])
def test_draws_are_those_of_the_twin(interpreted: Callable[..., None], vocabulary: int) -> None:
    interpreted("draw_tokens", vocabulary)


# The interpreter cuts bfloat16 off where a GPU rounds.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 1e-3), ("bfloat16", 1.6e-2)])
def test_what_stands_between_products(
    interpreted: Callable[..., dict[str, float]], dtype: str, tolerance: float
) -> None:
    found = interpreted("between_products", dtype)
    assert len(found) == 13 and max(found.values()) < tolerance, found
