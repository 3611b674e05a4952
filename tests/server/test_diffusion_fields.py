"""Diffusion models over HTTP: every field of a request, good and bad."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.diffusion import DiffusionParams
from tests.denoisers import FULL_INFO, MASK, RULES
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving

ENDPOINTS = pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
ROOMY = replace(FULL_INFO, max_canvas=256)
TEXT = "Hello, wörld!"  # 11 tokens with the end: in FakeEngine's 8th pass, by threes
PASSES: Json = {"forwards": 8, "draft_forwards": 16, "verifies": 2, "remasked": 2, "tokens_per_forward": 0.458}


def asked(rule: str = "threshold", **fields: Any) -> DiffusionParams:
    knobs = fields.pop("knobs", {"threshold": 0.9} if rule == "threshold" else {})
    plain: Json = {"cache": "none", "block_length": 8, "canvas": 16}
    return DiffusionParams(rule, tuple(knobs.items()), **{**plain, **fields})


@ENDPOINTS
@pytest.mark.parametrize(
    "wish, expected",
    [
        (None, asked()),
        ({}, asked()),
        (dict.fromkeys(("rule", "threshold", "factor", "delta", "cache", "block_length", "canvas", "steps",
                        "drafter_steps", "verify", "verify_threshold", "report")), asked()),
        ({"rule": "frechet", "delta": 0, "cache": "dual", "report": False},
         asked("frechet", knobs={"delta": 0.0}, cache="dual")),
        ({"threshold": 2, "block_length": 5}, asked(knobs={"threshold": 2.0}, block_length=5, canvas=20)),
        ({"rule": "quota", "steps": 7, "canvas": 40, "report": True},
         asked("quota", steps=7, canvas=40, report=True)),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
@pytest.mark.asyncio
async def test_what_is_asked_reaches_every_choice(url: str, base: Json, wish: Json, expected: DiffusionParams) -> None:
    engine = FakeEngine(diffusion=ROOMY)
    async with serving(engine) as client:
        body = {**base, "n": 2, "max_tokens": 16, "diffusion": wish}
        answer = await client.post(url, json=body)
        assert answer.status_code == 200, answer.text
    assert [request.diffusion for request in engine.submitted] == [expected] * 2
    assert ("diffusion" in answer.json()) == expected.report


@pytest.mark.parametrize(
    "url, fields, canvas, tokens",
    [
        (CHAT_URL, {}, 40, 40),  # the server's
        (CHAT_URL, {"max_completion_tokens": 9}, 16, 9),
        (CHAT_URL, {"max_tokens": 9, "diffusion": {"canvas": 30}}, 32, 9),
        (CHAT_URL, {"diffusion": {"canvas": 30}}, 32, 30),
        (COMPLETION_URL, {}, 16, 16),  # OpenAI's
        (COMPLETION_URL, {"diffusion": {"canvas": 30}}, 32, 30),
        (COMPLETION_URL, {"max_tokens": 200}, 200, 200),
    ],
)
@pytest.mark.asyncio
async def test_the_canvas_of_a_request_that_does_not_say(url: str, fields: Json, canvas: int, tokens: int) -> None:
    engine = FakeEngine(diffusion=ROOMY)
    async with serving(engine) as client:
        base = CHAT if url == CHAT_URL else COMPLETION
        assert (await client.post(url, json={**base, **fields})).status_code == 200
    (request,) = engine.submitted
    assert (request.diffusion.canvas, request.sampling.max_tokens) == (canvas, tokens)


@pytest.mark.asyncio
async def test_the_servers_canvas_ends_with_the_context() -> None:
    """But not with the step: a canvas that is too long for it is an error that says what would fit."""
    engine = FakeEngine(diffusion=replace(FULL_INFO, max_canvas=60), max_model_len=50)
    async with serving(engine) as client:
        prompt = len(engine.tokenizer.encode_chat(CHAT["messages"]))
        await client.post(CHAT_URL, json=CHAT)
        assert engine.submitted[-1].sampling.max_tokens == 50 - prompt < 40
        engine.info = replace(engine.info, diffusion=replace(FULL_INFO, max_canvas=30))
        error = error_of(await client.post(CHAT_URL, json=CHAT), 400)
    assert error["message"] == (
        f"max_tokens must be at most {30 - prompt}: a canvas of {50 - prompt} tokens behind the prompt's {prompt} is"
        " more than the 30 that one step of this server takes"
    )


@ENDPOINTS
@pytest.mark.parametrize(
    "wish, param, code, text",
    [
        *(({"rule": value}, ".rule", "invalid_type", "string") for value in (3, ["quota"])),
        ({"rule": ""}, ".rule", "invalid_value", "at least 1 character"),
        ({"rule": "fastest"}, ".rule", "invalid_value", "is not offered by this model; it has quota, threshold,"),
        ({"cache": "block"}, ".cache", "invalid_value", "is not offered by this model; it has none, prefix, dual"),
        *(({"threshold": value}, ".threshold", "invalid_type", "number") for value in ("0.5", True, [0.5])),
        *(({"threshold": value}, ".threshold", "invalid_value", "must be a number between 0 and 2")
          for value in (-0.1, 2.1)),
        ({"delta": 0.1}, ".delta", "unsupported_parameter",
         "is no knob of the rule 'threshold', which has threshold; it belongs to frechet"),
        *(({name: 0}, f".{name}", "invalid_value", "greater than or equal to 1")
          for name in ("block_length", "canvas", "steps", "drafter_steps")),
        *(({name: 2.0}, f".{name}", "invalid_type", "integer")
          for name in ("block_length", "canvas", "steps", "drafter_steps")),
        ({"block_length": 1025}, ".block_length", "invalid_value", "must be between 1 and 1024"),
        ({"canvas": 15}, ".canvas", "invalid_value", "must be at least max_tokens, which is 16"),
        ({"canvas": 255}, ".canvas", "invalid_value", "that one step of this server takes"),
        ({"canvas": 600}, ".canvas", "invalid_value", "the context of 512 tokens holds the prompt's"),
        ({"steps": 4}, ".steps", "unsupported_parameter", "the rule 'threshold', which has no schedule"),
        ({"rule": "quota", "steps": 17}, ".steps", "invalid_value", "must be at most 16, the tokens of the canvas"),
        ({"drafter_steps": 4}, ".drafter_steps", "unsupported_parameter", "are not drafted and verified"),
        ({"verify": "trust"}, ".verify", "unsupported_parameter", "are not drafted and verified"),
        ({"verify_threshold": 0.5}, ".verify_threshold", "unsupported_parameter", "are not drafted and verified"),
        ({"verify_threshold": 1.5}, ".verify_threshold", "invalid_value", "less than or equal to 1"),
        ({"report": 1}, ".report", "invalid_type", "boolean"),
        ({"remasking": "low_confidence"}, ".remasking", "unsupported_parameter", "no such setting here; known: rule,"),
        (True, "", "invalid_type", "object"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
@pytest.mark.asyncio
async def test_bad_fields_are_refused_by_name(
    url: str, base: Json, wish: Json, param: str, code: str, text: str
) -> None:
    engine = FakeEngine(diffusion=ROOMY)
    async with serving(engine) as client:
        for more in ({}, {"stream": True}):
            body = {**base, **more, "max_tokens": 16, "diffusion": wish}
            error = error_of(await client.post(url, json=body), 400)
            assert (error["param"], error["code"]) == (f"diffusion{param}", code)
            assert f"diffusion{param}" in error["message"] and text in error["message"]
    assert engine.submitted == []


@ENDPOINTS
@pytest.mark.parametrize(
    "fields, param, text",
    [
        ({"presence_penalty": 1}, "presence_penalty", "in any order"),
        ({"frequency_penalty": 1}, "frequency_penalty", "in any order"),
        ({"repetition_penalty": 1.2}, "repetition_penalty", "in any order"),
        ({"bad_words": ["two bytes"]}, "bad_words", "only words of one token"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "no probability of a token given those before it"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "can't be held to a grammar"),
        ({"speculation": {"enabled": True}}, "speculation.enabled", "served without a drafter"),
        ({"speculation": {"max_draft": 4}}, "speculation.max_draft", "served without a drafter"),
        ({"speculation": {"verifier": "strict"}}, "speculation.verifier", "does nothing here"),
    ],
)
@pytest.mark.asyncio
async def test_what_cannot_hold_is_refused_by_name(url: str, base: Json, fields: Json, param: str, text: str) -> None:
    async with serving(FakeEngine(diffusion=ROOMY)) as client:
        error = error_of(await client.post(url, json={**base, **fields}), 400)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert text in error["message"]


@pytest.mark.asyncio
async def test_the_prompt_of_a_completion() -> None:
    engine = FakeEngine(diffusion=ROOMY)
    async with serving(engine) as client:
        body = {**COMPLETION, "echo": True, "logprobs": 0}
        error = error_of(await client.post(COMPLETION_URL, json=body), 400)
        assert (error["param"], error["code"]) == ("logprobs", "unsupported_parameter")
        error = error_of(await client.post(COMPLETION_URL, json={**COMPLETION, "prompt": [1, MASK]}), 400)
        assert error["param"] == "prompt" and f"holds the token {MASK} at index 1" in error["message"]
        answer = await client.post(COMPLETION_URL, json={**COMPLETION, "echo": True})
        assert answer.json()["choices"][0]["text"].startswith("hiHello")
        answer = await client.post(COMPLETION_URL, json={**COMPLETION, "logprobs": 0})
        assert answer.json()["choices"][0]["logprobs"]["token_logprobs"] == [-0.5] * 11


@ENDPOINTS
@pytest.mark.parametrize(
    "wish, param",
    [
        ({"rule": "threshold"}, "rule"),
        ({"threshold": 0.9}, "threshold"),
        ({"canvas": 64}, "canvas"),
        ({"report": True}, "report"),
        ({"steps": 4}, "steps"),
    ],
)
@pytest.mark.asyncio
async def test_an_autoregressive_model_takes_none_of_it(url: str, base: Json, wish: Json, param: str) -> None:
    async with serving(FakeEngine()) as client:
        error = error_of(await client.post(url, json={**base, "diffusion": wish}), 400)
        assert (error["param"], error["code"]) == (f"diffusion.{param}", "unsupported_parameter")
        assert "this model is autoregressive" in error["message"]
        for fine in (None, {}, {"rule": None, "report": False}):
            assert (await client.post(url, json={**base, "diffusion": fine})).status_code == 200


@pytest.mark.asyncio
async def test_a_knob_of_a_rule_that_the_server_was_extended_by() -> None:
    """Its name is in no schema; its card says that there is one."""
    mine = replace(RULES[1], name="mine", knobs=(replace(RULES[1].knobs[0], name="sharpness"),))
    engine = FakeEngine(diffusion=replace(ROOMY, rules=(*RULES, mine)))
    async with serving(engine) as client:
        for value, status in ((0.5, 200), (None, 200), ("0.5", 400), (True, 400), (7, 400)):
            body = {**COMPLETION, "diffusion": {"rule": "mine", "sharpness": value}}
            answer = await client.post(COMPLETION_URL, json=body)
            assert answer.status_code == status
            assert status == 200 or error_of(answer, 400)["param"] == "diffusion.sharpness"
    assert [dict(request.diffusion.knobs) for request in engine.submitted] == [{"sharpness": 0.5}, {"sharpness": 0.9}]
