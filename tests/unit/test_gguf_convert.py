"""Conversion: exact tensors under the right names, configurations, and a cache that is always whole."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.errors import ModelLoadError
from engine.hub.gguf_arch import ARCHITECTURES
from engine.hub.gguf_convert import convert_gguf, convert_into
from tests.unit.gguf_files import EOS, HEADS, HIDDEN, KV_HEADS, PAD, TOKENS, Tensors, random_tensors, write_gguf

Q8_0, Q4_1, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F16


def _convert(tmp_path: Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = convert_gguf(write_gguf(tmp_path / "model.gguf", *args, **kwargs), tmp_path / "cache")
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _interleave(weights: Any, heads: int) -> Any:
    """What llama.cpp's converter does to the q and k of Llama: rotary halves become pairs."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def test_llama_tensors_come_out_under_their_names_and_in_their_order(tmp_path: Path) -> None:
    wanted = random_tensors("llama")
    stored = dict(wanted)
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        for layer in (0, 1):
            stored[f"blk.{layer}.{name}.weight"] = _interleave(wanted[f"blk.{layer}.{name}.weight"], heads)
    _, found = _convert(tmp_path, tensors=stored)
    assert len(found) == len(wanted)
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.1.attn_k": "model.layers.1.self_attn.k_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }
    for source, target in names.items():
        assert np.array_equal(found[f"{target}.weight"], wanted[f"{source}.weight"])


@pytest.mark.parametrize("kind", [Q8_0, Q4_1, F16])
def test_quantized_tensors_equal_the_reference_dequantization(tmp_path: Path, kind: Any) -> None:
    tensors = random_tensors("qwen3")
    names = ["token_embd.weight", "blk.0.ffn_down.weight", "blk.1.attn_v.weight"]
    _, found = _convert(tmp_path, "qwen3", kinds=dict.fromkeys(names, kind))
    for name, target in zip(
        names, ["embed_tokens", "layers.0.mlp.down_proj", "layers.1.self_attn.v_proj"], strict=True
    ):
        expected = gguf.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
        assert np.array_equal(found[f"model.{target}.weight"], expected.reshape(tensors[name].shape))


def test_gemma_norms_lose_the_one_that_llama_cpp_adds(tmp_path: Path) -> None:
    tensors = random_tensors("gemma3")
    config, found = _convert(tmp_path, "gemma3")
    for source, target in (("attn_q_norm", "self_attn.q_norm"), ("post_ffw_norm", "post_feedforward_layernorm")):
        assert np.array_equal(found[f"model.layers.1.{target}.weight"], tensors[f"blk.1.{source}.weight"] - 1)
    assert np.array_equal(found["model.layers.0.mlp.up_proj.weight"], tensors["blk.0.ffn_up.weight"])
    assert config["layer_types"] == ["sliding_attention"] * 2 and config["sliding_window"] == 8
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4


