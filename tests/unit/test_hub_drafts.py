"""Draft checkpoints: which drafter each published form is for, and what is said of folders that are no drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.config import DraftConfig, EngineConfig, ModelConfig
from engine.errors import ConfigError, ModelLoadError
from engine.hub.drafts import drafter_of, settle_draft


def checkpoint(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def served(path: str, drafter: str = "auto") -> EngineConfig:
    draft = DraftConfig(drafter, path=path, max_draft=5, tree=0)
    return EngineConfig(ModelConfig(pipeline="speculative", draft=draft))


@pytest.mark.parametrize(
    ("config", "drafter"),
    [
        ({"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "dflash_config": {}}, "dflash"),
        ({"architectures": ["DFlash2DraftModel"], "dflash_config": {"selector_rank": 256}}, "dflash"),
        ({"architectures": ["Qwen3DSparkModel"], "markov_rank": 256}, "dflash"),
        ({"architectures": ["LlamaForCausalLM"], "dflash_config": {"projector_type": "dspark"}}, "dflash"),
        ({"architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash"}, "dflash"),
        ({"speculators_model_type": "dflash", "transformer_layer_config": {}}, "dflash"),
        ({"dflash_config": {"mask_token_id": 1}}, "dflash"),
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "eagle3"),
        ({"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}, "eagle3"),
        ({"architectures": ["EAGLE-3"]}, "eagle3"),
    ],
)
def test_published_forms_are_known(config: dict[str, Any], drafter: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "draft", config)
    assert drafter_of(folder) == drafter
    settled = settle_draft(served(str(folder)), tmp_path).model
    assert settled.draft == DraftConfig(drafter, path=str(folder), max_draft=5)
    assert settled.draft.name == "draft" and settled.path == "demo"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "draft is no draft that can be used: its config.json names LlamaFor"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "names LlamaForCausalLMEagle; drafts of these kinds can"),
        ({"architectures": "DFlashDraftModel"}, "names no architecture"),
        ({"architectures": [3, None]}, "names 3, None"),
        ({"dflash_config": 1, "speculators_model_type": 7}, "names no architecture"),
        ({}, "names no architecture"),
        ("[1]", "config.json must hold an object"),
        ("{", "has no usable config.json"),
        ("[" * 100_000, "has no usable config.json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_draft_is_named(config: object, message: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "draft", config)
    with pytest.raises(ModelLoadError, match=r"^models\.draft\.path: ") as refused:
        settle_draft(served(str(folder)), tmp_path)
    assert message in str(refused.value)


@pytest.mark.parametrize("path", ["ngrem", "no/such/place/at/all", "\0", "a b"])
def test_a_path_to_nothing_names_the_setting_and_the_drafters_without_one(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^models\.draft\.path: .* without a checkpoint are: ngram\)"):
        settle_draft(served(path), tmp_path)


def test_a_drafter_that_is_named_must_fit_its_checkpoint(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "draft", {"architectures": ["LlamaForCausalLMEagle3"]}))
    fitting = served(folder, "eagle3")
    assert settle_draft(fitting, tmp_path) == fitting
    with pytest.raises(ConfigError, match=r"models\.draft\.drafter: 'dflash' can't use draft, which is for 'eagle3'"):
        settle_draft(served(folder, "dflash"), tmp_path)


def test_an_unknown_form_is_left_to_the_drafter_that_is_named(tmp_path: Path) -> None:
    config = served(str(checkpoint(tmp_path / "draft", {"architectures": ["Novel"]})), "dflash")
    assert settle_draft(config, tmp_path) == config


def test_without_a_checkpoint_there_is_nothing_to_settle(tmp_path: Path) -> None:
    plain = EngineConfig(ModelConfig())
    assert settle_draft(plain, tmp_path) is plain
    ngram = replace(plain, model=ModelConfig(pipeline="speculative", draft=DraftConfig()))
    assert ngram.model.draft is not None and ngram.model.draft.drafter == "ngram"
    assert settle_draft(ngram, tmp_path) is ngram
