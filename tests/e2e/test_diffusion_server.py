"""Diffusion models behind the real command, through the openai SDK: a full-attention and a block-causal one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import yaml
from openai import OpenAI

from server.metric_names import DIFFUSION_COUNTERS
from tests.e2e.process import ServerProcess, run_command
from tests.e2e.wire import Json, assert_idle, error_of, get, metrics, post
from tests.tiny_diffusion import EOS, MASK, TINY, save_tiny_diffusion

KINDS = {"full": "a2d_llama_full", "block": "sdar"}
MODELS = tuple(KINDS)
PROMPT = "The sea is "
WISHES: dict[str, list[Json]] = {
    "full": [
        {},
        {"rule": "frechet", "cache": "dual", "block_length": 8},
        {"rule": "quota", "steps": 20, "cache": "prefix", "block_length": 16},
        {"rule": "factor", "cache": "dual", "canvas": 64},
    ],
    "block": [{}, {"rule": "frechet", "delta": 0}, {"rule": "quota", "steps": 12}],
}
CASES = [(model, wish) for model in MODELS for wish in WISHES[model]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Both models; steps of the full one hold 256 tokens, and a request that does not say gets 40."""
    folder = tmp_path_factory.mktemp("diffusion")
    settings: Json = {"full": {"canvas": 40, "block_length": 32}, "block": {"rule": "threshold", "canvas": 24}}
    models = [
        {"id": name, "path": str(save_tiny_diffusion(kind, folder / name)), "memory_share": 0.5}
        | {"diffusion": settings[name]}
        for name, kind in KINDS.items()
    ]
    config: Json = {"models": models, "scheduler": {"max_batched_tokens": 256}, "kv": {"memory": "8MiB"}}
    config["parallel"] = {"threads": 1}
    file = folder / "both.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with ServerProcess("--config", str(file)) as server:
        yield server.wait_ready()
        assert_idle(server.url)
        server.assert_clean_end()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def ask(client: OpenAI, model: str, wish: Json | None = None, **fields: Any) -> Json:
    """A whole completion, as JSON; what leaves the server never holds a mask."""
    extra = {"return_token_ids": True, "diffusion": {"report": True, **(wish or {})}, **fields.pop("extra", {})}
    body: Json = {"model": model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, **fields}
    created: Any = client.completions.create(**body, extra_body=extra)
    answer: Json = created.model_dump()
    for choice in answer["choices"]:
        assert MASK not in choice["token_ids"]
        assert fields.get("echo") or TINY[KINDS[model]].mask_text not in choice["text"]
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])
    return answer


