"""A fully fused model as a native program: one call of C code from token ids to logits (`kernels/native_step.py`).

It stands in for the modules wherever nobody listens to them and the pass goes over a pool that the native attention
reads. The modules stay: they are what the program is checked against, and what serves everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import TypeGuard, cast
from weakref import ref

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.kernels.layout import PagedBatch
from engine.kernels.library import library
from engine.kernels.matrix import PackedMatrix
from engine.kernels.native_step import NativeStep, StepPools, StepWanted
from engine.kernels.step_program import MOST_PLANS, StepProgram
from engine.models.context import ForwardContext, PagedContext, Taps
from engine.models.draft_host import head_of
from engine.models.fused.attention import FusedAttention
from engine.models.fused.backbone import FusedBackbone
from engine.models.fused.layer import FusedLayer
from engine.models.program_parts import Unfit, embedding_of, layer_of, norm_of, ropes_of
from engine.models.stored_model import finish_logits
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.linear import NativeLinear

logger = logging.getLogger(__name__)


class Program:
    """What runs in the place of a model's forward, or of its backbone's."""

    def __init__(self, step: NativeStep, model: nn.Module, backbone: FusedBackbone, layers: list[FusedLayer]) -> None:
        self.step = step
        self._backbone = backbone
        self._layers = layers
        self._order = [_attention(layer).layer_idx for layer in layers]
        inside = list(backbone.modules())
        known = {id(module) for module in inside}
        outside = [module for module in model.modules() if id(module) not in known]
        self._inner_hooks, self._outer_hooks = _hooks(inside), _hooks(outside)
        self._cache: ref[PagedKVCache] | None = None
        self._pools: StepPools | None = None

    @property
    def scores(self) -> bool:
        """Whether it goes as far as the logits, now: not where somebody listens to the head."""
        return self.step.program.head is not None and not any(self._outer_hooks)

    def takes(self, context: ForwardContext) -> TypeGuard[PagedContext]:
        """Whether this pass can go through the program."""
        if type(context) is not PagedContext or not isinstance(getattr(context.attention, "paged", None), PagedBatch):
            return False
        if any(self._inner_hooks) or any(layer.reduce is not None for layer in self._layers):
            return False
        return self._bound(context.cache) is not None

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, context: PagedContext, taps: Taps | None
    ) -> torch.Tensor:
        """See `DecoderAdapter.forward`. Raises IndexError for what is out of range, and MemoryError."""
        head = self.step.program.head
        assert head is not None
        out = torch.empty(rows.shape[0], head.outputs, dtype=torch.float32)
        self._run(ids, positions, rows, context, taps, logits=out)
        return out

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, context: PagedContext, taps: Taps | None
    ) -> torch.Tensor:
        """What the head takes: [len(rows), width]."""
        out = torch.empty(rows.shape[0], self.step.program.width, dtype=torch.float32)
        self._run(ids, positions, rows, context, taps, hidden=out)
        return out

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        context: PagedContext,
        taps: Taps | None,
        *,
        logits: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        program = self.step.program
        tapped = {}
        if taps is not None:
            tapped = {layer: torch.empty(ids.shape[0], program.width) for layer in taps.layers}
            taps.states.update(tapped)
        embedded = None
        if program.embedding is None:
            embedded = self._backbone.embed(ids.unsqueeze(0), positions.unsqueeze(0)).contiguous()
        tables = {}
        for index, rope in enumerate(program.ropes):
            if rope.cos is None:
                cos, sin = self._backbone.sources[index](positions.unsqueeze(0))
                tables[index] = (cos.contiguous(), sin.contiguous())
        pools = self._bound(context.cache)
        assert pools is not None
        batch = cast(PagedBatch, context.attention.paged)  # type: ignore[attr-defined]  # `takes` has looked
        wanted = StepWanted(logits, hidden, tapped, embedded, tables)
        self.step.run(ids, positions, context.slots, rows, batch, pools, wanted)

    def _bound(self, cache: PagedKVCache) -> StepPools | None:
        """The pool of this pass as the C code takes it, which is the last one's; None if it is of another kind."""
        if self._cache is None or self._cache() is not cache:
            self._cache = ref(cache)
            pools = [cache.layers[index] for index in self._order]
            self._pools = StepPools(self.step.program, pools) if StepPools.fit(self.step.program, pools) else None
        return self._pools


