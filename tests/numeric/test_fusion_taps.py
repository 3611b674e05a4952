"""What a fused model shows of its inside: hidden states after its layers, chosen rows, hooks; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from engine.attention.paged_cpu import PagedCpuAttention
from engine.errors import ModelLoadError
from engine.models.adapter import DecoderAdapter
from engine.models.context import PagedContext, ProbeContext, Taps
from engine.models.fused.attention import FusedAttention
from engine.models.fused.layer import FusedLayer
from engine.models.fusion import fused_levels
from engine.runtime.batch import SeqInput, pack
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.packing import pack_linears
from engine.runtime.runner import ModelRunner
from tests.contract import paged
from tests.families import LAYERS, VOCAB, family, random_model

TOKENS = 9
# Residuals one after the other, norms after the blocks, parallel, scaled, absolute positions, inside a larger model
NAMES = ("llama", "gemma3_text", "olmo2", "cohere2", "granite", "gpt2", "gemma3")


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0.0, atol=2e-4)


class Lab:
    """One adapter with a pool, and nine tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.adapter = DecoderAdapter(model)
        self.shapes = self.adapter.probe()
        self.cache = PagedKVCache(self.shapes, 3, 4, torch.float32, paged.CPU)

    def fuse(self) -> Lab:
        paged.fuse_in_place(self.adapter, self.shapes, PagedCpuAttention())
        return self

    def layers(self) -> list[FusedLayer]:
        return [module for module in self.adapter.model.modules() if isinstance(module, FusedLayer)]

    def forward(self, rows: list[int] | None = None, taps: Taps | None = None) -> torch.Tensor:
        batch = pack([SeqInput(list(range(3, 3 + TOKENS)), 0, (2, 0, 1), TOKENS)], 4, paged.CPU)
        context = PagedContext(self.cache, PagedCpuAttention().prepare(batch), batch.slots)
        wanted = torch.tensor(range(TOKENS) if rows is None else rows, dtype=torch.long)
        return self.adapter.forward(batch.ids, batch.positions, wanted, context, taps)


def lab(name: str) -> Lab:
    return Lab(random_model(family(name).config()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [(0,), (0, 2), (LAYERS - 1,), range(LAYERS), ()])
def test_taps_are_the_outputs_of_layers(name: str, wanted: tuple[int, ...]) -> None:
    plain, fused = lab(name), lab(name).fuse()
    expected, got = Taps(wanted), Taps(wanted)
    logits = plain.forward(taps=expected)
    assert set(expected.states) == set(wanted)
    # The last layer works on all rows if it is tapped, whatever rows the head is asked for.
    assert_close(fused.forward(rows=[7, 2], taps=got), logits[[7, 2]])
    assert set(got.states) == set(wanted)
    for layer in wanted:
        assert got.states[layer].shape == (TOKENS, 64)
        assert_close(got.states[layer], expected.states[layer])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "fused", "packed"])
def test_states_are_what_the_output_head_reads(name: str, form: str) -> None:
    """The last hidden states of transformers, after the final norm, at the rows that are asked for; nothing is left."""
    made = lab(name) if form == "plain" else lab(name).fuse()
    if form == "packed":
        pack_linears(made.adapter.model)
    runner = ModelRunner(made.adapter, made.cache, PagedCpuAttention())
    inputs, rows = [SeqInput(list(range(3, 3 + TOKENS)), 0, (2, 0, 1), TOKENS)], [7, 2, 8]
    logits, states = runner.forward_with_states(inputs, rows)
    original = random_model(family(name).config())
    with torch.inference_mode():
        out = original(torch.arange(3, 3 + TOKENS)[None], output_hidden_states=True)
    assert states.shape == (3, 64) and states.dtype == torch.float32
    torch.testing.assert_close(
        states, out.hidden_states[-1][0, rows], rtol=0.0, atol=0.02 if form == "packed" else 2e-4
    )
    assert torch.equal(logits, runner.forward(inputs, rows))
    assert not any(module._forward_pre_hooks for module in made.adapter.model.modules())


