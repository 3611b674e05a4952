"""Fields of requests and answers: points 50 to 70 of the wire format."""

from __future__ import annotations

import logging
import re

import pytest

from tests.server.fake_engine import HELLO, WORLD, FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving, stream

pytestmark = pytest.mark.asyncio

NULLS = (
    "model n max_tokens max_completion_tokens temperature top_p top_k min_p presence_penalty "
    "frequency_penalty repetition_penalty seed stop stop_token_ids min_tokens ignore_eos logit_bias "
    "allowed_token_ids bad_words logprobs top_logprobs stream stream_options tools tool_choice "
    "response_format priority cache_salt user suffix best_of chat_template_kwargs functions audio "
    "guided_json speculation diffusion"
)


async def test_points_50_to_52_and_57_a_whole_chat_answer() -> None:
    async with serving() as client:
        answer = (await client.post(CHAT_URL, json=CHAT)).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    assert re.fullmatch(r"fp_[0-9a-f]{12}", answer.pop("system_fingerprint"))
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, wörld!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 19,
            "completion_tokens": 11,
            "total_tokens": 30,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_points_50_to_52_a_whole_completion() -> None:
    async with serving() as client:
        answer = (await client.post(COMPLETION_URL, json=COMPLETION)).json()
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["choices"] == [
        {"index": 0, "text": "Hello, wörld!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]


@pytest.mark.parametrize(
    "url, body, expected",
    [
        (COMPLETION_URL, {}, 16),
        (COMPLETION_URL, {"max_tokens": 5}, 5),
        (COMPLETION_URL, {"max_tokens": 5000}, 510),
        (CHAT_URL, {}, 512 - 19),
        (CHAT_URL, {"max_tokens": 5}, 5),
        (CHAT_URL, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT_URL, {"max_tokens": 7, "max_completion_tokens": None}, 7),
    ],
)
async def test_point_53_max_tokens(url: str, body: Json, expected: int) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        await client.post(url, json={**(CHAT if url == CHAT_URL else COMPLETION), **body})
    assert engine.submitted[0].sampling.max_tokens == expected


async def test_point_54_unknown_fields_are_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as client:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert (await client.post(CHAT_URL, json={**CHAT, "flux\n": 1, "x" * 999: 2})).status_code == 200
            many = {f"field{i}": 1 for i in range(2000)}
            assert (await client.post(CHAT_URL, json={**CHAT, **many})).status_code == 200
    lines = [record.getMessage() for record in caplog.records if "unknown request field" in record.getMessage()]
    assert lines[0] == "ignored the unknown request field 'flux\\n'" and len(lines[1]) < 120
    assert len(lines) == 256


@pytest.mark.parametrize("url, body", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
async def test_point_55_null_is_the_default(url: str, body: Json) -> None:
    async with serving() as client:
        response = await client.post(
            url, json={**dict.fromkeys(NULLS.split()), **{k: v for k, v in body.items() if k != "model"}}
        )
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
async def test_point_56_content_parts_for_all_roles(role: str) -> None:
    engine = FakeEngine()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    async with serving(engine) as client:
        response = await client.post(CHAT_URL, json={"messages": [{"role": role, "content": parts}]})
    assert response.status_code == 200
    told = "system" if role == "developer" else role
    assert engine.tokenizer.decode(engine.submitted[0].prompt_ids) == f"<{told}>one\ntwo<assistant>"


async def test_point_39_tool_history() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages: list[Json] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
    ]
    async with serving() as client:
        assert (await client.post(CHAT_URL, json={"messages": messages})).status_code == 200
        messages[2]["tool_call_id"] = "call_2"
        error = error_of(await client.post(CHAT_URL, json={"messages": messages}), 400)
    assert error["param"] == "messages[2].tool_call_id"


async def test_point_58_n_with_temperature_0() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        answer = (await client.post(CHAT_URL, json={**CHAT, "n": 3, "temperature": 0})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.choice for request in engine.submitted] == [0, 1, 2]
    assert len({request.group for request in engine.submitted}) == 1 and engine.submitted[0].group
    assert len({request.sampling.seed for request in engine.submitted}) == 1


@pytest.mark.parametrize("seed", [0, 1234, -1, 2**63 - 1, -(2**63)])
async def test_point_59_seeds(seed: int) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        await client.post(CHAT_URL, json={**CHAT, "seed": seed})
        await client.post(CHAT_URL, json=CHAT)
        await client.post(CHAT_URL, json=CHAT)
    seeds = [request.sampling.seed for request in engine.submitted]
    assert seeds[0] == seed and len(set(seeds)) == 3


async def test_point_60_logit_bias() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        await client.post(CHAT_URL, json={**CHAT, "logit_bias": {"5": -100, "7": 0.5}})
        for bad in ({"260": 1}, {"-1": 1}, {"x": 1}, {"5": 101}, {"5": True}, {"5.0": 1}, {"٣": 1}, [1]):
            error = error_of(await client.post(CHAT_URL, json={**CHAT, "logit_bias": bad}), 400)
            assert error["param"].startswith("logit_bias")
    assert engine.submitted[0].sampling.logit_bias == ((5, -100.0), (7, 0.5))


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([HELLO, WORLD], ["Hello world"]),
        ([[HELLO], [WORLD, HELLO]], ["Hello", " worldHello"]),
    ],
)
async def test_point_62_prompts_of_all_kinds_are_prompt_major(prompt: object, texts: list[str]) -> None:
    async with serving() as client:
        body = {**COMPLETION, "prompt": prompt, "n": 2, "echo": True}
        whole = (await client.post(COMPLETION_URL, json=body)).json()["choices"]
        chunks = [chunk["choices"][0] for chunk in await stream(client, COMPLETION_URL, body)]
    expected = [f"{text}Hello, wörld!" for text in texts for _ in range(2)]
    assert [choice["index"] for choice in whole] == list(range(len(expected)))
    assert [choice["text"] for choice in whole] == expected
    assert ["".join(c["text"] for c in chunks if c["index"] == i) for i in range(len(expected))] == expected


