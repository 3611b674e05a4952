"""What a folder's files say of the diffusion model in it, without reading a weight."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine.config import DiffusionConfig, DraftConfig, ModelConfig
from engine.diffusion import DiffusionSpec
from engine.errors import ModelLoadError
from engine.hub.diffusion import find_spec, settle_pipeline

CHATML = {"<|endoftext|>": 90, "<|im_start|>": 91, "<|im_end|>": 92}
LLADA = {"model_type": "llada", "mask_token_id": 95, "vocab_size": 90, "embedding_size": 100}
DREAM = {"model_type": "Dream", "mask_token_id": 95, "vocab_size": 100}
V2 = {"model_type": "Fast_dLLM_Qwen", "bd_size": 32, "vocab_size": 100}
SDAR = {"model_type": "sdar", "block_size": 4, "vocab_size": 100}
SEED = {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"], "vocab_size": 100}
A2D = {"model_type": "a2d-qwen3", "vocab_size": 100}
OWN = {"model_type": "a2d-llama", "vocab_size": 100, "mask_token_id": 95, "block_size": 8}
GUARD = DiffusionSpec("full", 95, 32)


def _write(folder: Path, config: dict[str, Any], tokens: dict[str, int] | None = None, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    added = [{"id": number, "content": text} for text, number in (tokens or {}).items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {}}}))
    for name, values in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("config", "tokens", "expected"),
    [
        (LLADA, {"<|eot_id|>": 97}, DiffusionSpec("full", 95, 32, stop_ids=(97,), family="LLaDA")),
        (
            DREAM,
            CHATML,
            DiffusionSpec(
                "full", 95, 32, shift=True, stop_ids=(92,), tempered=True, dream_schedule=True, family="Dream"
            ),
        ),
        (
            V2,
            {**CHATML, "|<MASK>|": 93},
            DiffusionSpec(
                "block_causal", 93, 32, sub_block=8, shift=True, stop_ids=(92,), tempered=True, family="Fast-dLLM v2"
            ),
        ),
        (
            SDAR,
            {**CHATML, "<|MASK|>": 94},
            DiffusionSpec("block_causal", 94, 4, stop_ids=(92,), rule="dynamic", family="SDAR"),
        ),
        (SEED, {}, DiffusionSpec("block_causal", 5, 4, family="Stable-DiffCoder")),
        (
            {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "vocab_size": 100},
            {"<|mask|>": 95, "<|role_end|>": 92},
            DiffusionSpec("full", 95, 32, stop_ids=(92,), family="LLaDA-MoE"),
        ),
        (
            {**SDAR, "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]},
            {**CHATML, "<|MASK|>": 94},
            DiffusionSpec("block_causal", 94, 4, stop_ids=(92,), rule="dynamic", family="SDAR-MoE"),
        ),
        ({**OWN, "diffusion_attention": "full"}, {}, DiffusionSpec("full", 95, 8, family="dllm a2d")),
        ({**OWN, "diffusion_attention": "block_causal"}, {}, DiffusionSpec("block_causal", 95, 8, family="dllm a2d")),
        (
            {
                "model_type": "qwen2",
                "vocab_size": 100,
                "mask_token_id": 7,
                "diffusion_attention": "full",
                "shift_logits": True,
            },
            {},
            DiffusionSpec("full", 7, 32, shift=True, family="masked diffusion"),
        ),
    ],
)
def test_what_each_family_says(
    tmp_path: Path, config: dict[str, Any], tokens: dict[str, int], expected: DiffusionSpec
) -> None:
    assert find_spec(_write(tmp_path, config, tokens)) == expected


def test_an_autoregressive_checkpoint_is_none(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100})
    assert find_spec(folder) is None and find_spec(folder, DiffusionConfig(rule="quota")) is None
    assert find_spec(_write(tmp_path, {})) is None


def test_any_decoder_is_one_if_the_configuration_says_so(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"model_type": "qwen2", "vocab_size": 100}, {"<|mask|>": 33})
    assert find_spec(folder, DiffusionConfig(attention="full")) == DiffusionSpec(
        "full", 33, 32, family="masked diffusion"
    )
    blocks = find_spec(folder, DiffusionConfig(attention="block_causal", block_length=16, shift=True, mask_id=9))
    assert blocks == DiffusionSpec("block_causal", 9, 16, shift=True, family="masked diffusion")
    with pytest.raises(ModelLoadError, match=r"set diffusion\.block_length"):
        find_spec(folder, DiffusionConfig(attention="block_causal"))


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens", "mask_token", "generation_config"])
def test_where_the_mask_may_be_named(tmp_path: Path, place: str) -> None:
    files: dict[str, Any] = {}
    tokens = {**CHATML, "[M]": 96}
    match place:
        case "added_tokens_decoder":
            files["tokenizer_config"] = {"added_tokens_decoder": {"96": {"content": "<|MASK|>"}}}
        case "added_tokens":
            files["added_tokens"] = {"<|MASK|>": 96}
        case "mask_token":
            files["tokenizer_config"] = {"mask_token": {"content": "[M]"}}
        case "generation_config":
            files["generation_config"] = {"mask_token_id": 96}
    found = find_spec(_write(tmp_path, SDAR, tokens, **files))
    assert found is not None and found.mask_id == 96
    told = find_spec(tmp_path, DiffusionConfig(mask_id=97))
    assert told is not None and told.mask_id == 97


@pytest.mark.parametrize(
    ("name", "attention"),
    [("Q-mdlm-v0.1/snapshots/x", "full"), ("q-BD3LM", "block_causal"), ("mdlm-and-others/q-bd3lm", "block_causal")],
)
def test_dllms_two_forms_are_told_apart_by_their_names(tmp_path: Path, name: str, attention: str) -> None:
    found = find_spec(_write(tmp_path / name, A2D, {"<|mask|>": 93}))
    assert found is not None and (found.attention, found.block_length, found.mask_id) == (attention, 32, 93)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (SDAR, None, r"set diffusion\.mask_id"),
        (A2D, None, r"does not say which tokens see which; set\s+diffusion\.attention"),
        ({**SDAR, "block_size": None, "mask_token_id": 7}, None, r"\(block_size\); set diffusion\.block_length"),
        ({**SDAR, "mask_token_id": 7}, DiffusionConfig(block_length=8), "trained with blocks of 4 tokens, not 8"),
        ({**DREAM, "mask_token_id": 100}, None, "its mask token has the id 100, and there are 100 ids"),
        (DREAM, DiffusionConfig(mask_id=100), r"diffusion\.mask_id has the id 100, and there are 100 ids"),
        ({**DREAM, "mask_token_id": -3}, None, "id -3|set diffusion"),
        ({**SDAR, "mask_token_id": 7, "shift_logits": 1}, None, "shift_logits must be true or false"),
        ({**OWN, "diffusion_attention": "both"}, None, "diffusion_attention must be one of full, block_causal"),
        ({"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]}, None, "expert layers"),
        ({"model_type": "llada", "architectures": ["LLaDA2MoeModelLM"]}, None, "groups of experts"),
        ({"model_type": "mdlm", "architectures": ["MDLM"]}, None, "time of each step"),
        ({"model_type": "bd3lm", "architectures": ["BD3LM"]}, None, "time of each step"),
        ({"model_type": "diffusion_gemma"}, None, "not built here"),
    ],
)
def test_what_is_refused_and_why(
    tmp_path: Path, config: dict[str, Any], given: DiffusionConfig | None, message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        find_spec(_write(tmp_path, config), given)


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config", "tokenizer", "added_tokens"])
@pytest.mark.parametrize("text", ["{", "[]", "\udc80"])
def test_unreadable_files_are_named(tmp_path: Path, name: str, text: str) -> None:
    folder = _write(tmp_path, SDAR)
    (folder / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelLoadError, match=rf"{name}\.json"):
        find_spec(folder)


def test_a_diffusion_model_gets_a_pipeline_that_denoises(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert settle_pipeline(ModelConfig("m"), GUARD).pipeline == "masked_diffusion"
    assert "pipeline masked_diffusion" in caplog.text
    dual = ModelConfig("m", pipeline="dual_diffusion")
    assert settle_pipeline(dual, GUARD) is dual
    plain = ModelConfig("m")
    assert settle_pipeline(plain, None) is plain


def test_pipelines_and_checkpoints_that_do_not_fit() -> None:
    for name in ("masked_diffusion", "dual_diffusion"):
        with pytest.raises(ModelLoadError, match=rf"models\.pipeline: {name}.*set diffusion\.attention"):
            settle_pipeline(ModelConfig("m", pipeline=name), None)
    drafted = ModelConfig("m", pipeline="speculative", draft=DraftConfig("ngram"))
    with pytest.raises(ModelLoadError, match="drafts can't speed up"):
        settle_pipeline(drafted, GUARD)
