"""A few families that differ in structure, the whole way: folder, worker, engine; against `transformers` generate()."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from engine.llm import LLM
from engine.types import SamplingParams
from tests.contract.ladder import GAP
from tests.families import family, save_random
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 259  # what the byte tokenizer knows
NEW_TOKENS = 24
LENGTHS = (5, 19, 40)
SERVED = ("llama-llama3", "gemma3_text", "gpt2", "gpt_oss", "qwen3_moe", "deepseek_v3", "cohere2", "opt", "stablelm")


def generated(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens by transformers' own loop and cache, and how far each was ahead of the second best."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [scores[0].topk(2).values for scores in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), [float(first - second) for first, second in best]


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers_logging.disable_progress_bar()
    save_random(family(name).config(vocab_size=VOCAB), tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(str(tmp_path), quant="none", memory="8MiB", threads=1, max_batched_tokens=32) as llm:
        ours = [answer.token_ids for answer in llm.generate(prompts, params)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs, gaps = generated(model, prompt)
        tie = next((i for i, gap in enumerate(gaps) if gap < GAP), NEW_TOKENS)
        assert list(tokens)[:tie] == theirs[:tie]
        assert tie == NEW_TOKENS, f"a near-tie at token {tie}: choose another seed"