async def test_point_67_trailing_slash_and_root_path() -> None:
    async with serving(root_path="/llm") as client:
        for url in ("/v1/models", "/v1/models/", "/llm/v1/models", "/llm/v1/models/tiny/", "/health/"):
            assert (await client.get(url)).status_code == 200, url
        assert (await client.post("/llm/v1/completions/", json=COMPLETION)).status_code == 200


async def test_point_64_model_ids_with_slashes() -> None:
    async with serving(FakeEngine("org/model:1.5"), FakeEngine("other")) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/org/model:1.5")).json()
        answer = (await client.post(CHAT_URL, json={**CHAT, "model": "other"})).json()
    assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["org/model:1.5", "other"]
    assert one == listed["data"][0] and one["object"] == "model" and one["max_model_len"] == 512
    assert "secret" not in str(listed) and answer["model"] == "other"


async def test_point_66_harmless_extras() -> None:
    extras = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k",
        "safety_identifier": "s", "prediction": {"type": "content", "content": "x"}, "modalities": ["text"],
        "verbosity": "low", "parallel_tool_calls": True, "response_format": {"type": "text"}, "tool_choice": "none",
        "suffix": "", "best_of": 1, "echo": False, "reasoning_effort": "low", "request_id": "r",
    }  # fmt: skip
    async with serving() as client:
        assert (await client.post(CHAT_URL, json={**CHAT, **extras})).status_code == 200


async def test_return_token_ids() -> None:
    body = {"return_token_ids": True}
    async with serving(FakeEngine(answer="Hello")) as client:
        chat = (await client.post(CHAT_URL, json={**CHAT, **body})).json()
        chunks = await stream(client, CHAT_URL, {**CHAT, **body})
        completion = (await client.post(COMPLETION_URL, json={**COMPLETION, "prompt": [HELLO], **body})).json()
    assert chat["choices"][0]["token_ids"] == [HELLO, 257] and len(chat["prompt_token_ids"]) == 19
    assert chunks[0]["prompt_token_ids"] == chat["prompt_token_ids"]
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == [HELLO, 257]
    assert completion["choices"][0]["prompt_token_ids"] == [HELLO]
    assert completion["choices"][0]["token_ids"] == [HELLO, 257]
