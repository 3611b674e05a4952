"""The `speculation` extension: its fields, good and bad, and what answers tell of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.types import ModelInfo, SpeculationParams
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving, stream

pytestmark = pytest.mark.asyncio

ENDPOINTS = pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
STANDS = (2, 0, 3)
# "Hello, wörld!" is 11 tokens with its end: Hello | , _ w | half of ö | half of ö r l d | ! <eos>
REPORT: Json = {
    "verifier": "strict",
    "knobs": {},
    "lossy": False,
    "decoder": "target",
    "rounds": 4,
    "drafted": 16,
    "accepted": 7,
    "histogram": [1, 0, 2, 1],
    "bias": 0.0,
    "bias_bound": 0.0,
}
NOTHING: Json = {**REPORT, "verifier": None, "rounds": 0, "drafted": 0, "accepted": 0, "histogram": []}
# 7 tokens that stood and 3 that did not (1/8 and 1/4 each), and the first, which nothing was drafted for; of 11. The
# last round is cut behind its second token: what ends the answer is one that stood.
LOSSY: Json = {
    "verifier": "ensemble",
    "knobs": {"target_weight": 0.7},
    "lossy": True,
    "decoder": "relaxed",
    "bias": round((7 / 8 + 3 / 4) / 11, 6),
    "bias_bound": 0.3,
}


def text_of(choice: Json) -> str:
    part = choice.get("message") or choice.get("delta") or choice
    text: str = part.get("content") or part.get("text") or ""
    return text


@ENDPOINTS
@pytest.mark.parametrize(
    "asked, expected",
    [
        (None, SpeculationParams()),
        ({}, SpeculationParams()),
        ({"enabled": None, "max_draft": None, "report": None, "trace": None, "unknown": None}, SpeculationParams()),
        ({"trace": True}, SpeculationParams(trace=True)),
        ({"enabled": True}, SpeculationParams()),
        ({"enabled": False}, SpeculationParams(enabled=False)),
        ({"max_draft": 0}, SpeculationParams(max_draft=0)),
        ({"max_draft": 2, "report": False}, SpeculationParams(max_draft=2)),
        ({"max_draft": 1024, "report": True}, SpeculationParams(max_draft=1024, report=True)),
        ({"enabled": False, "max_draft": 2}, SpeculationParams(enabled=False, max_draft=2)),
    ],
)
async def test_what_is_asked_reaches_every_choice(
    url: str, base: Json, asked: Json | None, expected: SpeculationParams
) -> None:
    engine = FakeEngine(stands=STANDS)
    async with serving(engine) as client:
        assert (await client.post(url, json={**base, "n": 2, "speculation": asked})).status_code == 200
    assert [request.speculation for request in engine.submitted] == [replace(expected, verifier="strict")] * 2


@ENDPOINTS
@pytest.mark.parametrize("stands", [(), STANDS])
@pytest.mark.parametrize(
    "asked, param, code",
    [
        (True, "", "invalid_type"),
        ("on", "", "invalid_type"),
        ([], "", "invalid_type"),
        (3, "", "invalid_type"),
        ({"enabled": 1}, ".enabled", "invalid_type"),
        ({"enabled": "true"}, ".enabled", "invalid_type"),
        ({"report": 0}, ".report", "invalid_type"),
        ({"trace": 1}, ".trace", "invalid_type"),
        ({"trace": "all"}, ".trace", "invalid_type"),
        ({"max_draft": "3"}, ".max_draft", "invalid_type"),
        ({"max_draft": 3.0}, ".max_draft", "invalid_type"),
        ({"max_draft": True}, ".max_draft", "invalid_type"),
        ({"max_draft": [3]}, ".max_draft", "invalid_type"),
        ({"max_draft": -1}, ".max_draft", "invalid_value"),
        ({"max_draft": 1025}, ".max_draft", "invalid_value"),
        ({"max_draft": 2**63}, ".max_draft", "invalid_value"),
        ({"Enabled": True}, ".Enabled", "unsupported_parameter"),
        ({"x" * 500: False}, "." + "x" * 63 + "…", "unsupported_parameter"),
        ({"": False}, ".", "unsupported_parameter"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_bad_fields_are_refused_by_name(
    url: str, base: Json, stands: tuple[int, ...], asked: Any, param: str, code: str
) -> None:
    engine = FakeEngine(stands=stands)
    async with serving(engine) as client:
        for more in ({}, {"stream": True}):
            error = error_of(await client.post(url, json={**base, **more, "speculation": asked}), 400)
            assert (error["param"], error["code"]) == (f"speculation{param}", code)
            assert f"'speculation{param}'" in error["message"]
    assert engine.submitted == []


@ENDPOINTS
@pytest.mark.parametrize(
    "asked, param",
    [
        ({"enabled": True}, "speculation.enabled"),
        ({"enabled": True, "max_draft": 0, "report": True}, "speculation.enabled"),
        ({"max_draft": 1}, "speculation.max_draft"),
        ({"max_draft": 4, "enabled": None}, "speculation.max_draft"),
    ],
)
async def test_drafts_cannot_be_had_without_a_drafter(url: str, base: Json, asked: Json, param: str) -> None:
    engine = FakeEngine()
    async with serving(engine, FakeEngine("drafted", stands=STANDS)) as client:
        error = error_of(await client.post(url, json={**base, "speculation": asked}), 400)
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
        assert "served without a drafter" in error["message"]
        response = await client.post(url, json={**base, "model": "drafted", "speculation": asked})
    assert response.status_code == 200 and engine.submitted == []


@ENDPOINTS
@pytest.mark.parametrize("asked", [{}, {"enabled": False}, {"max_draft": 0}, {"enabled": False, "max_draft": 4}])
async def test_without_a_drafter_everything_else_is_fine(url: str, base: Json, asked: Json) -> None:
    async with serving(FakeEngine()) as client:
        silent = (await client.post(url, json={**base, "speculation": asked})).json()
        told = (await client.post(url, json={**base, "speculation": {**asked, "report": True}})).json()
        chunks = await stream(client, url, {**base, "speculation": {**asked, "report": True}})
    assert "speculation" not in silent
    assert told["speculation"] == chunks[-1]["speculation"] == NOTHING


@ENDPOINTS
@pytest.mark.parametrize(
    "fields, knobs, text, tokens, expected",
    [
        ({}, {}, "Hello, wörld!", 11, {}),
        # Behind the r, an l that stood and the target's d are no part of the answer.
        ({"stop": "r"}, {}, "Hello, wö", 7, {"rounds": 3, "drafted": 12, "accepted": 4, "histogram": [1, 0, 2]}),
        ({"stop": "d"}, {}, "Hello, wörl", 9, {"rounds": 3, "drafted": 12, "accepted": 5, "histogram": [1, 0, 1, 1]}),
        ({"max_tokens": 2}, {}, "Hello,", 2, {"rounds": 1, "drafted": 4, "accepted": 1, "histogram": [0, 1]}),
        ({}, {"max_draft": 1}, "Hello, wörld!", 11, {"rounds": 6, "drafted": 6, "accepted": 4, "histogram": [2, 4]}),
        ({}, {"max_draft": 99}, "Hello, wörld!", 11, {}),
        ({}, {"max_draft": 0}, "Hello, wörld!", 11, {"rounds": 0, "drafted": 0, "accepted": 0, "histogram": []}),
        ({}, {"enabled": False}, "Hello, wörld!", 11, {"rounds": 0, "drafted": 0, "accepted": 0, "histogram": []}),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("n", [1, 2])
async def test_the_report_sums_over_choices(
    url: str, base: Json, n: int, fields: Json, knobs: Json, text: str, tokens: int, expected: Json
) -> None:
    one = {**REPORT, **expected}
    report = {
        **one,
        **{name: one[name] * n for name in ("rounds", "drafted", "accepted")},
        "histogram": [rounds * n for rounds in one["histogram"]],
    }
    body = {**base, **fields, "n": n, "speculation": {**knobs, "report": True}}
    async with serving(FakeEngine(stands=STANDS)) as client:
        answer = (await client.post(url, json=body)).json()
        chunks = await stream(client, url, body)
        counted = await stream(client, url, {**body, "stream_options": {"include_usage": True}})
    assert [text_of(choice) for choice in answer["choices"]] == [text] * n
    assert answer["usage"]["completion_tokens"] == tokens * n
    assert "accepted_prediction_tokens" not in answer["usage"]["completion_tokens_details"]
    assert answer["speculation"] == report
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    assert ["".join(text_of(piece) for piece in pieces if piece["index"] == i) for i in range(n)] == [text] * n
    assert [chunk.get("speculation") for chunk in chunks] == [None] * (len(chunks) - 1) + [report]
    assert chunks[-1]["choices"][0]["finish_reason"]
    assert [chunk.get("speculation") for chunk in counted] == [None] * (len(counted) - 1) + [report]
    assert counted[-1]["choices"] == [] and counted[-1]["usage"]["completion_tokens"] == tokens * n


async def test_choices_that_differ_are_summed_by_how_many_stood() -> None:
    """The first choice ends in its first round, the second goes on: histograms of different lengths."""
    engine = FakeEngine(stands=(1, 3))
    engine.answer = lambda request: list(b"ab" if request.choice == 0 else b"abcdefg")
    async with serving(engine) as client:
        body = {**COMPLETION, "n": 2, "speculation": {"report": True}}
        answer = (await client.post(COMPLETION_URL, json=body)).json()
        chunks = await stream(client, COMPLETION_URL, body)
    assert answer["speculation"] == {**REPORT, "rounds": 3, "drafted": 12, "accepted": 5, "histogram": [0, 2, 0, 1]}
    assert [chunk["speculation"] for chunk in chunks if "speculation" in chunk] == [answer["speculation"]]
    assert chunks[-1]["choices"][0]["index"] == 1 and "speculation" in chunks[-1]


@ENDPOINTS
async def test_nothing_is_told_unasked(url: str, base: Json) -> None:
    async with serving(FakeEngine(stands=STANDS)) as client:
        for asked in (None, {}, {"enabled": True, "max_draft": 3}, {"report": False}):
            body = {**base, "speculation": asked}
            assert "speculation" not in (await client.post(url, json=body)).json()
            assert not any("speculation" in chunk for chunk in await stream(client, url, body))


@ENDPOINTS
async def test_a_lossy_answer_keeps_its_trace(url: str, base: Json) -> None:
    engine = FakeEngine(stands=STANDS, verifier="ensemble")
    async with serving(engine) as client:
        body = {**base, "speculation": {"max_draft": 2, "trace": True}}
        assert (await client.post(url, json=body)).json()["choices"][0]["speculation"]["origins"]
    settled = SpeculationParams(verifier="ensemble", knobs=(("target_weight", 0.7),), bias_bound=0.3)
    assert engine.submitted[0].speculation == replace(settled, max_draft=2, report=True, trace=True)


@ENDPOINTS
async def test_a_lossy_answer_always_says_so(url: str, base: Json) -> None:
    async with serving(FakeEngine(stands=STANDS, verifier="ensemble")) as client:
        for asked in (None, {}, {"report": False}):
            body = {**base, "speculation": asked}
            assert (await client.post(url, json=body)).json()["speculation"] == {**REPORT, **LOSSY}
            assert (await stream(client, url, body))[-1]["speculation"] == {**REPORT, **LOSSY}
        for off in ({"enabled": False}, {"max_draft": 0}):
            assert "speculation" not in (await client.post(url, json={**base, "speculation": off})).json()
            told = (await client.post(url, json={**base, "speculation": {**off, "report": True}})).json()
            assert told["speculation"] == {**NOTHING, "verifier": "ensemble", "knobs": {"target_weight": 0.7}}


async def test_a_fingerprint_tells_apart_what_may_answer_otherwise() -> None:
    """Under `strict` the tokens are those of plain decoding; under others they depend on drafts and settings."""

    async def of(info: ModelInfo, asked: Json | None = None) -> str:
        engine = FakeEngine()
        engine.info = info
        async with serving(engine) as client:
            answer = (await client.post(CHAT_URL, json={**CHAT, "speculation": asked})).json()
        found: str = answer["system_fingerprint"]
        return found

    strict, ratio, mixed = (
        FakeEngine(stands=STANDS, verifier=name).info for name in ("strict", "rejection", "ensemble")
    )
    exact = await of(FakeEngine().info)
    assert exact == await of(strict) == await of(strict, {"verifier": "ensemble", "target_weight": 1})
    assert exact == await of(mixed, {"verifier": "strict"}) == await of(mixed, {"enabled": False})
    assert exact == await of(mixed, {"target_weight": 1.0}) == await of(ratio, {"max_draft": 0})
    whole = replace(mixed, verifier_knobs=(("target_weight", 1.0),))
    assert exact == await of(whole)
    loose = [
        await of(whole, {"target_weight": 0.9}),
        *[await of(strict, {"verifier": name}) for name in ("ensemble", "typical", "rejection")],
    ]
    assert exact not in loose
    changes: list[Json] = [
        {},
        {"draft": "two"},
        {"max_draft": 3},
        {"verifier_knobs": (("target_weight", 0.5),)},
        {"verifier_head": "a"},
        {"sample": True},
    ]
    prints = [await of(ratio), *[await of(replace(mixed, **change)) for change in changes]]
    assert len({exact, *prints}) == 8


async def test_scoring_a_prompt_drafts_nothing() -> None:
    async with serving(FakeEngine(stands=STANDS)) as client:
        body = {**COMPLETION, "echo": True, "max_tokens": 0, "logprobs": 1, "speculation": {"report": True}}
        answer = (await client.post(COMPLETION_URL, json=body)).json()
    assert answer["speculation"] == {**NOTHING, "verifier": "strict"}


async def test_logprobs_and_ids_are_those_of_the_kept_tokens() -> None:
    async with serving(FakeEngine(stands=STANDS)) as client:
        body = {**CHAT, "stop": "r", "logprobs": True, "return_token_ids": True}
        choice = (await client.post(CHAT_URL, json=body)).json()["choices"][0]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 7


async def test_metrics_of_models_with_and_without_a_drafter() -> None:
    """A round is one interval, however many tokens it brings."""
    async with serving(FakeEngine("plain"), FakeEngine("drafted", stands=STANDS)) as client:
        await client.post(CHAT_URL, json={**CHAT, "model": "drafted"})
        page = (await client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("vllm:"))
    spec = [line for line in lines if line.startswith("vllm:spec_decode") and "_created" not in line]
    assert len(spec) == 3 + 4 and all('model_name="drafted"' in line for line in spec)
    labels = '{engine="0",model_name="drafted"}'
    assert lines[f"vllm:generation_tokens_total{labels}"] == "11.0"
    assert lines[f"vllm:time_to_first_token_seconds_count{labels}"] == "1.0"
    assert lines[f"vllm:inter_token_latency_seconds_count{labels}"] == "4.0"