@pytest.mark.parametrize(("model", "wish"), CASES, ids=repr)
def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI, model: str, wish: Json) -> None:
    whole = ask(client, model, wish, extra={"ignore_eos": True})
    extra: Json = {"diffusion": {**wish, "report": True}, "ignore_eos": True, "return_token_ids": True}
    body: Json = {"model": model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True}
    stream: Any = client.completions.create(**body, extra_body=extra)
    chunks = [chunk.model_dump() for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    ids = [token for choice in choices for token in choice["token_ids"]]
    assert ids == whole["choices"][0]["token_ids"] and len(ids) == 40
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(choices) > 3  # as it is committed, not all at the end
    reports = [chunk["diffusion"] for chunk in chunks if "diffusion" in chunk]
    if model == "full":  # a block-causal model has the prompt in its prefix cache by now, and feeds it no more
        assert reports == [whole["diffusion"]]
    assert len(reports) == 1 and "diffusion" in chunks[-1]
    assert reports[0]["tokens_per_forward"] == pytest.approx(40 / reports[0]["forwards"], abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_chat(client: OpenAI, model: str) -> None:
    """Without `max_tokens` the answer is as long as the server's canvas."""
    messages: Any = [{"role": "user", "content": "Count to three."}]
    fields: Json = {"model": model, "messages": messages, "temperature": 0.8, "seed": 5}
    extra: Json = {"ignore_eos": True, "diffusion": {"report": True}}
    whole = client.chat.completions.create(**fields, extra_body=extra).model_dump()
    length = {"full": 40, "block": 24}[model]
    assert (whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]) == (length, "length")
    assert whole["diffusion"]["canvas"] in (length, 64)  # blocks of 32 in the one, of 4 in the other
    more: Json = {"stream": True, "stream_options": {"include_usage": True}}
    stream: Any = client.chat.completions.create(**fields, **more, extra_body=extra)
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == length
    assert "diffusion" in chunks[-1].model_dump()


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_ends_at_its_end_and_padding_does_not_count(client: OpenAI, model: str) -> None:
    """The whole canvas wants to be the end-of-sequence token, as it does behind a short answer of a trained model."""
    ended = ask(client, model, extra={"logit_bias": {str(EOS): 100}})
    assert (ended["choices"][0]["token_ids"], ended["choices"][0]["finish_reason"]) == ([EOS], "stop")
    assert (ended["choices"][0]["text"], ended["usage"]["completion_tokens"]) == ("", 1)
    later = ask(client, model, extra={"logit_bias": {str(EOS): 100}, "min_tokens": 5})["choices"][0]
    assert (len(later["token_ids"]), later["token_ids"].index(EOS), later["finish_reason"]) == (6, 5, "stop")
    ignored = ask(client, model, max_tokens=7, extra={"logit_bias": {str(EOS): 100}, "ignore_eos": True})
    assert (ignored["choices"][0]["token_ids"], ignored["choices"][0]["finish_reason"]) == ([EOS] * 7, "length")


@pytest.mark.parametrize(("model", "wish"), [("full", {"cache": "dual"}), ("block", {})])
def test_stops(client: OpenAI, model: str, wish: Json) -> None:
    """Text, tokens and usage end where they would in the whole answer, streamed or not."""
    whole = ask(client, model, wish, extra={"ignore_eos": True})["choices"][0]
    stop = next(piece for i in range(5, 30) if (piece := whole["text"][i : i + 2]).isascii())
    cut = ask(client, model, wish, stop=[stop], extra={"ignore_eos": True})
    (choice,) = cut["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole["text"].partition(stop)[0], "stop")
    assert choice["token_ids"] == whole["token_ids"][: cut["usage"]["completion_tokens"]] != whole["token_ids"]
    stream = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop], stream=True,
        extra_body={"ignore_eos": True, "diffusion": wish},
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == choice["text"]
    token = whole["token_ids"][6]
    found = ask(client, model, wish, extra={"stop_token_ids": [token], "ignore_eos": True})["choices"][0]
    assert found["token_ids"] == whole["token_ids"][: whole["token_ids"].index(token) + 1]


@pytest.mark.parametrize(("model", "wish"), [("full", WISHES["full"][1]), ("block", {})], ids=repr)
def test_seeds_and_choices(client: OpenAI, model: str, wish: Json) -> None:
    def choices(seed: int, n: int) -> Any:
        return ask(client, model, wish, n=n, seed=seed, temperature=1, extra={"ignore_eos": True})["choices"]

    pair, again, alone, other = choices(11, 2), choices(11, 2), choices(11, 1), choices(12, 1)
    assert (pair, alone) == (again, pair[:1])
    assert len({tuple(choice["token_ids"]) for choice in (*pair, *other)}) == 3


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_are_those_of_the_commit(client: OpenAI, model: str) -> None:
    """At temperature 0 the likeliest token of its step; under `threshold` above 1 one token is committed a step."""
    for wish in ({}, {"threshold": 2}):
        answer = ask(client, model, wish, logprobs=3, extra={"ignore_eos": True})
        scores = answer["choices"][0]["logprobs"]
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == 40
        for own, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
            assert own == max(top.values()) <= 0
    assert answer["diffusion"]["forwards"] >= 40


@pytest.mark.parametrize("model", MODELS)
def test_the_masks_text_is_text(server: ServerProcess, client: OpenAI, model: str) -> None:
    text = f"a {TINY[KINDS[model]].mask_text} b"
    ids = post(server.url, "/tokenize", {"model": model, "prompt": text}).json()["tokens"]
    assert MASK not in ids and len(ids) >= len(text)
    echoed = ask(client, model, prompt=text, echo=True, max_tokens=4)
    assert echoed["choices"][0]["text"].startswith(text) and echoed["usage"]["prompt_tokens"] == len(ids)
    messages: Any = [{"role": "user", "content": text}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=4)
    assert chat.usage is not None and chat.usage.prompt_tokens > len(ids)
    refused = error_of(post(server.url, "/v1/completions", {"model": model, "prompt": [5, MASK]}))
    assert refused["param"] == "prompt" and f"the token {MASK} at index 1" in refused["message"]


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        ("full", {"diffusion": {"rule": "best"}}, "diffusion.rule"),
        ("full", {"diffusion": {"cache": "block"}}, "diffusion.cache"),
        ("block", {"diffusion": {"cache": "prefix"}}, "diffusion.cache"),
        ("block", {"diffusion": {"block_length": 8}}, "diffusion.block_length"),
        ("full", {"diffusion": {"delta": 0.1}}, "diffusion.delta"),
        ("full", {"diffusion": {"verify": "exact"}}, "diffusion.verify"),
        ("full", {"diffusion": {"canvas": 250}}, "diffusion.canvas"),
        ("full", {"max_tokens": 250}, "max_tokens"),
        ("full", {"prompt": "x" * 300}, "prompt"),
        ("full", {"repetition_penalty": 1.1}, "repetition_penalty"),
        ("block", {"echo": True, "logprobs": 1}, "logprobs"),
        ("block", {"speculation": {"enabled": True}}, "speculation.enabled"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: ServerProcess, model: str, fields: Json, param: str) -> None:
    refused = error_of(post(server.url, "/v1/completions", {"model": model, "prompt": PROMPT, **fields}))
    assert refused["param"] == param and refused["message"]


def test_requests_of_one_batch_answer_as_if_they_were_alone(client: OpenAI) -> None:
    """Two models; several rules, caches, block lengths and seeds at once."""

    def choice(case: tuple[int, tuple[str, Json]]) -> Any:
        seed, (model, wish) = case
        return ask(client, model, wish, seed=seed, temperature=0.7, extra={"ignore_eos": True})["choices"][0]

    cases = list(enumerate(CASES))
    alone = [choice(case) for case in cases]
    with ThreadPoolExecutor(2 * len(cases)) as pool:
        assert list(pool.map(choice, cases * 2)) == alone * 2


def test_metrics_grow_by_what_reports_tell(server: ServerProcess, client: OpenAI) -> None:
    names = {name for name, _ in DIFFUSION_COUNTERS.values()}
    before = metrics(server.url)
    assert names <= before.keys()
    told = [ask(client, model, wish, extra={"ignore_eos": True})["diffusion"] for model, wish in CASES]
    assert_idle(server.url)
    grown = {name: metrics(server.url)[name] - before[name] for name in names}
    assert grown["slipstream:diffusion_forwards_total"] == sum(one["forwards"] for one in told)
    committed = grown["vllm:diffusion_num_committed_tokens_total"]
    assert committed >= 40 * len(CASES)  # what stands behind the end of an answer is committed too
    assert grown["vllm:diffusion_num_denoising_steps_total"] <= grown["slipstream:diffusion_forwards_total"]
    assert grown["vllm:diffusion_num_canvas_positions_total"] > committed
    assert grown["slipstream:diffusion_verifies_total"] == 0


def test_a_client_that_leaves_takes_its_canvas_with_it(server: ServerProcess, client: OpenAI) -> None:
    for model in MODELS:
        stream = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=200, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "diffusion": {"threshold": 2}},
        )  # fmt: skip
        next(iter(stream))
        assert metrics(server.url)["vllm:num_requests_running"] > 0
        stream.close()
        assert_idle(server.url)


