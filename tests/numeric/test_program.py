"""A model as one native call: it computes what the modules compute, whatever is fed beside a token, and by any team."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.attention.paged_cpu import PagedCpuAttention
from engine.models.context import Taps
from engine.models.fused.backbone import FusedBackbone
from engine.runtime.batch import AttentionMode, SeqInput, TreeRows
from tests.contract import paged
from tests.families import LAYERS, VOCAB
from tests.programs import Programmed, programmed

FAMILIES = {  # family -> whether the program goes from ids, and to logits
    "llama": (True, True),
    "llama-tied": (True, True),
    "qwen2": (True, True),  # biases
    "qwen3": (True, True),  # q/k norms per head
    "gemma2": (False, True),  # an embedding of its own kind; post norms, windows, soft caps, of the logits too
    "gemma3_text": (False, True),  # offsets, two rotary embeddings
    "phi3": (True, True),  # half of the dimensions rotated
    "olmo2": (True, True),  # post norms alone, q/k norms over all heads
    "cohere2": (True, True),  # parallel, layer norms without bias, scaled logits
    "granite": (True, True),  # residuals, embedding and logits times a number
    "glm4": (True, True),  # rotated neighbours
    "smollm3": (True, True),  # a layer without rotation
    "gpt_neox": (True, True),  # parallel with two norms, plain MLP
    "gpt2": (False, True),  # absolute positions
}
TABLE = list(range(16))
IDS = [7, 3, 90, 14, 55, 21, 8, 67, 31, 5, 44, 72, 11, 29, 83, 60, 17, 38, 2, 49]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> Programmed:
    return programmed("llama")


@pytest.fixture(scope="module")
def rounded() -> Programmed:
    return programmed("llama", "int8")


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Chunks, decode steps and blocks to verify, in mixed batches over scattered blocks."""
    model, ids, backend = programmed(name), paged.sequences(VOCAB), PagedCpuAttention()
    got = paged.paged(model.adapter, model.shapes, backend, ids)
    with model.modules():
        want = paged.paged(model.adapter, model.shapes, backend, ids)
    assert (model.program.step.program.embedding is not None, model.program.scores) == FAMILIES[name]
    assert model.program.step.profile()["calls"] == len(paged.STEPS)
    assert paged.worst(want, got) < 2e-6


def bits(model: Programmed) -> torch.Tensor:
    """The logits of IDS, whole in one pass."""
    model.fresh()
    return model.feed([SeqInput(IDS, 0, TABLE, len(IDS))])


def test_bits_do_not_depend_on_the_batch(rounded: Programmed, threads: int) -> None:
    """int8: what is fed of a sequence at once gives the same bits alone and beside others."""
    whole = bits(rounded)
    for begin, end in ((0, 3), (3, 12), (12, 13), (13, 20)):
        own = SeqInput(IDS[begin:end], begin, TABLE, end)
        alone = rounded.feed([own])
        others = (SeqInput(IDS[3:9], 0, range(20, 24), 6), SeqInput(IDS[:2], 0, range(30, 32), 2))
        beside = rounded.feed([others[0], own, others[1]], rows=list(range(6, 6 + end - begin)))
        assert torch.equal(beside, alone)
        torch.testing.assert_close(alone, whole[begin:end])  # attention sums in another order
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize("format", ["fp16", "int8", "int4"])
def test_verified_blocks_equal_decode_steps(format: str) -> None:
    """Bit for bit: blocks of up to 16 tokens, and one token at a time."""
    for name in ("llama", "gemma2"):
        model, found = programmed(name, format), []
        for size in (1, 4, 16):
            model.fresh()
            parts = [(at, min(at + size, len(IDS))) for at in range(0, len(IDS), size)]
            found.append([model.feed([SeqInput(IDS[begin:end], begin, TABLE, end)]) for begin, end in parts])
        want = torch.cat(found[0])
        assert all(torch.equal(torch.cat(rows), want) for rows in found[1:])


@pytest.mark.parametrize("format", ["fp16", "int8", "int4"])
def test_bits_do_not_depend_on_the_threads(format: str) -> None:
    before, model, found = torch.get_num_threads(), programmed("gemma2", format), []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        found.append(bits(model))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rounded_formats(format: str) -> None:
    """To the bit, as the modules do every one of its operations in the same order."""
    for name in ("llama", "qwen3"):
        model = programmed(name, format)
        got = bits(model)
        with model.modules():
            assert torch.equal(got, bits(model))


def test_wanted_rows(llama: Programmed) -> None:
    """Any, in any order, few of many and many of few."""
    whole = bits(llama)
    for rows in ([19], [3, 0, 19, 3], list(range(19, -1, -1)), [5] * 30, []):
        llama.fresh()
        got = llama.feed([SeqInput(IDS, 0, TABLE, 20)], rows=rows)
        assert got.shape == (len(rows), VOCAB) and torch.equal(got, whole[rows])
    three = [SeqInput(IDS[:3], 0, TABLE, 3)]
    assert torch.equal(llama.feed(three, rows=[2] * 12), llama.feed(three)[[2] * 12])


@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("layers", [(0,), (0, LAYERS - 1), (LAYERS - 1,)])
def test_taps(name: str, count: int, layers: tuple[int, ...]) -> None:
    model, inputs, rows = programmed(name), [SeqInput(IDS[:count], 0, TABLE, count)], [count - 1, 0]
    got, want = Taps(layers), Taps(layers)
    scored = model.feed(inputs, rows, taps=got)
    with model.modules():
        again = model.feed(inputs, rows, taps=want)
    torch.testing.assert_close(scored, again)
    assert got.states.keys() == set(layers)
    for layer in layers:
        torch.testing.assert_close(got.states[layer], want.states[layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", list(AttentionMode))
def test_modes(llama: Programmed, mode: AttentionMode, dtype: torch.dtype) -> None:
    """Over pools of both types; the first tokens were fed before."""
    tree = TreeRows(root=9, positions=[9, 10, 10, 11, 11], ancestors=[0b1, 0b11, 0b101, 0b1011, 0b10101])
    found = []
    for native in (True, False):
        llama.fresh(dtype)
        program = llama.adapter.program
        llama.adapter.program = program if native else None
        llama.feed([SeqInput(IDS[:9], 0, TABLE, 9)])
        item = SeqInput(IDS[9:14], 9, TABLE, 14, tree if mode is AttentionMode.TREE else None)
        found.append(llama.feed([item], mode=mode, block_length=4))
        llama.adapter.program = program
    torch.testing.assert_close(found[0], found[1])


def test_long_prompts() -> None:
    """More rows than one chunk has, beside others."""
    model = programmed("llama", max_position_embeddings=1024)
    model.blocks = 320
    ids = [(7 * i + 3) % VOCAB for i in range(700)]
    inputs = [SeqInput(ids[:180], 0, range(200, 245), 180), SeqInput(ids, 0, range(180), 700)]
    model.fresh()
    got = model.feed(inputs)
    with model.modules():
        model.fresh()
        torch.testing.assert_close(got, model.feed(inputs))


def test_ropes_without_tables() -> None:
    """cos and sin are computed before the call where there are none for every position."""
    for name in ("phi3", "gemma3_text"):
        model = programmed(name)
        backbone = model.adapter.model.base_model
        assert isinstance(backbone, FusedBackbone)
        want = bits(model)
        for source in backbone.sources:
            source.cos = source.sin = None
        model.adapter.use_program()
        assert all(rope.cos is None for rope in model.program.step.program.ropes)
        torch.testing.assert_close(bits(model), want)
