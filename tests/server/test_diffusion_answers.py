"""Diffusion models over HTTP: what answers, streams, models and metrics tell of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.types import EngineStats, Passes
from server.metric_names import DIFFUSION_COUNTERS
from server.metrics import Metrics
from server.schemas_diffusion import RULE_KNOBS
from tests.denoisers import BLOCK_INFO, DUAL_INFO, FULL_INFO, RULES
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, serving, stream
from tests.server.test_metrics import INFO, samples

ENDPOINTS = pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
ROOMY = replace(FULL_INFO, max_canvas=256)
TEXT = "Hello, wörld!"  # 11 tokens with the end: in FakeEngine's 8th pass, by threes
PASSES: Json = {"forwards": 8, "draft_forwards": 16, "verifies": 2, "remasked": 2, "tokens_per_forward": 0.458}


@ENDPOINTS
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.asyncio
async def test_the_answer_tells_how_it_was_denoised(url: str, base: Json, n: int) -> None:
    """Counts are sums over choices; a stream tells in its last chunk, whichever that is."""
    plain: Json = {"rule": "threshold", "knobs": {"threshold": 0.9}, "cache": "none", "block_length": 8, "canvas": 16}
    plain |= dict.fromkeys(("steps", "drafter_steps", "verify", "verify_threshold"))
    sums = {name: PASSES[name] * n for name in ("forwards", "draft_forwards", "verifies", "remasked")}
    expected = {**plain, **PASSES, **sums}
    async with serving(FakeEngine(answer=TEXT, diffusion=ROOMY)) as client:
        body = {**base, "n": n, "max_tokens": 16, "diffusion": {"report": True}}
        answer = (await client.post(url, json=body)).json()
        assert answer["diffusion"] == expected and "speculation" not in answer
        assert answer["usage"]["completion_tokens"] == 11 * n
        for more in ({}, {"stream_options": {"include_usage": True}}):
            chunks = await stream(client, url, {**body, **more})
            assert [chunk.get("diffusion") for chunk in chunks] == [None] * (len(chunks) - 1) + [expected]


@ENDPOINTS
@pytest.mark.asyncio
async def test_the_trace_tells_of_each_step_before_its_text(url: str, base: Json) -> None:
    """A chunk without text comes for a step that handed nothing over; the whole answer has all steps in one piece."""
    async with serving(FakeEngine(answer=TEXT, diffusion=ROOMY)) as client:
        body = {**base, "max_tokens": 16, "diffusion": {"trace": True}}
        (whole,) = (await client.post(url, json=body)).json()["choices"]
        chunks = [choice for chunk in await stream(client, url, body) for choice in chunk["choices"]]
        (plain,) = (await client.post(url, json={**body, "diffusion": {"trace": False}})).json()["choices"]
    told = [choice for choice in chunks if "diffusion" in choice]
    steps = [step for choice in told for step in choice["diffusion"]["steps"]]
    assert whole["diffusion"] == {"room": 16, "steps": steps} and "diffusion" not in plain
    first: Json = {"step": 1, "block": [0, 3], "filled": [[0, 258, "Hello"], [1, 11, ","], [2, 220, " "]]}
    assert steps[0] == {**first, "remasked": [], "end": None}
    assert (told[0].get("delta", {}).get("content") or told[0].get("text")) in ("", None)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert steps[-2]["filled"] == [[9, 0, "!"], [10, 257, ""]], "the end has no text"
    assert (steps[-1]["filled"], steps[-1]["end"]) == ([], 11)


@pytest.mark.asyncio
async def test_a_drafted_answer_tells_how_it_was_verified() -> None:
    engine = FakeEngine(diffusion=replace(DUAL_INFO, max_canvas=256, drafter="Fast"))
    async with serving(engine) as client:
        wish = {"report": True, "verify": "both", "verify_threshold": 0.5, "drafter_steps": 3}
        told = (await client.post(COMPLETION_URL, json={**COMPLETION, "diffusion": wish})).json()["diffusion"]
    assert (told["verify"], told["verify_threshold"], told["drafter_steps"]) == ("both", 0.5, 3)


@pytest.mark.asyncio
async def test_choices_and_prompts_of_other_lengths_are_added_up() -> None:
    engine = FakeEngine(diffusion=ROOMY)
    engine.answer = lambda request: list(b"a" if request.choice == 0 else b"abcdefg")
    async with serving(engine) as client:
        body = {**COMPLETION, "prompt": ["hi", "ho"], "n": 2, "diffusion": {"report": True}}
        told = (await client.post(COMPLETION_URL, json=body)).json()["diffusion"]
    assert (told["forwards"], told["draft_forwards"]) == (2 * (2 + 6), 2 * (4 + 12))
    assert told["tokens_per_forward"] == round(2 * (1 + 7) / (3 * 2 * (2 + 6)), 3)


@ENDPOINTS
@pytest.mark.asyncio
async def test_text_comes_in_bursts_and_ends_at_a_stop_string(url: str, base: Json) -> None:
    async with serving(FakeEngine(answer=TEXT, diffusion=ROOMY)) as client:
        body = {**base, "max_tokens": 16, "stop": "wör", "stream_options": {"include_usage": True}}
        chunks = await stream(client, url, body)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        texts = [choice.get("text", choice.get("delta", {}).get("content")) for choice in choices]
        assert "".join(text or "" for text in texts) == "Hello, "
        assert choices[-1]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["completion_tokens"] == 7  # of the 9 that had come by then


# ---- models and metrics ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_models_tell_what_requests_may_choose() -> None:
    full, block = FakeEngine("full", diffusion=FULL_INFO), FakeEngine("block", diffusion=BLOCK_INFO)
    dual = FakeEngine("dual", diffusion=replace(DUAL_INFO, drafter="Fast-7B"))
    knobs = (("threshold", 0.7),)
    full.info = replace(
        full.info, diffusion=replace(FULL_INFO, defaults=replace(FULL_INFO.defaults, knobs=knobs, steps=10))
    )
    async with serving(FakeEngine("plain"), full, block, dual) as client:
        plain, *cards = (entry["diffusion"] for entry in (await client.get("/v1/models")).json()["data"])
        assert plain is None
        assert (await client.get("/v1/models/full")).json()["diffusion"] == cards[0]
        assert (await client.get("/v1/models/full")).json()["speculation"] is None
    rules = [card.pop("rules") for card in cards]
    own: Json = {
        "attention": "full", "rule": "threshold", "knobs": {"threshold": 0.7}, "cache": "none", "block_length": 8,
        "block_lengths": [1, 1024], "canvas": 40, "max_canvas": 48, "steps": 10, "drafter": None,
        "drafter_steps": None, "verify": None, "verify_threshold": None, "caches": ["none", "prefix", "dual"],
        "verifies": [],
    }  # fmt: skip
    assert cards[0] == own
    assert cards[1] == {
        **own, "attention": "block_causal", "rule": "dynamic", "knobs": {"threshold": 0.85}, "cache": "block",
        "block_length": 4, "block_lengths": [4, 4], "canvas": 256, "max_canvas": None, "steps": None,
        "caches": ["block", "dual"],
    }  # fmt: skip
    assert cards[2] == {
        **own, "knobs": {"threshold": 0.9}, "cache": "dual", "steps": None, "drafter": "Fast-7B", "drafter_steps": 16,
        "verify": "confidence", "verify_threshold": 0.9, "caches": ["dual"],
        "verifies": ["trust", "exact", "confidence", "both", "masked_copy"],
    }  # fmt: skip
    threshold = {"name": "threshold", "default": 0.7, "low": 0.0, "high": 2.0, "text": "least probability"}
    likely = {"name": "threshold", "text": "all that are likely enough", "scheduled": False}
    assert rules[0][1] == {**likely, "knobs": [{**threshold, "whole": False}]}
    assert rules[2][1] == {**likely, "knobs": [{**threshold, "whole": False, "default": 0.9}]}
    assert rules[0][0] == {"name": "quota", "text": "as many as the schedule says", "scheduled": True, "knobs": []}
    assert [[rule["name"] for rule in found] for found in rules] == [[card.name for card in RULES]] * 3


@pytest.mark.asyncio
async def test_the_fingerprint_follows_the_servers_settings() -> None:
    prints = []
    for info in (FULL_INFO, FULL_INFO, replace(FULL_INFO, defaults=replace(FULL_INFO.defaults, cache="dual"))):
        async with serving(FakeEngine(diffusion=info)) as client:
            prints.append((await client.post(COMPLETION_URL, json=COMPLETION)).json()["system_fingerprint"])
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.asyncio
async def test_the_schema_shows_every_knob_with_its_bounds() -> None:
    async with serving(FakeEngine()) as client:
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    fields = schemas["Diffusion"]["properties"]
    assert schemas["Diffusion"]["additionalProperties"] is False
    for card in RULES:
        for knob in card.knobs:
            field = fields[knob.name]
            assert knob.name in RULE_KNOBS and f"`{card.name}`" in field["description"]
            assert field["anyOf"] == [
                {"type": "number", "minimum": knob.low, "maximum": knob.high},
                {"type": "null"},
            ]


def test_metrics_are_exposed_from_the_start_and_only_where_something_is_denoised() -> None:
    metrics, names = Metrics(), [name for name, _ in DIFFUSION_COUNTERS.values()]
    metrics.observer("m", replace(INFO, diffusion=FULL_INFO))
    metrics.observer("plain", INFO).on_step(EngineStats(steps=1, denoise_steps=1))
    page = {key: value for key, value in samples(metrics).items() if key[0] in names}
    labels = frozenset({("model_name", "m"), ("engine", "0")})
    assert {name: value for (name, found), value in page.items() if frozenset(found) == labels} == dict.fromkeys(
        names, 0.0
    )
    assert len(page) == len(names)


def test_metrics_count_what_is_new_and_survive_a_restart() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", replace(INFO, diffusion=FULL_INFO))
    taken = Passes(5, 4, 3, 2, 100)
    observer.on_step(EngineStats(steps=5, denoised=taken, denoise_steps=9, denoise_committed=30))
    twice = taken.plus(taken)
    observer.on_step(EngineStats(steps=6, denoised=twice, denoise_steps=10, denoise_committed=33))
    observer.on_step(EngineStats(steps=1, denoised=taken, denoise_steps=1, denoise_committed=2))  # a new process
    page = {name: value for (name, _), value in samples(metrics).items()}
    assert {name: page[name] for name, _ in DIFFUSION_COUNTERS.values()} == {
        "vllm:diffusion_num_denoising_steps_total": 11,
        "vllm:diffusion_num_canvas_positions_total": 300,
        "vllm:diffusion_num_committed_tokens_total": 35,
        "slipstream:diffusion_forwards_total": 15,
        "slipstream:diffusion_draft_forwards_total": 12,
        "slipstream:diffusion_verifies_total": 9,
        "slipstream:diffusion_remasked_tokens_total": 6,
    }
