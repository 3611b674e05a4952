"""A block-diffusion draft as one native call computes what its modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.attention.paged_cpu import PagedCpuAttention
from engine.models.dflash.model import DFlashModel, assemble
from engine.models.dflash.spec import DraftLayer
from engine.models.draft_host import DraftHost
from engine.protocols import DraftAsk
from engine.runtime.batch import SeqInput, pack
from engine.runtime.linear import pack_linear
from tests.programs import BLOCK, CPU, pack_all
from tests.tiny import tiny_config, tiny_model
from tests.tiny_drafts import tiny_spec, tiny_tensors

CASES: dict[str, tuple[dict[str, Any], bool]] = {  # what is special, and whether ids are enough
    "full attention": ({}, True),
    "sliding and causal": ({"layers": (DraftLayer(7, causal=True), DraftLayer(4))}, True),
    "causal, biases": ({"layers": (DraftLayer(causal=True), DraftLayer()), "attention_bias": True}, True),
    "long block": ({"layers": (DraftLayer(),), "taps": (1,), "block_size": 19}, True),
    "own ends": ({"anchor_predicts": True, "own_embedding": True, "own_head": True}, False),
    "small vocabulary": ({"draft_vocab_size": 220, "own_head": True}, True),
    "scaled": ({"embedding_scale": 3.0, "logit_scale": 0.5, "logit_softcap": 4.0}, True),
}


def draft(format: str, **special: Any) -> DFlashModel:
    """A draft of a tiny Llama, packed, over a pool of 24 blocks, the last 16 of them for what it writes past others."""
    target, config = tiny_model("llama"), tiny_config("llama")
    host = DraftHost(
        config=config,
        embedding=target.get_input_embeddings(),
        head=pack_linear(target.get_output_embeddings(), format),
        attention=PagedCpuAttention(),
        dtype=torch.float32,
        device=CPU,
        context_length=128,
        pack=lambda module: pack_all(module, format),
    )
    spec = tiny_spec(config, **special)
    return assemble(spec, tiny_tensors(spec), host).bind(24, BLOCK, range(8, 24))


def drafted(model: DFlashModel, limits: tuple[int, int] = (5, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of two requests, of which one has a context of 9 tokens and the other one of 3."""
    random = torch.Generator().manual_seed(4)
    tables = ((5, 2, 0), (3,))
    inputs = [SeqInput([1] * 9, 0, tables[0], 9), SeqInput([1] * 3, 0, tables[1], 3)]
    batch = pack(inputs, BLOCK, CPU)
    width = model.spec.hidden_size
    model.write(tuple(torch.randn(12, width, generator=random) for _ in model.taps), batch)
    asks = [
        DraftAsk(name, limit, context, block_ids=table)
        for name, limit, context, table in zip("ab", limits, (9, 3), tables, strict=True)
    ]
    return model.blocks([17, 40], asks)


@pytest.mark.parametrize("format", ["fp16", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_drafts(case: str, format: str) -> None:
    special, from_ids = CASES[case]
    model = draft(format, **special)
    assert model.program is not None and model.program.embeds == from_ids
    logits, hidden = drafted(model)
    assert model.program.step.profile()["calls"] == 1
    model.program = None
    want, states = drafted(model)
    assert logits.shape == want.shape and hidden.shape == states.shape
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(hidden, states)


def test_one_token_of_each_request() -> None:
    """Rows of one column are rows with gaps."""
    model = draft("fp16")
    logits, _ = drafted(model, (1, 1))
    model.program = None
    torch.testing.assert_close(logits, drafted(model, (1, 1))[0])


def test_convolutions_stay_modules() -> None:
    model = draft("fp16", conv_kernel=3, selector_rank=8, selector_top_k=5)
    assert model.program is None and drafted(model)[0].shape == (2, 5, model.spec.vocab_size)
