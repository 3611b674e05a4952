"""Any decoder-only `transformers` model over our paged pool: one path, no model zoo.

A registered attention function receives every layer's queries, keys and values and sends them through the
ForwardContext that the caller passes down as a keyword argument; all sequences are packed into one row of
tokens, told apart by their positions and by the batch. What this cannot serve is refused at load with a reason
(`models/support.py`, the probe, and the numerical self-check in `models/selfcheck.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from engine.errors import ModelLoadError
from engine.models.context import ContextSlot, ForwardContext, ProbeContext, Taps
from engine.models.fused.backbone import FusedBackbone
from engine.models.program import Program, make_program
from engine.models.stored_model import StoredModel
from engine.models.support import context_length, text_config, why_not_paged
from engine.models.taps import tapped
from engine.runtime.kv_cache import LayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION_NAME = "slipstream_paged"
# What a decoder layer may hand to its attention function beside what we use, and nothing of it changes the result here.
_WITHOUT_EFFECT = frozenset(
    {"dropout", "position_ids", "is_causal", "use_cache", "output_attentions", "output_router_logits"}
)


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    slipstream: ForwardContext | None = None,
    **rest: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` calls: query [1, heads, T, dim] -> ([1, T, heads, dim], None)."""
    context = slipstream
    if context is None:
        context = getattr(module, "slipstream_slot", ContextSlot()).context
    layer = getattr(module, "layer_idx", None)
    if context is None or not isinstance(layer, int):
        raise ModelLoadError(f"{type(module).__name__} does not say which layer of which forward pass it is")
    _check_call(module, attention_mask, rest)
    out = context.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.contiguous().unsqueeze(0), None  # some layers call view() on it


def _check_call(module: torch.nn.Module, mask: torch.Tensor | None, rest: dict[str, object]) -> None:
    """Refuse attention that asks for more than the pool can do: to ignore it would be silently wrong."""
    name = type(module).__name__
    if mask is not None:  # ours has no mask function, so the common masks are None
        raise ModelLoadError(f"{name} masks its keys in a way of its own, which can't be served")
    if rest.get("is_causal", getattr(module, "is_causal", None)) is False:
        raise ModelLoadError(f"{name} attends to later tokens (an encoder); only decoders can be served")
    if "logits_to_keep" in rest:  # handed down instead of used
        raise ModelLoadError(f"{name}'s model scores every token of a pass instead of those asked for")
    for option, given in rest.items():
        if option not in _WITHOUT_EFFECT and given is not None:
            raise ModelLoadError(f"{name} asks its attention for {option!r}, which can't be served")


class DecoderAdapter:
    """A finished `transformers` causal LM, or one that was kept in a file, run over packed tokens."""

    def __init__(self, model: PreTrainedModel | StoredModel) -> None:
        self.model = cast("PreTrainedModel", model.eval())  # the other has all that is asked for from here on
        self.config: PretrainedConfig = text_config(model.config)
        self.vocab_size: int = self.config.vocab_size
        self.num_layers: int = self.config.num_hidden_layers
        self.context_length = context_length(model.config)
        self.device: torch.device = model.device  # kept: a packed model may have no parameter left to tell it
        self._slot = ContextSlot()
        self.program: Program | None = None
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.slipstream_slot = self._slot  # type: ignore[assignment]  # torch's stub expects tensors
        if not isinstance(model, StoredModel):  # whose layers never call an attention function
            from transformers.modeling_utils import AttentionInterface

            AttentionInterface.register(ATTENTION_NAME, _paged_attention)
            model.set_attn_implementation(ATTENTION_NAME)

    def use_program(self) -> None:
        """Run the model as one native program wherever that is possible; call once it is fused and packed."""
        self.program = make_program(self.model)

    @torch.inference_mode()
    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        context: ForwardContext,
        taps: Taps | None = None,
    ) -> torch.Tensor:
        """Feed ids [T] at positions [T]; fp32 logits [len(rows), vocabulary] of the rows asked for."""
        program = self.program
        if program is not None and program.takes(context):
            if program.scores:
                return program.logits(ids, positions, rows, context, taps)
        else:
            program = None
        if isinstance(self.model.base_model, FusedBackbone):  # takes the rows itself, before its last layer's products
            wanted: dict[str, object] = {"rows": rows, "taps": taps, "program": program}
        else:
            wanted = {"logits_to_keep": rows}
        self._slot.context = context
        try:
            with tapped(self.model, None if "taps" in wanted else taps):
                out = self.model(
                    input_ids=ids.unsqueeze(0),
                    position_ids=positions.unsqueeze(0),
                    use_cache=False,
                    slipstream=context,
                    **wanted,
                )
        finally:
            self._slot.context = None
        return out.logits[0].float()

    def probe(self) -> tuple[LayerShape, ...]:
        """Shapes of all layers' cache entries, from one forward pass. Raises ModelLoadError if it can't be paged."""
        shapes = self.probe_layers().shapes
        return tuple(shapes[layer] for layer in range(self.num_layers))

    def probe_layers(self) -> ProbeContext:
        """What one forward pass asks of its attention. Raises ModelLoadError if it can't be paged."""
        context = ProbeContext()
        kind = self.model.config.model_type
        ids = torch.zeros(3, dtype=torch.long, device=self.device)
        try:
            logits = self.forward(ids, torch.arange(3, device=self.device), ids[:1], context)
        except ModelLoadError as error:
            raise ModelLoadError(f"{kind}: {error}") from error
        except Exception as error:  # whatever a network of another kind may raise
            raise ModelLoadError(f"{kind}: a pass over packed tokens fails: {type(error).__name__}: {error}") from error
        if reason := why_not_paged(self.model, context.called, self.num_layers):
            raise ModelLoadError(f"{kind}: {reason}")
        if logits.shape[0] != 1:
            raise ModelLoadError(f"{kind}: it scores every token of a pass instead of those asked for")
        return context
