"""Log-probabilities and echo: points 22 to 30 of the wire format."""

from __future__ import annotations

import json
import math

import httpx
import pytest

from engine.types import TokenLogprob
from tests.server.fake_engine import BOS, EOS, HELLO, VOCAB, WORLD, FakeEngine, make_tokenizer
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving, stream

pytestmark = pytest.mark.asyncio


async def choice_of(client: httpx.AsyncClient, **body: object) -> Json:
    response = await client.post(COMPLETION_URL, json={**COMPLETION, **body})
    assert response.status_code == 200, response.text
    choice: Json = response.json()["choices"][0]
    return choice


async def test_point_22_four_parallel_arrays() -> None:
    async with serving(FakeEngine(answer="Hello world")) as client:
        scores = (await choice_of(client, logprobs=2))["logprobs"]
    assert list(scores) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert scores["tokens"] == ["Hello", " world", "<eos>"]
    assert scores["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert scores["top_logprobs"][0] == {"Hello": -0.5, " world": -1.5}
    assert scores["text_offset"] == [0, 5, 11]


async def test_point_22_zero_is_not_off_and_null_is() -> None:
    async with serving(FakeEngine(answer="Hello")) as client:
        zero = (await choice_of(client, logprobs=0))["logprobs"]
        null = (await choice_of(client, logprobs=None))["logprobs"]
    assert zero["top_logprobs"] == [{"Hello": -0.5}, {"<eos>": -0.5}] and null is None


async def test_point_22_the_chosen_token_is_always_there() -> None:
    engine = FakeEngine(answer=[HELLO, EOS])
    scores = engine._scores

    def without_chosen(tokens: tuple[int, ...], count: int | None) -> object:
        found = scores(tokens, count)
        return found and tuple(type(s)(s.token_id, -3.0, 4, ((WORLD, -0.1),)) for s in found)

    engine._scores = without_chosen  # type: ignore[method-assign, assignment]
    async with serving(engine) as client:
        top = (await choice_of(client, logprobs=1))["logprobs"]["top_logprobs"]
    assert top[0] == {"Hello": -3.0, " world": -0.1}


async def test_point_23_what_lm_eval_sends() -> None:
    ids = [[5, HELLO, WORLD], [HELLO, 7]]
    body = {"prompt": ids, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234, "echo": True}
    async with serving(FakeEngine(answer=[WORLD])) as client:
        response = await client.post(COMPLETION_URL, json={"model": "tiny", **body})
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    first = answer["choices"][0]
    assert first["text"] == "&Hello world world"
    assert first["logprobs"]["tokens"] == ["&", "Hello", " world", " world"]
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert first["logprobs"]["top_logprobs"] == [None, {"Hello": -0.5}, {" world": -0.5}, {" world": -0.5}]
    assert first["logprobs"]["text_offset"] == [0, 1, 6, 12]
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_point_23_max_tokens_0_only_scores(streamed: bool) -> None:
    body = {"prompt": "Hello world", "echo": True, "max_tokens": 0, "logprobs": 1, "return_token_ids": True}
    async with serving(FakeEngine(answer=[EOS])) as client:
        if streamed:
            options = {"stream_options": {"include_usage": True}}
            *chunks, last = await stream(client, COMPLETION_URL, {**COMPLETION, **body, **options})
            choices, usage = [chunk["choices"][0] for chunk in chunks], last["usage"]
        else:
            answer = (await client.post(COMPLETION_URL, json={**COMPLETION, **body})).json()
            choices, usage = answer["choices"], answer["usage"]
    assert len(choices) == 1
    assert choices[0]["text"] == "Hello world" and choices[0]["finish_reason"] == "length"
    assert choices[0]["logprobs"]["tokens"] == ["Hello", " world"]
    assert choices[0]["token_ids"] == [] and choices[0]["prompt_token_ids"] == [HELLO, WORLD]
    assert usage["completion_tokens"] == 0 and usage["total_tokens"] == 2


async def test_point_23_max_tokens_0_needs_echo() -> None:
    async with serving() as client:
        response = await client.post(COMPLETION_URL, json={**COMPLETION, "max_tokens": 0})
    assert error_of(response, 400)["param"] == "max_tokens"


async def test_echo_hides_an_added_bos_but_scores_after_it() -> None:
    engine = FakeEngine(answer=[WORLD], tokenizer=make_tokenizer(bos=True))
    async with serving(engine) as client:
        choice = await choice_of(client, prompt="Hello", echo=True, logprobs=1, max_tokens=1)
    assert choice["text"] == "Hello world"
    assert choice["logprobs"]["tokens"] == ["<bos>", "Hello", " world"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 0, 5]
    assert engine.submitted[0].prompt_ids == (BOS, HELLO)


@pytest.mark.parametrize("prompt", ["wörld €!", "Hello"])
async def test_point_24_offsets_index_the_text_across_chunks(prompt: str) -> None:
    engine = FakeEngine(answer="ä€ Hello")
    body = {**COMPLETION, "prompt": prompt, "echo": True, "logprobs": 0, "stop": ["Hellx"]}
    async with serving(engine) as client:
        whole = await choice_of(client, **body)
        chunks = [chunk["choices"][0] for chunk in await stream(client, COMPLETION_URL, body)]
    assert whole["text"] == "".join(chunk["text"] for chunk in chunks) == f"{prompt}ä€ Hello"
    offsets = [offset for chunk in chunks for offset in chunk["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"] and offsets == sorted(offsets)
    for token, offset in zip(whole["logprobs"]["tokens"], offsets, strict=True):
        if "\ufffd" not in token and token != "<eos>":
            assert whole["text"][offset:].startswith(token)


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30])
async def test_point_25_no_infinity_in_json(value: float) -> None:
    engine = FakeEngine(answer="Hello")
    engine.token_logprob = lambda _: value
    async with serving(engine) as client:
        completion = await client.post(COMPLETION_URL, json={**COMPLETION, "logprobs": 2})
        chat = await client.post(CHAT_URL, json={**CHAT, "logprobs": True, "top_logprobs": 2})
    assert (
        json.loads(completion.text, parse_constant=pytest.fail)["choices"][0]["logprobs"]["token_logprobs"][0] == -9999
    )
    assert json.loads(chat.text, parse_constant=pytest.fail)["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999


async def test_point_26_tokens_as_ids() -> None:
    async with serving(FakeEngine(answer=[HELLO, 200, 201])) as client:
        scores = (await choice_of(client, logprobs=2, return_tokens_as_token_ids=True))["logprobs"]
        chat = await client.post(CHAT_URL, json={**CHAT, "logprobs": True, "return_tokens_as_token_ids": True})
    assert scores["tokens"] == ["token_id:258", "token_id:200", "token_id:201"]
    assert all(len(top) == 2 for top in scores["top_logprobs"])
    assert chat.json()["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:258"


async def test_point_26_where_two_tokens_have_one_text_the_chosen_one_counts() -> None:
    half, other = make_tokenizer().encode("ö")
    engine = FakeEngine(answer=[half])
    engine._scores = lambda tokens, count: (  # type: ignore[method-assign]
        (TokenLogprob(half, -2.0, 2, ((other, -0.1), (HELLO, -3.0))),) if count is not None else None
    )
    async with serving(engine) as client:
        scores = (await choice_of(client, logprobs=2, max_tokens=1))["logprobs"]
    assert scores["top_logprobs"] == [{"\ufffd": -2.0, "Hello": -3.0}] and scores["token_logprobs"] == [-2.0]


async def test_point_27_chat_logprobs() -> None:
    async with serving(FakeEngine(answer="Hello ö")) as client:
        body = {**CHAT, "logprobs": True, "top_logprobs": 2}
        scores = (await client.post(CHAT_URL, json=body)).json()["choices"][0]["logprobs"]
    assert scores["refusal"] is None
    first = scores["content"][0]
    assert first["token"] == "Hello" and first["logprob"] == -0.5 and first["bytes"] == list(b"Hello")
    assert [entry["token"] for entry in first["top_logprobs"]] == ["Hello", " world"]
    spelled = b"".join(bytes(entry["bytes"]) for entry in scores["content"])
    assert spelled.decode() == "Hello ö<eos>"


async def test_point_27_logprobs_without_alternatives() -> None:
    async with serving(FakeEngine(answer="Hello")) as client:
        answer = (await client.post(CHAT_URL, json={**CHAT, "logprobs": True})).json()
        off = (await client.post(CHAT_URL, json={**CHAT, "logprobs": False})).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert off["choices"][0]["logprobs"] is None


async def test_point_28_top_logprobs_need_logprobs() -> None:
    async with serving() as client:
        bad = await client.post(CHAT_URL, json={**CHAT, "top_logprobs": 2})
        null = await client.post(CHAT_URL, json={**CHAT, "top_logprobs": None, "logprobs": None})
    assert error_of(bad, 400)["param"] == "top_logprobs" and null.status_code == 200


async def test_point_29_each_chunk_has_the_logprobs_of_its_tokens() -> None:
    """Also while text is held back: here for the rest of a character, and for a possible stop."""
    body = {**CHAT, "logprobs": True, "stop": ["öx"], "return_token_ids": True}
    async with serving(FakeEngine(answer="aöb")) as client:
        chunks = [chunk["choices"][0] for chunk in await stream(client, CHAT_URL, body)]
    assert [len(c["logprobs"]["content"]) for c in chunks[1:]] == [len(c["token_ids"]) for c in chunks[1:]]
    assert sum(len(c["token_ids"]) for c in chunks[1:]) == 5
    assert any(c["token_ids"] and not c["delta"].get("content") for c in chunks[1:-1])


async def test_point_30_prompt_logprobs_have_vllms_shape() -> None:
    async with serving(FakeEngine(answer="Hello")) as client:
        completion = await choice_of(client, prompt=[HELLO, WORLD], prompt_logprobs=1)
        chat = (await client.post(CHAT_URL, json={**CHAT, "prompt_logprobs": 0})).json()
        streamed = await client.post(COMPLETION_URL, json={**COMPLETION, "prompt_logprobs": 1, "stream": True})
    assert completion["prompt_logprobs"] == [
        None,
        {str(WORLD): {"logprob": -0.5, "rank": 1, "decoded_token": " world"}},
    ]
    assert chat["prompt_logprobs"][0] is None and all(len(entry) == 1 for entry in chat["prompt_logprobs"][1:])
    assert error_of(streamed, 400)["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    "url, body, param",
    [
        (COMPLETION_URL, {**COMPLETION, "logprobs": 21}, "logprobs"),
        (COMPLETION_URL, {**COMPLETION, "logprobs": -1}, "logprobs"),
        (COMPLETION_URL, {**COMPLETION, "logprobs": True}, "logprobs"),
        (COMPLETION_URL, {**COMPLETION, "prompt_logprobs": VOCAB}, "prompt_logprobs"),
        (CHAT_URL, {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT_URL, {**CHAT, "logprobs": 1}, "logprobs"),
    ],
)
async def test_logprobs_out_of_bounds(url: str, body: Json, param: str) -> None:
    async with serving() as client:
        assert error_of(await client.post(url, json=body), 400)["param"] == param


async def test_named_tokens_stand_beside_each_token_in_place_of_the_likeliest() -> None:
    engine = FakeEngine(answer=[HELLO, EOS])
    named = {"logprob_token_ids": [WORLD, 7, WORLD], "return_tokens_as_token_ids": True}
    async with serving(engine) as client:
        scores = (await choice_of(client, logprobs=1, **named))["logprobs"]
        chat = (await client.post(CHAT_URL, json={**CHAT, "logprobs": True, "top_logprobs": 5, **named})).json()
        chunks = await stream(client, CHAT_URL, {**CHAT, "logprobs": True, **named})
    assert engine.submitted[0].sampling.logprob_token_ids == (WORLD, 7)
    assert scores["top_logprobs"][0] == {f"token_id:{HELLO}": -0.5, f"token_id:{WORLD}": -0.5, "token_id:7": -1.5}
    first = chat["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == f"token_id:{HELLO}"
    assert [top["token"] for top in first["top_logprobs"]] == [f"token_id:{WORLD}", "token_id:7"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    assert next(entry for scores in streamed if scores for entry in scores["content"]) == first


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (COMPLETION_URL, {**COMPLETION, "logprob_token_ids": [1]}),
        (COMPLETION_URL, {**COMPLETION, "logprob_token_ids": [1], "logprobs": 0, "echo": True}),
        (COMPLETION_URL, {**COMPLETION, "logprob_token_ids": [VOCAB], "logprobs": 0}),
        (CHAT_URL, {**CHAT, "logprob_token_ids": [1]}),
        (CHAT_URL, {**CHAT, "logprob_token_ids": [*range(129)], "logprobs": True}),
    ],
)
async def test_wrong_named_tokens_are_refused(url: str, body: Json) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        assert error_of(await client.post(url, json=body), 400)["param"] == "logprob_token_ids"
    assert not engine.submitted
