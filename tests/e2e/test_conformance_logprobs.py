"""Points 22 to 30 of the wire's conformance list: log-probabilities, over real sockets and with a real model."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.streams import CHAT, COMPLETIONS, MESSAGES, chunks, client_of, of_choice, whole, wire_text
from tests.e2e.wire import Json, error_of, post
from tests.server.fake_engine import EOS

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
LM_EVAL: dict[str, Any] = {"max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234, "echo": True}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_point_22_four_arrays_beside_each_other(tiny: ServerProcess, count: int) -> None:
    asked = {**GREEDY, "return_tokens_as_token_ids": True}  # some tokens of bytes have one text
    choice = whole(tiny, COMPLETIONS, max_tokens=7, logprobs=count, **asked)["choices"][0]
    scores = choice["logprobs"]
    assert set(scores) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(column) for column in scores.values()} == {7}
    for token, logprob, top in zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert top[token] == logprob <= 0 and max(count, 1) <= len(top) <= count + 1
        assert max(top.values()) == logprob, "the likeliest was taken"


def test_point_23_a_prompt_is_scored_as_lm_eval_asks(tiny: ServerProcess) -> None:
    texts = ["The sea is", "So"]
    ids = [post(tiny.url, "/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    choices = post(tiny.url, COMPLETIONS, {"prompt": ids, **LM_EVAL}).json()["choices"]
    for prompt, text, choice in zip(ids, texts, choices, strict=True):
        scores = choice["logprobs"]
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        assert all(value <= 0 for value in scores["token_logprobs"][1:])
        assert len(scores["tokens"]) == len(prompt) + 1
        assert choice["text"].startswith(text)
    alone = post(tiny.url, COMPLETIONS, {"prompt": ids, **LM_EVAL, "max_tokens": 0}).json()["choices"]
    for choice, scored in zip(choices, alone, strict=True):
        assert scored["text"] == choice["text"][: len(scored["text"])]
        assert scored["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"][:-1]


def test_point_24_offsets_are_of_the_text_that_is_told(scripted: ScriptedServer) -> None:
    scripted.engine.answer = "Hello, wörld! Hello"
    asked: dict[str, Any] = {"logprobs": 0, "stop": ["ld!?"], "return_token_ids": True}  # some text is held back
    choice = whole(scripted, COMPLETIONS, **asked)["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    starts = {"Hello": 0, ",": 5, " ": 6, "w": 7, "r": 9, "l": 10, "d": 11, "!": 12}
    named = dict(zip(choice["logprobs"]["tokens"][:9], offsets[:9], strict=True))
    assert all(named[token] == starts[token] for token in named.keys() & starts.keys()) and len(offsets) > 8
    streamed = [
        c["logprobs"]["text_offset"] for c in of_choice(chunks(scripted, COMPLETIONS, **asked)) if c["logprobs"]
    ]
    assert [offset for part in streamed for offset in part] == offsets == sorted(offsets)


@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e30])
def test_point_25_json_has_no_infinity(scripted: ScriptedServer, value: float) -> None:
    scripted.engine.token_logprob = lambda _: value
    try:
        for path, fields in (
            (COMPLETIONS, {"logprobs": 2, "echo": True}),
            (CHAT, {"logprobs": True, "top_logprobs": 2}),
            (CHAT, {"prompt_logprobs": 1}),
        ):
            text = json.dumps(whole(scripted, path, **fields))
            streamed = "" if "prompt_logprobs" in fields else wire_text(scripted, path, **fields)
            for answer in (text, streamed):
                assert "NaN" not in answer and "Infinity" not in answer
            assert "-9999.0" in text
    finally:
        scripted.engine.token_logprob = lambda _: -0.5


def test_point_26_tokens_of_one_text_are_told_apart_by_their_ids(scripted: ScriptedServer) -> None:
    scripted.engine.answer = [0xC3, 0xB6, 72, EOS]
    asked: dict[str, Any] = {"logprobs": 3, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = whole(scripted, COMPLETIONS, **asked)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(len(top) == 3 for top in choice["logprobs"]["top_logprobs"])
    chat = whole(scripted, CHAT, logprobs=True, return_tokens_as_token_ids=True)["choices"][0]
    assert [entry["token"] for entry in chat["logprobs"]["content"]] == choice["logprobs"]["tokens"]


@pytest.mark.parametrize("count", [0, 3, 20])
def test_point_27_entries_of_a_chat(demo: ServerProcess, count: int) -> None:
    with client_of(demo, _strict_response_validation=True) as client:
        answer = client.chat.completions.create(
            model="demo", messages=MESSAGES, logprobs=True, top_logprobs=count, max_tokens=6, temperature=0
        )
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.content is not None and scores.refusal is None
    for entry in scores.content:
        assert entry.bytes is not None and len(entry.top_logprobs) == count
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert all(entry.logprob >= other.logprob for other in entry.top_logprobs)
    whole_text = b"".join(bytes(entry.bytes or ()) for entry in scores.content).decode()
    assert whole_text.startswith(answer.choices[0].message.content or "?")


def test_point_27_bytes_of_parts_of_a_character_join(scripted: ScriptedServer) -> None:
    scripted.engine.answer = "wörld"
    content = whole(scripted, CHAT, logprobs=True)["choices"][0]["logprobs"]["content"][:-1]  # the end has no text
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "wörld"
    assert len(content) == len("wörld".encode())


def test_point_28_top_logprobs_need_logprobs(tiny: ServerProcess) -> None:
    for fields in ({}, {"logprobs": False}, {"logprobs": None}):
        error = error_of(post(tiny.url, CHAT, {"messages": MESSAGES, "top_logprobs": 2, **fields}))
        assert error["param"] == "top_logprobs"
    for value in (21, -1):
        body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": value}
        assert error_of(post(tiny.url, CHAT, body))["param"] == "top_logprobs"
    scores = whole(tiny, CHAT, logprobs=True, top_logprobs=None, max_tokens=2)["choices"][0]["logprobs"]
    assert all(entry["top_logprobs"] == [] for entry in scores["content"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_point_29_each_chunk_has_the_scores_of_its_tokens(scripted: ScriptedServer, path: str) -> None:
    scripted.engine.answer = "Hello, wörld! Hello"
    asked: Json = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    asked |= {"stop": ["ld!?"], "return_token_ids": True}

    def scores(choice: Json) -> list[Any]:
        found = choice["logprobs"] or {"content": [], "tokens": []}
        entries: list[Any] = found["content"] if path == CHAT else found["tokens"]
        return entries

    told = [choice for choice in of_choice(chunks(scripted, path, **asked)) if "token_ids" in choice]
    assert any(choice["token_ids"] and not _text(choice) for choice in told), "text was held back"
    for choice in told:
        assert len(scores(choice)) == len(choice["token_ids"])
    assert [entry for c in told for entry in scores(c)] == scores(whole(scripted, path, **asked)["choices"][0])


def _text(choice: Json) -> str:
    text: str = choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return text


def test_point_30_scores_are_those_of_the_raw_logits(tiny: ServerProcess) -> None:
    asked: Json = {"prompt": "The sea", "max_tokens": 1, "logprobs": 20, "return_tokens_as_token_ids": True}
    plain = post(tiny.url, COMPLETIONS, {**asked, "temperature": 0}).json()["choices"][0]["logprobs"]
    changed = {"temperature": 2, "top_k": 3, "presence_penalty": 2, "logit_bias": {"101": 50}, "seed": 3}
    other = post(tiny.url, COMPLETIONS, {**asked, **changed}).json()["choices"][0]["logprobs"]
    first, second = plain["top_logprobs"][0], other["top_logprobs"][0]
    shared = first.keys() & second.keys()
    assert len(shared) >= 19 and all(math.isclose(first[t], second[t], abs_tol=1e-4) for t in shared)
