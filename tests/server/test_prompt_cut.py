"""Prompts that are cut, chunks of several tokens, answers with their beginning, and other small parameters."""

from __future__ import annotations

import pytest

from tests.server.fake_engine import EOS, FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION_URL, Json, chat_text, error_of, serving, stream

pytestmark = pytest.mark.asyncio
LONG = list(range(64, 96))


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({}, LONG),
        ({"truncate_prompt_tokens": 5}, LONG[-5:]),
        ({"truncate_prompt_tokens": 5, "truncation_side": "left"}, LONG[-5:]),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, LONG[:5]),
        ({"truncate_prompt_tokens": 40}, LONG),
        ({"truncate_prompt_tokens": -1, "max_tokens": 7}, LONG[-13:]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 100}, LONG[-1:]),
    ],
)
async def test_prompts_are_cut(fields: Json, kept: list[int]) -> None:
    engine = FakeEngine(max_model_len=20 if fields.get("truncate_prompt_tokens") == -1 else 64)
    async with serving(engine) as client:
        answer = await client.post(COMPLETION_URL, json={"prompt": LONG, "echo": True, "max_tokens": 1, **fields})
        assert answer.status_code == 200, answer.text
        text = engine.tokenizer.decode(kept)
        assert answer.json()["choices"][0]["text"].startswith(text)
        assert answer.json()["usage"]["prompt_tokens"] == len(kept)
        assert list(engine.submitted[0].prompt_ids) == kept
        several = {"prompt": [LONG, LONG[:3]], "max_tokens": 1, **fields}
        await client.post(COMPLETION_URL, json=several)
        assert [list(one.prompt_ids) for one in engine.submitted[1:]] == [kept, LONG[:3][-len(kept) :]]


async def test_a_chat_is_cut_after_its_template() -> None:
    engine = FakeEngine()
    body = {**CHAT, "truncate_prompt_tokens": 12}
    async with serving(engine) as client:
        answer = (await client.post(CHAT_URL, json=body)).json()
        assert answer["usage"]["prompt_tokens"] == 12
        assert engine.tokenizer.decode(engine.submitted[0].prompt_ids) == "i<assistant>"
        assert error_of(await client.post(CHAT_URL, json={**CHAT, "truncation_side": "left"}), 400)["param"] == (
            "truncation_side"
        )


@pytest.mark.parametrize("interval", [1, 2, 5, 1000])
async def test_chunks_of_several_tokens(interval: int) -> None:
    engine = FakeEngine(answer=[*b"ABCDEFGHIJKL", EOS], stands=(2, 0))
    asked: Json = {"stream_interval": interval, "n": 2, "return_token_ids": True, "logprobs": True, "top_logprobs": 1}
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    async with serving(engine) as client:
        whole = (await client.post(CHAT_URL, json={**CHAT, **asked})).json()
        chunks = await stream(client, CHAT_URL, {**CHAT, **asked, **options})
    for index, choice in enumerate(whole["choices"]):
        told = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index and "token_ids" in c]
        assert chat_text(chunks, index) == choice["message"]["content"]
        assert [token for c in told for token in c["token_ids"]] == choice["token_ids"]
        scores = [entry for c in told if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]
        assert all(len(c["token_ids"]) >= interval for c in told[:-1])
        assert [c["finish_reason"] for c in told] == [None] * (len(told) - 1) + ["stop"]
        assert interval < 1000 or len(told) == 1
    assert chunks[-1]["usage"] == whole["usage"]


async def test_no_stop_trim_is_include_stop_str_in_output() -> None:
    engine = FakeEngine(answer="one two three")
    async with serving(engine) as client:
        for fields, text in (({}, "one "), ({"no_stop_trim": True}, "one two"),
                             ({"include_stop_str_in_output": True}, "one two")):  # fmt: skip
            for stops in ({"stop": "two"}, {"stop_regex": "t[aw]."}):
                body = {"prompt": "x", **stops, **fields}
                choice = (await client.post(COMPLETION_URL, json=body)).json()["choices"][0]
                assert choice["text"] == text and choice["stop_reason"] == next(iter(stops.values()))
                assert choice["finish_reason"] == "stop"
                pieces = await stream(client, COMPLETION_URL, body)
                assert "".join(chunk["choices"][0]["text"] for chunk in pieces) == text


async def test_an_answer_that_repeats_itself_ends() -> None:
    engine = FakeEngine(answer="so so so so so so so so so so")
    detection = {"max_pattern_size": 4, "min_count": 3}
    async with serving(engine) as client:
        answer = (await client.post(CHAT_URL, json={**CHAT, "repetition_detection": detection})).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "so so so " and answer["usage"]["completion_tokens"] == 9
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "repetition_detected")
    assert engine.aborted == [engine.submitted[0].id]


async def test_the_whole_vocabulary_is_not_told() -> None:
    async with serving(FakeEngine()) as client:
        for url, body, name in (
            (COMPLETION_URL, {"prompt": "x"}, "logprobs"),
            (COMPLETION_URL, {"prompt": "x"}, "prompt_logprobs"),
            (CHAT_URL, {**CHAT, "logprobs": True}, "top_logprobs"),
        ):
            error = error_of(await client.post(url, json={**body, name: -1}), 400)
            assert error["param"] == name and "whole vocabulary" in error["message"]


async def test_choices_without_temperature_are_equal() -> None:
    """OpenAI takes n > 1 there, vLLM does not; a seed per choice has nothing to change."""
    async with serving(FakeEngine()) as client:
        answer = (await client.post(CHAT_URL, json={**CHAT, "n": 3, "temperature": 0})).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello, wörld!"] * 3
