"""Every family: packed, paged, chunked, decode and block runs equal the model's own eager forward, fused or not.

fp32 throughout; "equal" is within 1e-4 of the largest logit of a sequence.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from engine.attention.paged_cpu import PagedCpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig, KVConfig, ModelConfig, ParallelConfig
from engine.models.adapter import DecoderAdapter
from engine.runtime.worker import LocalWorker
from engine.types import Phase
from tests.contract import paged
from tests.families import CONTEXT, FAMILIES, VOCAB, Family, family, random_model, save_random

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4


@pytest.mark.parametrize("row", FAMILIES, ids=str)
def test_every_run_equals_the_plain_forward(row: Family) -> None:
    model, ids = random_model(row.config()), paged.sequences(VOCAB)
    reference, native = SdpaAttention(), PagedCpuAttention()
    expected = paged.plain(model, ids)
    adapter = DecoderAdapter(model)
    shapes = adapter.probe()
    assert paged.worst(expected, paged.paged(adapter, shapes, reference, ids)) < TOLERANCE
    assert paged.worst(expected, paged.paged(adapter, shapes, native, ids)) < TOLERANCE
    paged.fuse_in_place(adapter, shapes, native)
    assert paged.worst(expected, paged.paged(adapter, shapes, reference, ids)) < TOLERANCE
    assert paged.worst(expected, paged.paged(adapter, shapes, native, ids)) < TOLERANCE


@pytest.mark.parametrize("row", FAMILIES, ids=str)
def test_worker_starts_from_its_folder(row: Family, tmp_path: Path) -> None:
    """Safetensors, fused, with fp16 weights as on a CPU by default, past the self-check; nothing is drawn at random."""
    transformers_logging.disable_progress_bar()
    save_random(row.config(), tmp_path)
    phases: list[Phase] = []
    model, kv = ModelConfig(path="x", quant="fp16"), KVConfig(memory="8MiB")
    config = EngineConfig(model=model, kv=kv, parallel=ParallelConfig(threads=1))
    worker = LocalWorker(config, tmp_path, phases.append)
    assert worker.capacity().vocab_size == VOCAB
    # Past its original context, a longrope model's factors would change with the longest request beside it.
    assert worker.capacity().max_model_len == (64 if row is family("phi3-longrope") else CONTEXT)
    assert any("of the model's own" in phase.detail for phase in phases)