def test_a_block_of_the_prompt_is_computed_once(client: OpenAI) -> None:
    """For block-causal models alone; a full-attention canvas is nobody else's."""
    prompt = "A prompt that is longer than a few blocks of the KV cache, which have 16 tokens each. "
    for model, shared in (("full", False), ("block", True)):
        first, again = (ask(client, model, prompt=prompt, extra={"ignore_eos": True}) for _ in range(2))
        assert again["choices"] == first["choices"]
        assert (again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64) is shared


def test_models_say_what_they_are(server: ServerProcess) -> None:
    full, block = (entry["diffusion"] for entry in get(server.url, "/v1/models").json()["data"])
    assert (full["attention"], full["caches"], full["canvas"], full["max_canvas"]) == (
        *("full", ["none", "prefix", "dual"], 40, 256),
    )
    assert (block["attention"], block["caches"], block["block_length"]) == ("block_causal", ["block", "dual"], 4)
    fields = get(server.url, "/openapi.json").json()["components"]["schemas"]["Diffusion"]["properties"]
    for card in full["rules"]:
        for knob in card["knobs"]:
            kind, _ = fields[knob["name"]]["anyOf"]
            assert (kind["minimum"], kind["maximum"]) == (knob["low"], knob["high"])
            assert f"`{card['name']}`" in fields[knob["name"]]["description"]


def test_the_client_shows_the_passes(server: ServerProcess) -> None:
    flags = ("--url", server.url, "--model", "full", "--max-tokens", "8", "--temperature", "0", "--show-passes")
    done = run_command("complete", "x", *flags)
    assert done.returncode == 0, done.stderr
    assert "[rule threshold, threshold 0.9; cache none; blocks of 32; canvas 32: " in done.stdout
    assert json.dumps(TINY["a2d_llama_full"].mask_text) not in done.stdout


def test_a_stream_that_is_refused_is_an_http_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="full", prompt=PROMPT, stream=True, extra_body={"diffusion": {"steps": 4}})
    assert refused.value.param == "diffusion.steps"


@pytest.mark.parametrize("model", MODELS)
def test_several_questions_are_read_from_one_canvas(client: OpenAI, server: ServerProcess, model: str) -> None:
    questions: Any = [
        {"type": "predicate", "instructions": "Wet?"},
        {"type": "choice", "instructions": "Colour?", "choices": [{"value": "blue"}, {"value": "red"}]},
    ]
    before = metrics(server.url)
    joint = client.decisions.create(model=model, input="Sea.", questions=questions, extra_body={"joint": True})
    apart = client.decisions.create(model=model, input="Sea.", questions=questions)
    wet, colour = joint.answers
    assert wet.type == "predicate" and 0 <= wet.probability <= 1
    assert colour.type == "choice" and sum(row.probability for row in colour.probabilities) == pytest.approx(1)
    assert [answer.type for answer in apart.answers] == ["predicate", "choice"]
    assert joint.usage.input_tokens < apart.usage.input_tokens
    ended = [some["vllm:request_success_total"] for some in (before, metrics(server.url))]
    assert ended[1] == ended[0] + 3  # one canvas, then one for each question
    vectors = client.embeddings.create(model=model, input=["Sea.", "Sand."]).data
    assert len(vectors) == 2 and sum(x * x for x in vectors[0].embedding) == pytest.approx(1, abs=1e-4)
    assert_idle(server.url)
