"""What can't be served is refused at load, through the worker, with its cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from engine.config import EngineConfig, KVConfig, ModelConfig, ParallelConfig
from engine.errors import ModelLoadError
from engine.runtime.worker import LocalWorker
from tests.families import Family, family, save_random
from tests.refused import BY_CONFIG, BY_PASS

pytestmark = pytest.mark.usefixtures("one_thread")


def start(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    model, kv = ModelConfig(path="x", quant="none"), KVConfig(memory="8MiB")
    config = EngineConfig(model=model, kv=kv, parallel=ParallelConfig(threads=1))
    LocalWorker(config, folder, lambda _: None)


@pytest.mark.parametrize(
    ("row", "reason"), [pair for group in BY_CONFIG.values() for pair in group], ids=lambda value: str(value)[:24]
)
def test_refused_by_its_configuration(row: Family, reason: str, tmp_path: Path) -> None:
    """There are no weights in the folder: nothing is read or built before the answer."""
    row.config().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=rf"{row.model_type}.*{reason}"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"), [pair for group in BY_PASS.values() for pair in group], ids=lambda value: str(value)[:24]
)
def test_refused_by_one_forward_pass(row: Family, reason: str, tmp_path: Path) -> None:
    save_random(row.config(), tmp_path)
    with pytest.raises(ModelLoadError, match=rf"{row.model_type}.*{reason}"):
        start(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "mxfp4", "compressed-tensors"])
def test_quantised_weights_are_refused(method: str, tmp_path: Path) -> None:
    save_random(family("llama").config(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelLoadError, match=rf"quantised \({method}\).*16 or 32 bits"):
        start(tmp_path)