@torch.inference_mode()
def make_program(model: nn.Module) -> Program | None:
    """The program of a model whose backbone is fused and whose matrices are packed, or None; the log says why."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    try:
        program = _made(model)
    except Unfit as reason:
        logger.info("%s: no native program, its modules serve: %s", kind, reason)
        return None
    ends = "from ids" if program.step.program.embedding is not None else "from embedded tokens"
    goes = "to logits" if program.scores else "to hidden states"
    logger.info("%s: a native program serves, %s %s", kind, ends, goes)
    return program


def _made(model: nn.Module) -> Program:
    backbone, found = getattr(model, "base_model", None), library()
    if not isinstance(backbone, FusedBackbone):
        raise Unfit("its backbone is not fused")
    if found is None:
        raise Unfit("there is no native library")
    layers = cast(list[FusedLayer], list(backbone.get_submodule(backbone.layer_list).children()))
    ropes = ropes_of(backbone, torch.device("cpu"))
    embedding, scale = embedding_of(backbone)
    width = backbone.get_submodule(backbone.embedding).embedding_dim
    assert isinstance(width, int)
    constants = [layer_of(layer, rope, width) for layer, rope in zip(layers, backbone.rope_of, strict=True)]
    if len({layer.plan for layer in constants}) > MOST_PLANS:
        raise Unfit("its layers are of too many kinds")
    last = norm_of(backbone.get_submodule(backbone.norm_name), width)
    ending = _ending(model, backbone, width)
    head, logits_scale, softcap = ending if ending is not None else (None, 1.0, None)
    program = StepProgram(
        constants,
        ropes,
        last,
        width,
        head=head,
        embedding=embedding,
        embedding_scale=scale,
        logits_scale=logits_scale,
        logits_softcap=softcap,
    )
    return Program(NativeStep(found, program), model, backbone, layers)


def _ending(model: nn.Module, backbone: FusedBackbone, width: int) -> tuple[PackedMatrix, float, float | None] | None:
    """The head, and the scale and soft cap of its logits, if that is all that a model does with hidden states."""
    try:
        head = head_of(model)  # type: ignore[arg-type]  # or a StoredModel
    except ModelLoadError:
        return None
    if type(head) is not NativeLinear:
        return None
    hidden = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(12)) * 4
    backbone.forward = lambda *_, **__: backbone.output_type(last_hidden_state=hidden)  # type: ignore[method-assign]
    try:
        zeros = torch.zeros(1, 3, dtype=torch.long)
        out = model(input_ids=zeros, position_ids=zeros, use_cache=False, slipstream=None)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    finally:
        del backbone.forward
    want, raw = out.logits[0].float(), head(hidden)[0]
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    numbers = [value for value in vars(config).values() if isinstance(value, float) and value > 0]
    stored = (getattr(model, "logits_scale", 1.0), getattr(model, "logits_softcap", None))
    endings = chain((stored, (1.0, None)), *(((by, None), (1 / by, None), (1.0, by)) for by in numbers))
    for scale, softcap in endings:
        got = finish_logits(raw, scale, softcap)
        if got.shape == want.shape and float((got - want).abs().max()) <= 1e-5 * float(want.abs().max()):
            return head.matrix, scale, softcap
    return None


def _attention(layer: FusedLayer) -> FusedAttention:
    found = layer._modules[layer.wiring.attention]
    assert isinstance(found, FusedAttention)
    return found


def _hooks(modules: list[nn.Module]) -> list[dict[int, Callable[..., object]]]:
    """Where hooks of these modules would stand."""
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
