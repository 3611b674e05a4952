"""Verifiers over HTTP: every field of theirs, good and bad, and what answers and models tell of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.types import SpeculationParams
from server.schemas import KNOBS
from tests.server.fake_engine import VERIFIERS, FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving, stream

pytestmark = pytest.mark.asyncio

ENDPOINTS = pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
STANDS = (2, 0, 3)
LAW = "this server lets a verifier move a token's law by 0.2 at most"


def settled(verifier: str, bound: float = 0.0, knobs: Json | None = None, **fields: Any) -> SpeculationParams:
    pairs = tuple((knobs or {}).items())
    return SpeculationParams(verifier=verifier, knobs=pairs, bias_bound=bound, report=bound > 0, **fields)


@ENDPOINTS
@pytest.mark.parametrize(
    "asked, expected",
    [
        ({"verifier": None, "target_weight": None, "sample": None, "thinking_only": None}, settled("strict")),
        ({"verifier": "rejection", "sample": True}, settled("rejection", sample=True)),
        ({"verifier": "rejection", "sample": False}, settled("rejection", sample=False)),
        ({"verifier": "ensemble"}, settled("ensemble", 0.3, {"target_weight": 0.7})),
        ({"verifier": "ensemble", "target_weight": 1}, settled("ensemble", 0.0, {"target_weight": 1.0})),
        ({"verifier": "ensemble", "target_weight": 0.25, "sample": True},
         settled("ensemble", 0.75, {"target_weight": 0.25}, sample=True)),
        ({"verifier": "bounded", "epsilon": 0.05}, settled("bounded", 0.05, {"epsilon": 0.05})),
        ({"verifier": "typical", "posterior_alpha": 2},
         settled("typical", 1.0, {"posterior_threshold": 0.3, "posterior_alpha": 2.0})),
        ({"verifier": "top_k_gap", "relaxed_topk": 3, "relaxed_delta": 1.5},
         settled("top_k_gap", 1.0, {"relaxed_topk": 3, "relaxed_delta": 1.5})),
        ({"verifier": "bounded", "thinking_only": True},
         settled("bounded", 0.1, {"epsilon": 0.1}, thinking_only=True, thinking=(3, 4))),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
async def test_what_is_asked_reaches_every_choice(
    url: str, base: Json, asked: Json, expected: SpeculationParams
) -> None:
    engine = FakeEngine(stands=STANDS)
    engine.info = replace(engine.info, thinking=(3, 4))
    async with serving(engine) as client:
        answer = await client.post(url, json={**base, "n": 2, "speculation": asked})
        assert answer.status_code == 200, answer.text
    assert [request.speculation for request in engine.submitted] == [expected] * 2
    assert ("speculation" in answer.json()) == (expected.bias_bound > 0)


@ENDPOINTS
@pytest.mark.parametrize(
    "asked, param, code, text",
    [
        ({"verifier": 3}, ".verifier", "invalid_type", "string"),
        ({"verifier": ""}, ".verifier", "invalid_value", "at least 1 character"),
        ({"verifier": "diversed"}, ".verifier", "invalid_value", "is not offered by this model; it has strict,"),
        ({"sample": 1}, ".sample", "invalid_type", "boolean"),
        ({"thinking_only": "true"}, ".thinking_only", "invalid_type", "boolean"),
        *(({"verifier": "ensemble", "target_weight": value}, ".target_weight", "invalid_type", "number")
          for value in ("0.5", True, [0.5])),
        *(({"verifier": "ensemble", "target_weight": value}, ".target_weight", "invalid_value",
           "must be a number between 0 and 1") for value in (-0.1, 1.1, 2)),
        ({"verifier": "top_k_gap", "relaxed_topk": 8.0}, ".relaxed_topk", "invalid_type", "integer"),
        ({"verifier": "top_k_gap", "relaxed_topk": 0}, ".relaxed_topk", "invalid_value",
         "must be an integer between 1 and 1000"),
        ({"verifier": "top_k_gap", "relaxed_topk": 10**30}, ".relaxed_topk", "invalid_value", "between 1 and 1000"),
        ({"target_weight": 0.9}, ".target_weight", "unsupported_parameter",
         "is no knob of the verifier 'strict', which has none; it belongs to ensemble"),
        ({"verifier": "ensemble", "epsilon": 0.1}, ".epsilon", "unsupported_parameter",
         "is no knob of the verifier 'ensemble', which has target_weight; it belongs to bounded"),
        ({"verifier": "ensemble", "weight": 0.9}, ".weight", "unsupported_parameter", "known: enabled, max_draft,"),
        ({"verifier": "strict", "sample": True}, ".sample", "unsupported_parameter",
         "drawn ones are for rejection, ensemble, bounded"),
        ({"verifier": "bounded", "thinking_only": True}, ".thinking_only", "invalid_value",
         "no tokens around its thinking"),
        ({"verifier": "ensemble"}, ".target_weight", "invalid_value", f"must be at least 0.8: {LAW}, and 0.7 may"),
        ({"verifier": "bounded", "epsilon": 0.25}, ".epsilon", "invalid_value", f"must be at most 0.2: {LAW}, and"),
        ({"verifier": "typical"}, ".verifier", "invalid_value", f"'typical' sets no bound to its bias, and {LAW}"),
        ({"verifier": "typical", "enabled": False}, ".verifier", "invalid_value", "sets no bound"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
async def test_bad_fields_are_refused_by_name(
    url: str, base: Json, asked: Json, param: str, code: str, text: str
) -> None:
    engine = FakeEngine(stands=STANDS, max_bias=0.2)
    async with serving(engine) as client:
        for more in ({}, {"stream": True}):
            error = error_of(await client.post(url, json={**base, **more, "speculation": asked}), 400)
            assert (error["param"], error["code"]) == (f"speculation{param}", code)
            assert f"speculation{param}" in error["message"] and text in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    "fields, param",
    [
        *((f'"verifier": "ensemble", "target_weight": {number}', "target_weight") for number in ("NaN", "1e999")),
        ('"verifier": "\\ud800"', "verifier"),
        ('"verifier": "ensemble", "\\ud800": 1', ""),
    ],
)
async def test_what_json_can_say_and_nobody_means_is_refused(fields: str, param: str) -> None:
    body = f'{{"model": "tiny", "prompt": "hi", "speculation": {{{fields}}}}}'
    async with serving(FakeEngine(stands=STANDS)) as client:
        answer = await client.post(COMPLETION_URL, content=body, headers={"content-type": "application/json"})
        assert error_of(answer, 400)["param"] in (f"speculation.{param}", None)


@ENDPOINTS
@pytest.mark.parametrize("field", ["verifier", "target_weight", "relaxed_topk", "sample", "thinking_only"])
async def test_a_model_without_a_drafter_verifies_nothing(url: str, base: Json, field: str) -> None:
    value = {"verifier": "strict", "target_weight": 1.0, "relaxed_topk": 8}.get(field, True)
    async with serving(FakeEngine()) as client:
        error = error_of(await client.post(url, json={**base, "speculation": {field: value}}), 400)
        assert (error["param"], error["code"]) == (f"speculation.{field}", "unsupported_parameter")
        assert "served without a drafter" in error["message"]
        fine = {"sample": False, "thinking_only": False, "verifier": None}
        assert (await client.post(url, json={**base, "speculation": fine})).status_code == 200


async def test_a_knob_of_a_verifier_that_the_server_was_extended_by() -> None:
    """Its name is in no schema; its card says that there is one."""
    engine = FakeEngine(stands=STANDS)
    knob = replace(VERIFIERS[2].knobs[0], name="sharpness")
    engine.info = replace(engine.info, verifiers=(*VERIFIERS, replace(VERIFIERS[2], name="mine", knobs=(knob,))))
    async with serving(engine) as client:
        body = {**COMPLETION, "speculation": {"verifier": "mine", "sharpness": 0.5}}
        answer = (await client.post(COMPLETION_URL, json=body)).json()
        assert (answer["speculation"]["knobs"], answer["speculation"]["bias_bound"]) == ({"sharpness": 0.5}, 0.5)
        for wrong in ("0.5", True, None, 7):
            body["speculation"] = {"verifier": "mine", "sharpness": wrong}
            response = await client.post(COMPLETION_URL, json=body)
            assert response.status_code == (200 if wrong is None else 400)
            assert wrong is None or error_of(response, 400)["param"] == "speculation.sharpness"


# ---- answers ---------------------------------------------------------------------------------------------

ROUNDS: Json = {"rounds": 4, "drafted": 16, "accepted": 7, "histogram": [1, 0, 2, 1]}
# 7 of 11 tokens are drafted ones that stood (1/8 each), 3 stand for drafts that did not (1/4); see FakeEngine.
BIAS = round((7 / 8 + 3 / 4) / 11, 6)


@ENDPOINTS
@pytest.mark.parametrize(
    "fields, asked, expected",
    [
        ({}, {"verifier": "ensemble", "target_weight": 0.5},
         {"verifier": "ensemble", "knobs": {"target_weight": 0.5}, "lossy": True, "decoder": "relaxed",
          **ROUNDS, "bias": BIAS, "bias_bound": 0.5}),
        ({"temperature": 0}, {"verifier": "top_k_gap"},
         {"verifier": "top_k_gap", "knobs": {"relaxed_topk": 8, "relaxed_delta": 0.5}, "lossy": True,
          "decoder": "relaxed_greedy", **ROUNDS, "bias": BIAS, "bias_bound": None}),
        ({"temperature": 0}, {"verifier": "ensemble", "target_weight": 1, "report": True},
         {"verifier": "ensemble", "knobs": {"target_weight": 1.0}, "lossy": False, "decoder": "target",
          **ROUNDS, "bias": 0.0, "bias_bound": 0.0}),
        ({}, {"verifier": "rejection", "report": True},
         {"verifier": "rejection", "knobs": {}, "lossy": False, "decoder": "target",
          **ROUNDS, "bias": 0.0, "bias_bound": 0.0}),
        # Up to the third token: the prompt's own, and two that stood.
        ({"max_tokens": 3}, {"verifier": "bounded"},
         {"verifier": "bounded", "knobs": {"epsilon": 0.1}, "lossy": True, "decoder": "relaxed",
          "rounds": 1, "drafted": 4, "accepted": 2, "histogram": [0, 0, 1], "bias": round(0.25 / 3, 6),
          "bias_bound": 0.1}),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
@pytest.mark.parametrize("n", [1, 2])
async def test_the_answer_tells_what_its_verifier_did(
    url: str, base: Json, n: int, fields: Json, asked: Json, expected: Json
) -> None:
    """Counts are sums over choices; the bias is the mean over all of their tokens."""
    sums = {name: expected[name] * n for name in ("rounds", "drafted", "accepted")}
    expected = {**expected, **sums, "histogram": [rounds * n for rounds in expected["histogram"]]}
    async with serving(FakeEngine(stands=STANDS)) as client:
        body = {**base, **fields, "n": n, "speculation": asked}
        assert (await client.post(url, json=body)).json()["speculation"] == expected
        chunks = await stream(client, url, {**body, "stream_options": {"include_usage": True}})
        assert [chunk.get("speculation") for chunk in chunks] == [None] * (len(chunks) - 1) + [expected]


async def test_choices_of_other_lengths_are_weighed_by_their_tokens() -> None:
    engine = FakeEngine(stands=(1,), verifier="ensemble")
    engine.answer = lambda request: list(b"a" if request.choice == 0 else b"abcdefg")
    async with serving(engine) as client:
        answer = (await client.post(COMPLETION_URL, json={**COMPLETION, "n": 2})).json()
    assert answer["speculation"]["bias"] == round(3 * (0.125 + 0.25) / (1 + 7), 6)


# ---- models ----------------------------------------------------------------------------------------------


async def test_models_tell_who_drafts_and_what_requests_may_choose() -> None:
    exact, lossy, bounded = (
        FakeEngine("exact", stands=STANDS),
        FakeEngine("lossy", stands=STANDS, verifier="ensemble"),
        FakeEngine("bounded", stands=STANDS, max_bias=0.25),
    )
    knobs: Json = {"verifier_knobs": (("target_weight", 0.9),), "verifier_head": "a-head", "sample": True}
    lossy.info = replace(lossy.info, draft="Some-Draft-b16", **knobs)
    async with serving(FakeEngine("plain"), exact, lossy, bounded) as client:
        plain, *cards = (entry["speculation"] for entry in (await client.get("/v1/models")).json()["data"])
        assert plain is None
        assert (await client.get("/v1/models/lossy")).json()["speculation"] == cards[1]
    offers = [card.pop("verifiers") for card in cards]
    own: Json = {"drafter": "dflash", "draft": None, "max_draft": 4, "sample": False, "verifier": "strict", "knobs": {}}
    own = {**own, "lossy": False, "max_bias": 1.0, "head": None}
    more = {"draft": "Some-Draft-b16", "sample": True, "verifier": "ensemble", "knobs": {"target_weight": 0.9}}
    assert cards == [own, {**own, **more, "lossy": True, "head": "a-head"}, {**own, "max_bias": 0.25}]
    assert [[offer["name"] for offer in offered] for offered in offers] == [
        [card.name for card in VERIFIERS],
        [card.name for card in VERIFIERS],
        ["strict", "rejection", "ensemble", "bounded"],  # what has no setting below the ceiling can't be had
    ]
    weight = {"name": "target_weight", "default": 0.7, "low": 0.0, "high": 1.0, "text": "weight of the target"}
    weight |= {"neutral": 1.0, "whole": False}
    mixed = {"name": "ensemble", "text": "a mixture", "lossless": False, "exact": False, "drawn": True}
    assert offers[0][2] == {**mixed, "knobs": [weight]}
    assert offers[1][2] == {**mixed, "knobs": [{**weight, "default": 0.9}]}
    assert offers[0][0] == {
        "name": "strict",
        "text": "exact",
        "lossless": True,
        "exact": True,
        "drawn": False,
        "knobs": [],
    }


async def test_the_schema_shows_every_knob_with_its_bounds() -> None:
    async with serving(FakeEngine()) as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    fields = schemas["Speculation"]["properties"]
    assert {*KNOBS, "verifier", "sample", "thinking_only"} <= fields.keys()
    for card in VERIFIERS:
        for knob in card.knobs:
            field = fields[knob.name]
            kind = {"type": "integer" if knob.whole else "number", "minimum": knob.low, "maximum": knob.high}
            assert field["anyOf"] == [kind, {"type": "null"}] and f"`{card.name}`" in field["description"]
