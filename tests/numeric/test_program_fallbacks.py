"""When a native program does not serve, and what it says of calls that are wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.attention.paged_cpu import PagedCpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.models import program as programs
from engine.models.adapter import DecoderAdapter
from engine.models.context import PagedContext, Taps
from engine.models.fused.layer import FusedLayer
from engine.models.fusion import set_reduce
from engine.models.taps import head_inputs
from engine.protocols import AttentionBackend
from engine.runtime.batch import DeviceBatch, SeqInput, pack
from tests.contract import paged
from tests.families import VOCAB, family, random_model
from tests.programs import BLOCK, CPU, Programmed, pack_all, programmed

IDS = [7, 3, 90, 14, 55]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def llama() -> Programmed:
    return programmed("llama")


def batch_of(ids: list[int], tables: list[int]) -> DeviceBatch:
    return pack([SeqInput(ids, 0, tables, len(ids))], BLOCK, CPU)


def run(
    model: Programmed, batch: DeviceBatch, backend: AttentionBackend, rows: list[int] | None = None
) -> torch.Tensor:
    context = PagedContext(model.cache, backend.prepare(batch), batch.slots)
    wanted = torch.arange(batch.ids.shape[0]) if rows is None else torch.tensor(rows)
    return model.adapter.forward(batch.ids, batch.positions, wanted, context)


def calls(model: Programmed) -> float:
    return model.program.step.profile()["calls"]


def test_other_attention(llama: Programmed) -> None:
    """A step that another backend attends goes through the modules."""
    batch = batch_of(IDS, [3, 1])
    want = run(llama, batch, PagedCpuAttention())
    assert calls(llama) == 1
    torch.testing.assert_close(run(llama, batch, SdpaAttention()), want)
    assert calls(llama) == 1


def test_probes(llama: Programmed) -> None:
    assert llama.adapter.probe() == llama.shapes and calls(llama) == 0


def test_other_pools(llama: Programmed) -> None:
    """A type that the native attention does not read is left to the modules."""
    llama.fresh(torch.bfloat16)
    batch = batch_of(IDS, [3, 1])
    other = run(llama, batch, PagedCpuAttention())
    assert calls(llama) == 0
    llama.fresh()
    assert float((run(llama, batch, PagedCpuAttention()) - other).abs().max()) < 0.1 and calls(llama) == 1


@pytest.mark.parametrize("place", ["model", "model.layers.1", "model.layers.0.mlp.down_proj"])
def test_hooks_are_heard(llama: Programmed, place: str) -> None:
    heard: list[torch.Tensor] = []
    hook = llama.adapter.model.get_submodule(place).register_forward_hook(lambda _, __, out: heard.append(out))
    batch = batch_of(IDS, [3, 1])
    listened = run(llama, batch, PagedCpuAttention())
    assert len(heard) == 1 and calls(llama) == 0
    hook.remove()
    torch.testing.assert_close(run(llama, batch, PagedCpuAttention()), listened)
    assert len(heard) == 1 and calls(llama) == 1


def test_head_inputs(llama: Programmed) -> None:
    """Whoever listens to the head hears it; the rest is still one call, with taps."""
    taps = Taps((1,))
    with head_inputs(llama.adapter.model.get_output_embeddings()) as found:
        logits = llama.feed([SeqInput(IDS, 0, [3, 1], 5)], [4, 2], taps=taps)
    assert calls(llama) == 1 and taps.states[1].shape == (5, 64)
    head = llama.adapter.model.get_output_embeddings()
    assert found[0].shape == (1, 2, 64) and torch.equal(head(found[0])[0], logits)
    assert torch.equal(llama.feed([SeqInput(IDS, 0, [3, 1], 5)], [4, 2]), logits) and calls(llama) == 2


def test_sums_over_ranks(llama: Programmed) -> None:
    set_reduce(llama.adapter.model, lambda part: part)
    run(llama, batch_of(IDS, [3, 1]), PagedCpuAttention())
    assert calls(llama) == 0
    set_reduce(llama.adapter.model, None)
    run(llama, batch_of(IDS, [3, 1]), PagedCpuAttention())
    assert calls(llama) == 1


def reason(model: nn.Module, caplog: pytest.LogCaptureFixture) -> str:
    """Why there is no program."""
    caplog.clear()
    with caplog.at_level(logging.INFO, programs.__name__):
        assert programs.make_program(model) is None
    return caplog.messages[-1]


def test_reasons(llama: Programmed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama.adapter.model
    assert "backbone is not fused" in reason(random_model(family("llama").config()), caplog)
    layer, mlp = model.get_submodule("model.layers.1"), model.get_submodule("model.layers.1.mlp")
    assert isinstance(layer, FusedLayer)
    packed = mlp.down_proj
    mlp.down_proj = nn.Linear(96, 64)
    assert "a Linear is not packed" in reason(model, caplog)
    mlp.down_proj = packed
    layer.reduce = lambda part: part
    assert "one rank's slices" in reason(model, caplog)
    layer.reduce, wiring = None, layer.wiring
    layer.wiring = replace(wiring, pre_mlp="mlp")
    assert "FusedMLP is a norm of another kind" in reason(model, caplog)
    layer.wiring = wiring
    monkeypatch.setattr(programs, "library", lambda: None)
    assert "no native library" in reason(model, caplog)


def test_experts_stay_modules(caplog: pytest.LogCaptureFixture) -> None:
    adapter = DecoderAdapter(random_model(family("mixtral").config()))
    paged.fuse_in_place(adapter, adapter.probe(), PagedCpuAttention())
    pack_all(adapter.model, "fp16")
    assert "MLP of another kind" in reason(adapter.model, caplog)


def test_an_ending_of_another_kind() -> None:
    """What a model does to its logits in a way of its own, it goes on doing."""
    model = programmed("llama")
    head, other = model.adapter.model.get_output_embeddings(), model.adapter.model
    want = model.feed([SeqInput(IDS, 0, [3, 1], 5)])

    class Doubled(type(other)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.square()
            return out

    other.__class__ = Doubled
    model.adapter.use_program()
    assert not model.program.scores and head is not None
    assert torch.equal(model.feed([SeqInput(IDS, 0, [3, 1], 5)]), want.square())
    assert calls(model) == 1


@pytest.mark.parametrize("wrong", ["id", "slot", "row", "position", "block", "reach"])
def test_what_is_out_of_range(llama: Programmed, wrong: str) -> None:
    """Raises IndexError, and the next call is fine."""
    batch, rows = batch_of(IDS, [3, 1]), [4]
    want = run(llama, batch, PagedCpuAttention(), rows)
    broken = {
        "id": lambda: replace(batch, ids=batch.ids + VOCAB - 50),
        "slot": lambda: replace(batch, slots=batch.slots + llama.blocks * BLOCK - 10),
        "row": lambda: batch,
        "position": lambda: replace(batch, positions=batch.positions + 100_000),
        "block": lambda: replace(batch, block_tables=batch.block_tables + llama.blocks - 2),
        "reach": lambda: replace(batch, query_starts=batch.query_starts * 2),
    }[wrong]()
    with pytest.raises(IndexError):
        run(llama, broken, PagedCpuAttention(), [5] if wrong == "row" else rows)
    assert torch.equal(run(llama, batch, PagedCpuAttention(), rows), want)
