"""Any decoder-only `transformers` model over our paged pool: one path, no model zoo.

A registered attention function receives every layer's queries, keys and values and sends them through the
ForwardContext that the caller passes down as a keyword argument; all sequences are packed into one row of
tokens, told apart by their positions and by the batch. What this cannot serve is refused at load with a reason
(`check_supported`, and the numerical self-check in `models/selfcheck.py`).
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from engine.errors import ModelLoadError
from engine.models.context import ForwardContext, ProbeContext
from engine.runtime.kv_cache import LayerShape

ATTENTION_NAME = "slipstream_paged"
_SERVED_LAYERS = {"full_attention", "sliding_attention"}


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  always None for a function without a mask entry
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    slipstream: ForwardContext | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` calls: query [1, heads, T, dim] -> ([1, T, heads, dim], None)."""
    if slipstream is None:
        raise ModelLoadError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = slipstream.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


class DecoderAdapter:
    """A finished `transformers` causal LM, run over packed tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(ATTENTION_NAME, _paged_attention)
        self.model = model.eval()
        self.config: PretrainedConfig = model.config.get_text_config()
        self.vocab_size: int = self.config.vocab_size
        self.num_layers: int = self.config.num_hidden_layers
        model.set_attn_implementation(ATTENTION_NAME)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Feed ids [T] at positions [T]; fp32 logits [len(rows), vocabulary] of the rows asked for."""
        out = self.model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            slipstream=context,
        )
        return out.logits[0].float()

    def probe(self) -> tuple[LayerShape, ...]:
        """Shapes of all layers' cache entries, from one forward pass. Raises ModelLoadError if layers are missing."""
        context = ProbeContext()
        one = torch.zeros(1, dtype=torch.long, device=self.device)
        self.forward(one, one, one, context)
        if context.calls != self.num_layers or set(context.shapes) != set(range(self.num_layers)):
            raise ModelLoadError(
                f"{self.config.model_type}: {context.calls} attention calls in a pass of {self.num_layers} layers; "
                "models with recurrent, shared or hybrid layers can't be served"
            )
        return tuple(context.shapes[i] for i in range(self.num_layers))


def check_supported(config: PretrainedConfig) -> None:
    """Refuse, from the configuration alone, what this adapter can't serve. Raises ModelLoadError with the reason."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{config.model_type}: an encoder-decoder model; only decoders can be served")
    unknown = set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYERS
    if unknown:
        raise ModelLoadError(f"{config.model_type}: layers of type {', '.join(sorted(unknown))} can't be served")


def context_length(config: PretrainedConfig) -> int:
    """Tokens that one sequence may have. `longrope` models get their original context.

    `transformers` switches those from short to long factors for a whole forward pass when any position in it is
    past the original context, so a request's tokens would depend on which other requests run beside it.
    """
    text = config.get_text_config()
    declared = int(getattr(text, "max_position_embeddings", None) or 2048)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        return min(declared, int(original or declared))
    return declared
