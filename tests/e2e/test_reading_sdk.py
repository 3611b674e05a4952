"""Requests that read, through the openai SDK against the demo model, compared with transformers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from engine.hub.resolve import resolve
from tests.e2e.process import ServerProcess
from tests.e2e.wire import Json, assert_idle, error_of, get, metrics, post

TEXTS = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "Interest rates rose again in the third quarter.",
    "é" * 40,
)
QUESTIONS: Any = [
    {"type": "predicate", "name": "refund", "instructions": "Does the customer ask for money back?"},
    {
        "type": "choice",
        "name": "topic",
        "instructions": "What is the message about?",
        "choices": [{"value": "billing"}, {"value": "weather"}, {"value": True}],
    },
    {"type": "score", "instructions": "How angry is it?", "levels": [{"label": "calm"}, {"label": "furious"}]},
]
TICKET = "I was charged twice for my order. Please give me my money back at once! " * 3


@pytest.fixture(scope="module")
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    """Not strict: the SDK asks for vectors in base64 by itself, which its own types don't have."""
    with OpenAI(base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
    assert_idle(demo.url)


@pytest.fixture(scope="module")
def strict(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("demo", Path.home() / ".cache" / "slipstream")


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return found


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


@torch.inference_mode()
def states(model: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    """What the output head reads, [T, width]."""
    out = model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    found: np.ndarray = out.last_hidden_state[0].double().numpy()
    return found


def cosine(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    x, y = np.asarray(a), np.asarray(b)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_vectors_are_those_of_transformers(
    client: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The SDK asks for base64 by itself. The demo's weights are packed, so the last digits are others."""
    mean = client.embeddings.create(model="demo", input=list(TEXTS))
    last = client.embeddings.create(model="demo", input=list(TEXTS), extra_body={"pooling": "last", "normalize": False})
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert mean.usage.prompt_tokens == mean.usage.total_tokens == sum(lengths)
    for text, own, end in zip(TEXTS, mean.data, last.data, strict=True):
        want = states(model, tokenizer(text)["input_ids"])
        assert len(own.embedding) == want.shape[1] and np.linalg.norm(own.embedding) == pytest.approx(1, abs=1e-5)
        assert cosine(own.embedding, want.mean(0)) > 0.999
        assert cosine(end.embedding, want[-1]) > 0.998
        assert np.linalg.norm(end.embedding) == pytest.approx(np.linalg.norm(want[-1]), rel=0.05)
    cats, rates = mean.data[:2], mean.data[2]
    assert cosine(cats[0].embedding, cats[1].embedding) > cosine(cats[0].embedding, rates.embedding)


def test_floats_ids_and_one_at_a_time_give_the_same(
    client: OpenAI, strict: OpenAI, tokenizer: PreTrainedTokenizerBase
) -> None:
    together = strict.embeddings.create(model="demo", input=list(TEXTS), encoding_format="float")
    for text, want in zip(TEXTS, together.data, strict=True):
        ids = tokenizer(text)["input_ids"]
        raw: object = client.embeddings.create(model="demo", input=ids, encoding_format="base64").data[0].embedding
        assert isinstance(raw, str)
        found = np.frombuffer(base64.b64decode(raw), "<f4")
        np.testing.assert_allclose(found, want.embedding, atol=1e-5)


def test_answers_are_the_model_s_own_law(
    strict: OpenAI, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Read again by hand: the prompt that the server must have made, one pass of transformers, the labels' tokens."""
    decision = strict.decisions.create(model="demo", input=TICKET, questions=QUESTIONS)
    refund, topic, anger = decision.answers
    assert refund.type == "predicate" and topic.type == "choice" and anger.type == "score"
    text = f"{TICKET}\n\nQuestion: Does the customer ask for money back?\nReply with yes or no, and nothing else."
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    with torch.inference_mode():
        law = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0)
    shares = []
    for word in ("yes", "no"):
        forms = {form for w in (word, word.capitalize(), word.upper()) for form in (w, f" {w}")}
        tokens = {tokenizer(form)["input_ids"][0] for form in forms if len(tokenizer(form)["input_ids"]) == 1}
        shares.append(float(law[sorted(tokens)].sum()))
    assert refund.probability == pytest.approx(shares[0] / sum(shares), abs=0.03)
    assert topic.choice == topic.probabilities[int(np.argmax([row.probability for row in topic.probabilities]))].value
    assert [row.value for row in topic.probabilities] == ["billing", "weather", True]
    for probabilities in (topic.probabilities, anger.probabilities):
        assert sum(row.probability for row in probabilities) == pytest.approx(1)
    assert anger.score == pytest.approx(anger.probabilities[1].probability)
    # The ticket was computed once: the other questions have found it.
    cached = decision.usage.input_tokens_details.cached_tokens
    again = strict.decisions.create(model="demo", input=TICKET, questions=QUESTIONS[:1])
    assert cached >= 2 * 32 and again.usage.input_tokens_details.cached_tokens >= 32
    assert again.answers[0].type == "predicate"
    assert again.answers[0].probability == pytest.approx(refund.probability, abs=1e-4)


def test_the_twin_says_the_same(client: OpenAI, demo: ServerProcess) -> None:
    asked = {"refund": {"type": "noul", "instructions": "Does the customer ask for money back?"}}
    twin: Json = post(demo.url, "/v1/systemone", {"state": TICKET, "questions": asked}).json()
    refund = client.decisions.create(model="demo", input=TICKET, questions=QUESTIONS[:1]).answers[0]
    assert refund.type == "predicate"
    assert twin["answers"]["refund"]["noul"] == pytest.approx(refund.probability, abs=1e-6)


def test_named_tokens_have_their_probabilities(client: OpenAI, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [tokenizer(word)["input_ids"][0] for word in (" Paris", " London", " Rome")]
    body: Any = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    named = client.completions.create(**body, logprobs=1, extra_body={"logprob_token_ids": ids})
    plain = client.completions.create(**body, logprobs=20)
    scores, best = named.choices[0].logprobs, plain.choices[0].logprobs
    assert scores is not None and best is not None and scores.top_logprobs and best.top_logprobs
    assert {" Paris", " London", " Rome"} <= set(scores.top_logprobs[0])
    shared = set(scores.top_logprobs[0]) & set(best.top_logprobs[0])
    assert " Paris" in shared
    for word in shared:
        assert scores.top_logprobs[0][word] == pytest.approx(best.top_logprobs[0][word], abs=1e-5)


def test_readers_and_writers_run_together(client: OpenAI, demo: ServerProcess) -> None:
    """What is read does not hang on who else is there, and nothing is left of any of it."""
    alone = client.embeddings.create(model="demo", input=TICKET).data[0].embedding
    words: Any = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    story = client.completions.create(**words).choices[0].text
    with ThreadPoolExecutor(8) as pool:
        vectors = [pool.submit(client.embeddings.create, model="demo", input=[TICKET, *TEXTS]) for _ in range(3)]
        stories = [pool.submit(lambda: client.completions.create(**words)) for _ in range(3)]
        verdicts = [
            pool.submit(client.decisions.create, model="demo", input=TICKET, questions=QUESTIONS) for _ in range(2)
        ]
        for vector in vectors:
            np.testing.assert_allclose(vector.result().data[0].embedding, alone, atol=1e-4)
        assert {one.result().choices[0].text for one in stories} == {story}
        first, second = (one.result().answers for one in verdicts)
    for a, b in zip(first, second, strict=True):
        assert a.type == b.type
    assert metrics(demo.url)


def test_what_is_wrong_is_told(client: OpenAI, demo: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="demo", input="x " * 9000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "input"
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="demo", input="x", dimensions=64)
    assert error.value.param == "dimensions"
    body = {"input": TICKET, "questions": QUESTIONS, "joint": True}
    assert error_of(post(demo.url, "/v1/decisions", body))["param"] == "joint"


def test_tokenizer_info_is_the_checkpoint_s(demo: ServerProcess, tokenizer: PreTrainedTokenizerBase) -> None:
    info: Json = get(demo.url, "/tokenizer_info").json()
    assert info["chat_template"] == tokenizer.chat_template and info["eos_token"] == tokenizer.eos_token
