"""The self-check at load is the last line: what no rule foresees must not get past it. Each case plants a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import PreTrainedModel

from engine.attention.sdpa import SdpaAttention
from engine.errors import ModelLoadError
from engine.models import selfcheck
from engine.models.adapter import DecoderAdapter
from engine.models.context import ForwardContext
from engine.models.windows import check_windows
from engine.protocols import AttentionBackend, StepAttention
from engine.runtime.batch import DeviceBatch
from engine.runtime.kv_cache import LayerCache
from tests.families import FAMILIES, VOCAB, Family, family, random_model

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = selfcheck.TOLERANCE["none"]
FP32 = torch.float32
WIDE = 100  # tokens: more than the self-check feeds, less than the context


@dataclass(frozen=True, slots=True)
class Forgetful:
    """A backend that ignores some options of a layer, and counts how often it was given them."""

    forgets: str
    seen: list[object]

    def check_block_size(self, block_size: int) -> None:
        """Any will do."""

    def prepare(self, batch: DeviceBatch) -> StepAttention:
        return ForgetfulStep(SdpaAttention().prepare(batch), self)


@dataclass(frozen=True, slots=True)
class ForgetfulStep:
    inner: StepAttention
    backend: Forgetful

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = {"window": window, "softcap": softcap, "sinks": sinks}
        if (lost := options[self.backend.forgets]) is not None:
            self.backend.seen.append(lost)
        options[self.backend.forgets] = None
        return self.inner.attend(query, cache, scale=scale, **options)  # type: ignore[arg-type]


def self_check(model: PreTrainedModel, backend: AttentionBackend) -> float:
    """What a worker does at load, without fusion."""
    adapter = DecoderAdapter(model)
    shapes = adapter.probe()
    check_windows(adapter, shapes, backend, FP32, EXACT)
    expected = selfcheck.plain_logits(model, adapter.vocab_size)
    return selfcheck.check(
        expected, selfcheck.paged_logits(adapter, shapes, backend, FP32), EXACT, model.config.model_type
    )


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("window", "mistral"),
        ("window", "gemma3"),
        ("window", "gpt_oss"),
        ("softcap", "gemma2"),
        ("softcap", "vaultgemma"),
        ("sinks", "gpt_oss"),
        ("sinks", "mimo_v2_flash"),
    ],
)
def test_backend_that_ignores_an_option_is_caught(option: str, name: str) -> None:
    backend = Forgetful(option, [])
    with pytest.raises(ModelLoadError, match="would give wrong text"):
        self_check(random_model(family(name).config()), backend)
    assert backend.seen


def wide(row: Family) -> PreTrainedModel:
    names = {"sliding_window", "local_attention"} & set(row.settings)
    return random_model(row.config(**dict.fromkeys(names, WIDE)))


@pytest.mark.parametrize(
    "row", [row for row in FAMILIES if any(row.settings.get(n) for n in ("sliding_window", "local_attention"))], ids=str
)
def test_windows_wider_than_the_check_are_checked_too(row: Family) -> None:
    model = wide(row)
    before = model.config.to_dict()
    assert self_check(model, SdpaAttention()) < EXACT
    assert model.config.to_dict() == before, "the check leaves its narrow windows behind"
    found = {size for size in DecoderAdapter(model).probe_layers().windows.values() if size is not None}
    assert found == {WIDE // 2 if row.model_type == "modernbert-decoder" else WIDE}  # its setting counts both sides
    with pytest.raises(ModelLoadError, match=r"attention window \(\d+ tokens\) gets lost"):
        self_check(model, Forgetful("window", []))


def test_family_that_does_not_hand_its_window_on_is_refused() -> None:
    """phimoe masks by its window in eager attention, and never tells a kernel: no plant, transformers is like that."""
    with pytest.raises(ModelLoadError, match=r"attention window \(100 tokens\) gets lost"):
        self_check(random_model(family("phimoe").config(sliding_window=WIDE)), SdpaAttention())
    assert self_check(random_model(family("phimoe").config(sliding_window=256)), SdpaAttention()) < EXACT


def test_mixing_of_neighbours_that_no_layer_type_tells_of_is_caught() -> None:
    """What a convolution between layers does: right in one chunk of one sequence, wrong in any other."""
    model = random_model(family("llama").config())
    mlp = model.get_submodule("model.layers.1.mlp")

    class Convolved(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
            return super().forward(x + 0.3 * before)

    mlp.__class__ = Convolved
    with pytest.raises(ModelLoadError, match="would give wrong text"):
        self_check(model, SdpaAttention())


def test_lost_last_key_is_caught() -> None:
    class Short(SdpaAttention):
        def prepare(self, batch: DeviceBatch) -> StepAttention:  # type: ignore[override]
            lens = tuple(max(length - 1, 1) for length in batch.kv_lens_host)
            short = replace(batch, kv_lens=torch.tensor(lens, dtype=torch.int32), kv_lens_host=lens)
            return super().prepare(short)

    for name in ("llama", "gemma3_text"):
        with pytest.raises(ModelLoadError, match="would give wrong text"):
            self_check(random_model(family(name).config()), Short())


def test_what_goes_wrong_far_out_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary table that ends early, for example."""
    forward = DecoderAdapter.forward

    def clamped(
        self: DecoderAdapter, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        return forward(self, ids, positions.clamp(max=200), rows, context)

    monkeypatch.setattr(DecoderAdapter, "forward", clamped)
    with pytest.raises(ModelLoadError, match="would give wrong text"):
        self_check(random_model(family("ministral3").config()), SdpaAttention())


def test_whatever_a_model_asks_of_attention_beyond_the_contract_is_refused() -> None:
    """A bias by distance, say: to drop it would be silently wrong."""

    def asking(**more: object) -> PreTrainedModel:
        model = random_model(family("llama").config())
        attention = model.get_submodule("model.layers.1.self_attn")

        class Asking(type(attention)):  # type: ignore[misc]
            def forward(self, *args: object, **kwargs: object) -> object:
                return super().forward(*args, **kwargs, **more)

        attention.__class__ = Asking
        return model

    for more in ({"position_bias": torch.zeros(1)}, {"local_block": 7}):
        with pytest.raises(ModelLoadError, match=f"asks its attention for '{next(iter(more))}'"):
            DecoderAdapter(asking(**more)).probe()
    with pytest.raises(ModelLoadError, match="attends to later tokens"):
        DecoderAdapter(asking(is_causal=False)).probe()


def test_rounding_may_tip_a_few_tokens_to_other_experts_and_no_more() -> None:
    expected = [torch.ones(8, VOCAB), torch.ones(8, VOCAB)]

    def changed(tokens: int, by: float) -> list[torch.Tensor]:
        got = [part.clone() for part in expected]
        got[1][:tokens] += by
        return got

    check: Callable[..., float] = selfcheck.check
    assert check(expected, changed(4, 0.3), EXACT, "moe", tipped=0.25) == 0
    for got, tipped in ((changed(5, 0.3), 0.25), (changed(1, 0.3), 0.0), (changed(1, float("nan")), 0.25)):
        with pytest.raises(ModelLoadError, match="would give wrong text"):
            check(expected, got, EXACT, "moe", tipped=tipped)