def test_a_head_that_is_never_called_gives_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab("llama")
    model = made.adapter.model
    head, weight = model.get_output_embeddings(), model.get_output_embeddings().weight
    model.lm_head = torch.nn.Identity()
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: hidden @ weight.T)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    runner = ModelRunner(made.adapter, made.cache, PagedCpuAttention())
    with pytest.raises(ModelLoadError, match="output head"):
        runner.forward_with_states([SeqInput([3, 4], 0, (2, 0), 2)], [1])


def test_taps_of_fused_layers_without_a_fused_backbone() -> None:
    model = random_model(family("llama").config())
    model.get_submodule("model").register_forward_hook(lambda *_: None)  # keeps the backbone as it is
    half, plain = Lab(model).fuse(), lab("llama")
    assert fused_levels(model) == {"layers": LAYERS, "attention": LAYERS, "MLPs": LAYERS, "norms": 2 * LAYERS + 1}
    expected, got = Taps((0, 2)), Taps((0, 2))
    assert_close(half.forward(taps=got), plain.forward(taps=expected))
    for layer in (0, 2):
        assert_close(got.states[layer], expected.states[layer])
    assert not any(layer._forward_hooks for layer in half.layers())  # gone with the pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [[], [8], [0], [5, 1, 5]])
def test_rows_are_rows_of_all_logits(name: str, rows: list[int]) -> None:
    fused = lab(name).fuse()
    got = fused.forward(rows=rows)
    assert got.shape == (len(rows), VOCAB)
    torch.testing.assert_close(got, fused.forward()[rows], rtol=0.0, atol=1e-5)


def test_hook_on_a_fused_layer_sees_and_changes_its_output() -> None:
    fused = lab("llama").fuse()
    whole, taps = fused.forward(), Taps((1, 2))
    fused.forward(taps=taps)
    seen: list[torch.Tensor] = []
    handle = fused.layers()[1].register_forward_hook(lambda _, __, out: seen.append(out[0].clone()))
    assert_close(fused.forward(), whole)
    handle.remove()
    assert_close(seen[0], taps.states[1])
    # Replaced by the output of the layer before, layer 2 is skipped; so is what a pre-hook hands in.
    last = fused.layers()[2]
    with last.register_forward_hook(lambda _, args, __: args[0]):
        skipped = fused.forward(rows=[3])
    assert_close(skipped, _head(fused, taps.states[1])[[3]])
    with last.register_forward_pre_hook(lambda _, args: (taps.states[1][None] * 0.5,)):
        halved = fused.forward()
    assert float((halved - whole).abs().max()) > 0.01


def _head(fused: Lab, hidden: torch.Tensor) -> torch.Tensor:
    model = fused.adapter.model
    with torch.inference_mode():
        return model.get_submodule("lm_head")(model.get_submodule("model.norm")(hidden))


def test_hook_on_a_linear_layer_is_called() -> None:
    fused, heard = lab("llama").fuse(), []
    attention = next(module for module in fused.adapter.model.modules() if isinstance(module, FusedAttention))
    attention.qkv.register_forward_hook(lambda _, args, out: heard.append((args[0].shape, out.shape)))
    fused.forward()
    assert heard == [((TOKENS, 64), (TOKENS, 128))]


def test_hook_where_it_would_never_be_called_is_refused() -> None:
    fused = lab("llama").fuse()
    for part in (fused.layers()[0].self_attn, fused.layers()[0].mlp, fused.layers()[0].input_layernorm):
        with pytest.raises(RuntimeError, match="hooks would not be called"):
            part.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="hooks would not be called"):
            part.register_forward_pre_hook(lambda *_: None)  # type: ignore[union-attr]


def test_what_a_fused_model_can_not_give_is_refused() -> None:
    fused = lab("llama").fuse()
    one = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(TypeError, match="output_hidden_states"):
        fused.adapter.model(
            input_ids=one, position_ids=one, use_cache=False, slipstream=ProbeContext(), output_hidden_states=True
        )


def test_probe_works_on_a_fused_model() -> None:
    """Its layers write their own keys and values, but not where there is no pool."""
    fused = lab("llama").fuse()
    assert fused.adapter.probe() == fused.shapes
