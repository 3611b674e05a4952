"""The figures of `benchmarks.growth` and `benchmarks.front`, from made-up measurements and from small real ones."""

from __future__ import annotations

import pytest

from benchmarks import growth, growth_cases
from benchmarks.front import Case, ask_of, figure_of
from benchmarks.growth_cases import PIPELINES, Curve
from benchmarks.null_worker import InstantWorker, Script
from benchmarks.stream import BenchmarkError
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import DecodeTraits


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_exponent_is_that_of_the_upper_points(power: int) -> None:
    points = ((1, 99.0), *((size, 3.0 * size**power) for size in (10, 100, 1000)))
    assert growth.exponent(points) == pytest.approx(power)
    table = growth.growth_table([Curve("batch", "plain", "us", points)])
    assert table.splitlines()[-1].endswith(f"{power:.2f}")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_engine_of_a_case_runs_all_its_sequences_in_every_step(name: str) -> None:
    core, worker = growth_cases._core(PIPELINES[name], 3, 64)
    for _ in range(8):
        report = core.step()
        assert report.stats.running == 3 and worker.seconds > 0
    core.check_integrity()


def test_a_worker_without_a_model_answers_as_asked() -> None:
    core = EngineCore(
        InstantWorker(Script(tokens=(7, 8), traits=DecodeTraits(lookahead=2, drafts=True))), EngineConfig()
    )
    core.add(growth_cases.request(1, 40, max_tokens=9))
    tokens: list[int] = []
    while core.has_work():
        tokens += [token for update in core.step().updates for token in update.token_ids]
    assert tokens == [7, 8, 7, 8, 7, 8, 7, 8, 7] and core.num_states() == 0


def test_filling_finding_and_evicting_do_what_they_say() -> None:
    kinds = growth_cases._cache(64)
    assert all(spent > 0 for spent in kinds) and growth_cases._memory(1000) > 0


def test_a_figure_of_the_front() -> None:
    pieces = [(10.01, b"1a\r\ndata: {}\n\n"), (10.03, b"data: {}\n\ndata: {}\n\n"), (10.12, b"data: {}\n\n")]
    case = Case("chat", 2, 10.0, 12.0, (0.0004, 0.0001), pieces)
    found = figure_of(case, [(9.0, 5.0), (10.5, 0.0002), (10.7, 0.0004)], 0.1)
    assert found.chunks == 2.0 and found.core == pytest.approx(0.0002)
    assert found.cpu == pytest.approx(100) and found.system == pytest.approx(25)
    assert found.delivery_mean == pytest.approx(20_000) and found.between_steps == pytest.approx(300)
    with pytest.raises(BenchmarkError, match="no chunk"):
        figure_of(Case("chat", 2, 10.0, 12.0, (0.1, 0.0), []), [], 0.1)


def test_what_the_clients_ask_for() -> None:
    assert ask_of("chat+logprobs").body["top_logprobs"] == 5 and "messages" in ask_of("chat").body
    assert ask_of("completions+trace").body["speculation"] == {"trace": True}
    assert ask_of("completions").path == "/v1/completions"