def test_gpt2_matrices_are_transposed_and_its_biases_kept(tmp_path: Path) -> None:
    tensors = random_tensors("gpt2")
    config, found = _convert(tmp_path, "gpt2")
    for source, target in (("attn_qkv", "attn.c_attn"), ("ffn_down", "mlp.c_proj")):
        assert np.array_equal(found[f"transformer.h.0.{target}.weight"], tensors[f"blk.0.{source}.weight"].T)
        assert np.array_equal(found[f"transformer.h.0.{target}.bias"], tensors[f"blk.0.{source}.bias"])
    assert np.array_equal(found["transformer.wpe.weight"], tensors["position_embd.weight"])
    assert (config["n_embd"], config["n_layer"], config["layer_norm_epsilon"]) == (HIDDEN, 2, 1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_common_configuration(tmp_path: Path, architecture: str) -> None:
    config, found = _convert(tmp_path, architecture)
    assert config["architectures"][0].endswith(("ForCausalLM", "LMHeadModel"))
    assert (config["dtype"], config["vocab_size"], config["tie_word_embeddings"]) == ("float32", len(TOKENS), True)
    assert (config["eos_token_id"], config["pad_token_id"]) == (EOS, PAD)
    assert all(tensor.dtype == np.float32 for tensor in found.values())
    generation = json.loads(next((tmp_path / "cache").glob("*/generation_config.json")).read_text())
    assert generation["eos_token_id"] == [EOS, PAD]  # <|im_end|> from the metadata, <|endoftext|> by its text


def _with(name: str, *shape: int) -> Tensors:
    return random_tensors("llama") | {name: np.ones(shape, np.float32)}


def test_llama_options_reach_the_configuration(tmp_path: Path) -> None:
    bias = {f"blk.{i}.attn_q.bias": np.ones(HIDDEN, np.float32) for i in (0, 1)}
    config, found = _convert(tmp_path, tensors=_with("output.weight", len(TOKENS), HIDDEN) | bias)
    assert not config["tie_word_embeddings"] and "lm_head.weight" in found and config["attention_bias"]
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 1e4, HIDDEN // HEADS)
    config, _ = _convert(tmp_path, keys={"llama.attention.sliding_window": 16, "llama.rope.freq_base": 1e6})
    assert (config["model_type"], config["sliding_window"], config["rope_theta"]) == ("mistral", 16, 1e6)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 2.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_rotary_scaling_is_carried_over(tmp_path: Path, keys: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    config, _ = _convert(tmp_path, keys={f"llama.rope.scaling.{key}": value for key, value in keys.items()})
    assert config.get("rope_scaling") == scaling


def test_llama3_rotary_factors_give_back_their_parameters(tmp_path: Path) -> None:
    wavelength = 2 * np.pi * 500_000.0 ** (np.arange(32) / 32)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    keys = {"llama.attention.key_length": 64, "llama.rope.freq_base": 500_000.0}
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    config, found = _convert(tmp_path, tensors=random_tensors("llama") | {"rope_freqs.weight": factors}, keys=keys)
    scaling = config["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"], scaling["high_freq_factor"]) == ("llama3", 32.0, 4.0)
    assert not any("rope" in name for name in found)
    with pytest.raises(ModelLoadError, match="none of a known kind"):
        _convert(tmp_path, tensors=random_tensors("llama") | {"rope_freqs.weight": factors[::-1].copy()}, keys=keys)


def test_phi3_long_factors_and_partial_rotation(tmp_path: Path) -> None:
    factors = {f"rope_factors_{n}.weight": np.arange(1, 3, dtype=np.float32) for n in ("long", "short")}
    config, _ = _convert(
        tmp_path, "phi3", random_tensors("phi3") | factors, keys={"phi3.rope.dimension_count": HIDDEN // HEADS // 2}
    )
    assert config["rope_scaling"] == {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}
    assert (config["partial_rotary_factor"], config["original_max_position_embeddings"]) == (0.5, 32)


def _without(name: str) -> Tensors:
    return {key: value for key, value in random_tensors("llama").items() if key != name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "'mamba' are not supported; known: gemma3, gpt2, llama"),
        ({"tensors": _without("blk.1.ffn_up.weight")}, r"blk\.1\.ffn_up\.weight is missing"),
        ({"tensors": _without("output_norm.weight")}, r"output_norm\.weight is missing"),
        ({"tensors": _with("blk.0.ssm_a.weight", 4)}, r"'blk\.0\.ssm_a\.weight' is not known"),
        ({"tensors": _with("blk.x.attn_q.weight", 4)}, "is not known"),
        ({"keys": {"llama.block_count": 3}}, "missing"),
        ({"keys": {"llama.block_count": 1}}, "does not hold 1 layers"),
        ({"keys": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"keys": {"llama.attention.head_count": 0}}, "make no model"),
        ({"keys": {"llama.attention.head_count_kv": 0}}, "make no model"),
        ({"keys": {"llama.attention.key_length": 0}}, "make no model"),
        ({"keys": {"llama.rope.dimension_count": 2}}, "part of a head"),
        ({"keys": {"llama.rope.scaling.type": "odd", "llama.rope.scaling.factor": 2.0}}, "'odd' is not supported"),
        ({"keys": {"llama.attention.head_count": 5, "llama.attention.key_length": 8}}, "does not divide"),
        ({"keys": {"split.count": 3}}, "join them first"),
        ({"tensors": _with("token_embd.weight", 4, HIDDEN)}, "an embedding of 4 rows"),
        (
            {"tensors": _with("output_norm.weight", HIDDEN) | {"output_norm.weight": np.full(HIDDEN, np.nan, "f4")}},
            "NaN",
        ),
    ],
)
def test_what_cannot_be_converted_says_why(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {"architecture": "llama"} | options
    if options["architecture"] == "mamba":
        options["tensors"] = {}
    path = write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ModelLoadError, match=message):
        convert_gguf(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-made stays


def test_a_second_conversion_reads_the_cache(tmp_path: Path) -> None:
    path, phases = write_gguf(tmp_path / "model.gguf"), list[str]()
    first = convert_gguf(path, tmp_path / "cache", phases.append)
    assert convert_gguf(path, tmp_path / "cache", phases.append) == first and len(phases) == 1


def test_the_content_of_a_file_tells_models_apart_and_its_time_does_not(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    first = convert_gguf(path, tmp_path / "cache")
    os.utime(path, (1, 1))
    assert convert_gguf(path, tmp_path / "cache") == first
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit in the middle
    path.write_bytes(content)
    assert convert_gguf(path, tmp_path / "cache") != first


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    weights = convert_gguf(path, tmp_path / "cache") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    convert_gguf(path, tmp_path / "cache")
    assert weights.read_bytes() == whole


def test_of_two_conversions_at_once_both_succeed(tmp_path: Path) -> None:
    """The second one begins and ends while the first has not yet begun to write."""
    path, cache, done = write_gguf(tmp_path / "model.gguf"), tmp_path / "cache", list[Path]()
    first = convert_gguf(path, cache, lambda _: done.append(convert_gguf(path, cache)))
    assert done == [first] and [folder.name for folder in cache.iterdir()] == [first.name]


def test_leftovers_of_killed_conversions_go_when_they_are_old(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, age in ((".converting-old", 24 * 3600), (".converting-new", 0)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    convert_gguf(write_gguf(tmp_path / "model.gguf"), cache)
    assert {folder.name for folder in cache.glob(".*")} == {".converting-new"}


def test_a_cache_that_can_not_be_written_is_a_load_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelLoadError, match="could not be converted"):
        convert_gguf(write_gguf(tmp_path / "model.gguf"), tmp_path / "cache")


def test_many_rows_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.hub.gguf_tensors._CHUNK_ELEMENTS", 3 * HIDDEN)
    tensors = random_tensors("gemma3")
    (tmp_path / "out").mkdir()
    convert_into(write_gguf(tmp_path / "model.gguf", "gemma3", kinds={"token_embd.weight": Q8_0}), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = gguf.dequantize(gguf.quants.quantize(tensors["token_embd.weight"], Q8_0), Q8_0)
    assert np.array_equal(found["model.embed_tokens.weight"], expected)
