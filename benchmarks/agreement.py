"""How many greedy answers equal those of `transformers` generate, in fp32 and in the default mode.

`python -m benchmarks.agreement [--model demo] [--tokens 64] [--json FILE]`. Twenty prompts, whole answers compared.
Where an answer differs, the reference's gap between its two best logits at that place is printed: under 1e-4 it is
a tie that the order of summation decides.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.hub.resolve import resolve
from engine.llm import CACHE_DIR, LLM
from engine.types import SamplingParams

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees because",
    "List three uses of a paper clip:\n1.",
    "In 1969, astronauts",
    "SELECT name, age FROM users WHERE",
    "The recipe needs 2 eggs, 150 g of flour and",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\ndef softmax(x):\n",
    "The three laws of thermodynamics state that",
    "Q: What is 17 times 23?\nA:",
    "Translate to French: The cat sleeps on the roof.\n",
    "The stock market fell sharply on Monday after",
    "A haiku about autumn:\n",
    "The difference between a virus and a bacterium is",
    '{"name": "Alice", "age": 31, "city":',
    "To tie a bowline knot, first",
    "The Roman Empire reached its greatest extent under",
    "My favourite thing about winter is",
)


def reference(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens of `transformers`. The mask is needed: the demo model's pad id ends turns, too."""
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return out[0, len(ids) :].tolist()


def gap(model: PreTrainedModel, ids: list[int]) -> float:
    """Distance of the two best logits after `ids`."""
    with torch.inference_mode():
        best, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    return best - second


def compare(path: str, quant: str, expected: list[list[int]], tokens: int, model: PreTrainedModel) -> dict[str, object]:
    with LLM(path, quant=quant, memory="384MiB") as llm:
        params = SamplingParams(max_tokens=tokens, temperature=0.0)
        answers = llm.generate(list(PROMPTS), params)
    differences = []
    for prompt, want, answer in zip(PROMPTS, expected, answers, strict=True):
        have = list(answer.token_ids)
        if have != want:
            first = next(i for i, (a, b) in enumerate(zip([*want, -1], [*have, -1], strict=False)) if a != b)
            distance = gap(model, [*answer.prompt_ids, *want[:first]])
            differences.append({"prompt": prompt, "token": first, "gap": distance})
    equal = len(PROMPTS) - len(differences)
    print(f"{quant:5s} {equal} of {len(PROMPTS)} answers equal")
    for difference in differences:
        print(f"      differs at token {difference['token']}, gap {difference['gap']:.2g}: {difference['prompt']!r}")
    return {"quant": quant, "equal": equal, "of": len(PROMPTS), "differences": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = resolve(options.model, CACHE_DIR.expanduser())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with LLM(str(folder), quant="none", memory="64MiB") as llm:
        prompts = [llm.tokenizer.encode(text) for text in PROMPTS]
    expected = [reference(model, ids, options.tokens) for ids in prompts]
    results = [compare(str(folder), quant, expected, options.tokens, model) for quant in ("none", "fp16")]
    if options.json:
        options.json.write_text(json.dumps({"tokens": options.tokens, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
