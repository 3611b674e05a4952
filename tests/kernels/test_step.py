"""The C code of a whole step, in every instruction set that this machine has, by teams of any size."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.kernels import native_step
from engine.models import program as programs
from engine.runtime.batch import SeqInput
from tests.numeric.native_kernels import VARIANTS, build
from tests.programs import Programmed, programmed

IDS = [(11 * i + 4) % 96 for i in range(30)]
TABLE = list(range(8))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def crowded() -> Iterator[None]:
    """More threads than any machine of ours has idle cores: every barrier is met by threads that were descheduled."""
    before = torch.get_num_threads()
    torch.set_num_threads(9)
    yield
    torch.set_num_threads(before)


def decode(model: Programmed, steps: int) -> torch.Tensor:
    """A prompt, then one token at a time."""
    model.fresh()
    start = len(IDS) - steps
    rows = [model.feed([SeqInput(IDS[:start], 0, TABLE, start)], [start - 1])]
    rows += [model.feed([SeqInput([IDS[at]], at, TABLE, at + 1)]) for at in range(start, len(IDS))]
    return torch.cat(rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", ["fp16", "int8"])
def test_variants(variant: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gemma2", "gpt_neox"):
        model = programmed(name, format)
        with model.modules():
            want = decode(model, 5)
        with monkeypatch.context() as patch:
            patch.setattr(programs, "library", lambda: build(variant))
            model.adapter.use_program()
        torch.testing.assert_close(decode(model, 5), want, atol=2e-5 if format == "fp16" else 0.05, rtol=1e-4)


def test_crowded_teams(crowded: None) -> None:
    """Nobody gets lost, and nothing depends on who does what."""
    model = programmed("qwen3", "int8")
    want = decode(model, 10)
    for _ in range(15):
        assert torch.equal(decode(model, 10), want)


def test_calls_from_several_threads() -> None:
    """One after another: they share a workspace."""
    model = programmed("llama", "fp16")
    tables = [list(range(8 * i, 8 * i + 8)) for i in range(4)]

    def scored(table: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([model.feed([SeqInput(IDS[:20], 0, table, 20)]) for _ in range(10)])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(scored, tables))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_profile() -> None:
    model = programmed("llama", "fp16")
    step = model.program.step
    decode(model, 5)
    profile = step.profile()
    assert profile.keys() == {*native_step.KINDS, "calls"} and profile["calls"] == 6
    assert all(seconds >= 0 for seconds in profile.values()) and profile["products"] > 0 and profile["head"] > 0
    step.reset_profile()
    assert set(step.profile().values()) == {0.0}
