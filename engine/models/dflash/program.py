"""A draft's pass as one native call: from anchors and masks to the logits of the slots that somebody asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from engine.kernels.layout import PagedBatch, PoolLayer
from engine.kernels.library import library
from engine.kernels.native_step import NativeStep, StepPools, StepWanted
from engine.kernels.step_program import StepLayer, StepNorm, StepProgram
from engine.models.dflash.decoder import DecoderLayer
from engine.models.dflash.network import DFlashNetwork
from engine.models.program_parts import Unfit, matrix_of, rope_of, table_of, vector_of
from engine.protocols import StepAttention
from engine.runtime.batch import DeviceBatch

logger = logging.getLogger(__name__)


class DraftProgram:
    """A draft over its pool. `embeds`: it takes ids; otherwise rows that are embedded already."""

    def __init__(self, step: NativeStep, pools: StepPools) -> None:
        self.step = step
        self.embeds = step.program.embedding is not None
        self._pools = pools

    def run(
        self, batch: DeviceBatch, paged: PagedBatch, rows: torch.Tensor, embedded: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [R, outputs of the head] and what the head takes [R, D] of `rows` [R] of a batch."""
        program = self.step.program
        assert program.head is not None
        logits = torch.empty(rows.shape[0], program.head.outputs)
        hidden = torch.empty(rows.shape[0], program.width)
        wanted = StepWanted(logits, hidden, embedded=embedded)
        self.step.run(batch.ids, batch.positions, batch.slots, rows, paged, self._pools, wanted)
        return logits, hidden


@torch.inference_mode()
def draft_program(
    network: DFlashNetwork, head: nn.Module, embedding: nn.Module | None, pools: Sequence[PoolLayer]
) -> DraftProgram | None:
    """The program of a packed draft, or None; the log says why. `embedding` None: its rows are given."""
    try:
        return _made(network, head, embedding, pools)
    except Unfit as reason:
        logger.info("no native program for the draft, its modules serve: %s", reason)
        return None


def paged_of(attention: StepAttention) -> PagedBatch | None:
    """The batch as the native attention takes it, if it is the one that serves."""
    found = getattr(attention, "paged", None)
    return found if isinstance(found, PagedBatch) else None


def _made(
    network: DFlashNetwork, head: nn.Module, embedding: nn.Module | None, pools: Sequence[PoolLayer]
) -> DraftProgram:
    spec, found = network.spec, library()
    if found is None:
        raise Unfit("there is no native library")
    rope = rope_of(network.rope, network.norm.device)
    if rope.cos is None:
        raise Unfit("its rotary embedding has no table")
    table, scale = table_of(embedding)
    program = StepProgram(
        [_layer(layer, network) for layer in network.layers],  # type: ignore[arg-type]  # all are DecoderLayers
        [rope],
        _norm(network.norm, spec.rms_norm_eps),
        spec.hidden_size,
        head=matrix_of(head),
        embedding=table,
        embedding_scale=scale * spec.embedding_scale,
        logits_scale=spec.logit_scale,
        logits_softcap=spec.logit_softcap,
    )
    if not StepPools.fit(program, pools):
        raise Unfit("its pool is of another kind")
    return DraftProgram(NativeStep(found, program), StepPools(program, pools))


def _layer(layer: DecoderLayer, network: DFlashNetwork) -> StepLayer:
    if layer.attention_conv is not None or layer.mlp_conv is not None:
        raise Unfit("it has convolutions")
    for weight in (layer.query_norm, layer.key_norm):
        vector_of(weight)
    return StepLayer(
        qkv=matrix_of(layer.qkv),
        out=matrix_of(layer.output),
        up=matrix_of(layer.gate_up),
        down=matrix_of(layer.down),
        layout=layer.layout,
        shape=network.shapes[0],
        activation=layer.activation,
        attention_scale=layer.scale,
        pre_attention=_norm(layer.input_norm, layer.eps),
        pre_mlp=_norm(layer.mlp_norm, layer.eps),
        rope=0,
        window=layer.window,
        mode="causal" if layer.causal else "",
    )


def _norm(weight: torch.Tensor, eps: float) -> StepNorm:
    return StepNorm("rms", vector_of(weight), None, eps)
