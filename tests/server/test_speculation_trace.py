"""`speculation: {trace: true}`: where each token of an answer came from, and which text belongs to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from engine.types import SpeculationParams
from tests.server.fake_engine import EOS, HELLO, WORLD, FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, serving, stream

pytestmark = pytest.mark.asyncio

ENDPOINTS = pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
STANDS = (2, 0, 4)
TRACE: Json = {"speculation": {"trace": True}}
# "Hello, wörld!" and its end, in rounds: Hello | , _ w | half of ö | half of ö r l d ! | <eos>
ORIGINS = "p" "ddc" "c" "ddddb" "d"  # fmt: skip
PIECES = ["Hello", ",", " ", "w", "", "ö", "r", "l", "d", "!", ""]


def text_of(choice: Json) -> str:
    part = choice.get("message") or choice.get("delta") or choice
    text: str = part.get("content") or part.get("text") or ""
    return text


def joined(choices: list[Json], index: int = 0) -> tuple[str, str, list[int]]:
    """Text, origins and offsets of a choice, whole or in chunks."""
    own = [choice for choice in choices if choice["index"] == index]
    traces = [choice["speculation"] for choice in own if "speculation" in choice]
    assert all(set(trace) == {"origins", "offsets", "rounds"} for trace in traces)
    origins = "".join(trace["origins"] for trace in traces)
    return "".join(map(text_of, own)), origins, [offset for trace in traces for offset in trace["offsets"]]


def rounds_of(choices: list[Json], index: int = 0) -> list[list[int]]:
    """[drafted, stood] of every round of a choice; the last one is cut by its end."""
    own = [choice["speculation"] for choice in choices if choice["index"] == index and "speculation" in choice]
    return [pair for trace in own for pair in trace["rounds"]]


def pieces(text: str, offsets: list[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise([*offsets, len(text)])]


async def both(client: Any, url: str, body: Json) -> tuple[list[Json], list[Json]]:
    """The choices of the whole answer, and those of all chunks of the streamed one."""
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    chunks = await stream(client, url, body)
    return response.json()["choices"], [choice for chunk in chunks for choice in chunk["choices"]]


@ENDPOINTS
@pytest.mark.parametrize("n", [1, 2])
async def test_every_token_has_an_origin_and_its_text(url: str, base: Json, n: int) -> None:
    engine = FakeEngine(stands=STANDS)
    async with serving(engine) as client:
        for choices in await both(client, url, {**base, **TRACE, "n": n}):
            for index in range(n):
                text, origins, offsets = joined(choices, index)
                assert (text, origins) == ("Hello, wörld!", ORIGINS)
                assert pieces(text, offsets) == PIECES
                assert rounds_of(choices, index) == [[4, 2], [4, 0], [4, 4], [4, 1]]
    assert {request.speculation for request in engine.submitted} == {SpeculationParams(trace=True, verifier="strict")}


@ENDPOINTS
@pytest.mark.parametrize(
    "fields, text, origins",
    [
        ({"stop": "r"}, "Hello, wö", ORIGINS[:7]),
        ({"stop": "lo, "}, "Hel", ORIGINS[:3]),  # text held back over a round, then cut within the first token
        ({"stop": "wör", "include_stop_str_in_output": True}, "Hello, wör", ORIGINS[:7]),
        ({"max_tokens": 2}, "Hello,", ORIGINS[:2]),
        ({"max_tokens": 5}, "Hello, w\ufffd", ORIGINS[:5]),
    ],
)
async def test_origins_end_where_the_answer_ends(url: str, base: Json, fields: Json, text: str, origins: str) -> None:
    async with serving(FakeEngine(stands=STANDS)) as client:
        for choices in await both(client, url, {**base, **TRACE, **fields}):
            got, letters, offsets = joined(choices)
            assert (got, letters) == (text, origins)
            assert offsets == [0, 5, 6, 7, 8, 8, 9][: len(origins)]


@ENDPOINTS
async def test_chunks_tell_of_tokens_without_text(url: str, base: Json) -> None:
    """As with log-probabilities: what a chunk says of tokens may run ahead of its text, never behind."""
    async with serving(FakeEngine(stands=(0,), answer="aö")) as client:
        _, choices = await both(client, url, {**base, **TRACE})
    told = [(text_of(choice), choice["speculation"]) for choice in choices if "speculation" in choice]
    assert told == [
        ("a", {"origins": "p", "offsets": [0], "rounds": []}),
        ("", {"origins": "c", "offsets": [1], "rounds": [[4, 0]]}),
        ("ö", {"origins": "c", "offsets": [1], "rounds": [[4, 0]]}),
        ("", {"origins": "c", "offsets": [2], "rounds": [[4, 0]]}),
    ]


async def test_offsets_count_an_echoed_prompt() -> None:
    async with serving(FakeEngine(stands=STANDS, answer=[HELLO, WORLD, EOS])) as client:
        body = {**COMPLETION, **TRACE, "prompt": "ab ", "echo": True, "logprobs": 0}
        for choices in await both(client, COMPLETION_URL, body):
            text, origins, offsets = joined(choices)
            assert (text, origins, offsets) == ("ab Hello world", "pdd", [3, 8, 14])
            scored = [at for choice in choices for at in choice["logprobs"]["text_offset"]]
            assert scored[3:] == offsets


async def test_scoring_a_prompt_has_nothing_to_trace() -> None:
    async with serving(FakeEngine(stands=STANDS)) as client:
        body = {**COMPLETION, **TRACE, "echo": True, "max_tokens": 0}
        for choices in await both(client, COMPLETION_URL, body):
            assert not any("speculation" in choice for choice in choices)


@ENDPOINTS
async def test_report_and_trace_are_asked_for_apart(url: str, base: Json) -> None:
    async with serving(FakeEngine(stands=STANDS)) as client:
        for report in (False, True):
            for trace in (False, True, None):
                body = {**base, "speculation": {"report": report, "trace": trace}}
                answer = (await client.post(url, json=body)).json()
                assert ("speculation" in answer, "speculation" in answer["choices"][0]) == (report, bool(trace))
        answer = (await client.post(url, json={**base, "speculation": {"report": True, "trace": True}})).json()
    assert answer["speculation"]["accepted"] == answer["choices"][0]["speculation"]["origins"].count("d")


@ENDPOINTS
@pytest.mark.parametrize("engine", [FakeEngine, lambda: FakeEngine(stands=STANDS)])
async def test_without_drafts_every_token_is_plain(url: str, base: Json, engine: Any) -> None:
    async with serving(engine()) as client:
        for choices in await both(client, url, {**base, "speculation": {"enabled": False, "trace": True}}):
            assert joined(choices)[1] == "p" * len(ORIGINS)
