"""Verifiers over real sockets: chosen per request, side by side, and honest in their answers.

With the demo model, which drafts where it pays, and with a tiny one that always does.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.wire import Json, assert_idle, error_of, get, http, post

PROMPT = "The three primary colours are red, yellow and blue. The three primary colours are"
LOSSY: list[Json] = [
    {"verifier": "ensemble", "target_weight": 0.5},
    {"verifier": "bounded", "epsilon": 0.2},
    {"verifier": "lenient"},
    {"verifier": "typical"},
    {"verifier": "top_k_gap"},
    {"verifier": "ensemble", "target_weight": 0.5, "sample": True},
]
LOSSLESS: list[Json] = [{"verifier": "rejection", "sample": True}, {"verifier": "block", "sample": True}]


@pytest.fixture(params=["drafting", "demo"])
def server(request: pytest.FixtureRequest) -> ServerProcess:
    found: ServerProcess = request.getfixturevalue(request.param)
    return found


def ask(server: ServerProcess, speculation: Json | None = None, **fields: Any) -> Json:
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 1, "seed": 5, "ignore_eos": True, **fields}
    body |= {"return_token_ids": True, "speculation": {"report": True, **(speculation or {})}}
    response = post(server.url, "/v1/completions", body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def by_verifier(server: ServerProcess) -> dict[str, dict[str, float]]:
    """The counters of each verifier, by the names that reports use."""
    names = {"rounds": "rounds", "drafted_tokens": "drafted", "accepted_tokens": "accepted", "bias": "bias"}
    found: dict[str, dict[str, float]] = {}
    for line in get(server.url, "/metrics").text.splitlines():
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        short = names.get(name.removeprefix("slipstream:spec_decode_").removesuffix("_total"))
        if short is not None and name.startswith("slipstream:spec_decode_"):
            found.setdefault(labels.partition('verifier="')[2].rstrip('"}'), {})[short] = float(value)
    return found


def test_requests_of_one_batch_have_verifiers_of_their_own(server: ServerProcess) -> None:
    """The counters grow by what the reports say, the strict ones among them answer as if they were alone."""
    plain, before = ask(server, {"enabled": False}), by_verifier(server)
    wishes = [{}, *LOSSY, {}, *LOSSLESS]
    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = list(pool.map(lambda wish: ask(server, wish), wishes))
    sums: dict[str, dict[str, float]] = {}
    for wish, answer in zip(wishes, answers, strict=True):
        report, name = answer["speculation"], wish.get("verifier", "strict")
        assert (report["verifier"], report["lossy"]) == (name, wish in LOSSY)
        assert report["decoder"] == ("relaxed" if wish in LOSSY else "target")
        assert 0 <= report["bias"] <= report["bias_bound"] and (report["bias"] > 0) <= report["lossy"]
        if name == "strict":
            assert answer["choices"] == plain["choices"]
        own = sums.setdefault(name, dict.fromkeys(("rounds", "drafted", "accepted", "bias"), 0.0))
        for field in ("rounds", "drafted", "accepted"):
            own[field] += report[field]
        own["bias"] += report["bias"] * answer["usage"]["completion_tokens"]
    assert_idle(server.url)
    after = by_verifier(server)
    for name, own in sums.items():
        grown = {field: after[name][field] - before[name][field] for field in own}
        assert grown == pytest.approx(own, abs=1e-4), name


def test_a_neutral_knob_is_the_strict_path(server: ServerProcess) -> None:
    """Text and ids, byte for byte; log-probabilities have other last digits where more or fewer drafts ran along."""
    wanted = {"logprobs": 0, "max_tokens": 20, "n": 2}
    strict = ask(server, {"verifier": "strict"}, **wanted)
    for wish in (
        {"verifier": "ensemble", "target_weight": 1},
        {"verifier": "bounded", "epsilon": 0.0},
        {"verifier": "lenient", "lenience": 1, "sample": True},
    ):
        same = ask(server, wish, **wanted)
        for choice, other in zip(strict["choices"], same["choices"], strict=True):
            scores, others = choice["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"]
            assert scores == pytest.approx(others, abs=5e-3)
            assert {**choice, "logprobs": None} == {**other, "logprobs": None}
        assert same["system_fingerprint"] == strict["system_fingerprint"]
        assert (same["speculation"]["lossy"], same["speculation"]["bias_bound"]) == (False, 0.0)


def test_a_greedy_relaxed_answer_is_called_by_its_name(server: ServerProcess) -> None:
    """Its bias is the share of its tokens that are not the model's first choice, where they stand."""
    answer = ask(server, {"verifier": "ensemble", "target_weight": 0.2}, temperature=0, logprobs=1)
    report, choice = answer["speculation"], answer["choices"][0]
    assert (report["decoder"], report["lossy"], report["bias_bound"]) == ("relaxed_greedy", True, None)
    scores = choice["logprobs"]
    best = [max(top.values()) for top in scores["top_logprobs"]]
    others = sum(own < first - 1e-6 for own, first in zip(scores["token_logprobs"], best, strict=True))
    assert report["bias"] == pytest.approx(others / len(best), abs=1e-5)
    again = ask(server, {"verifier": "strict"}, temperature=0, logprobs=1)["choices"][0]["logprobs"]
    assert again["token_logprobs"] == pytest.approx([max(top.values()) for top in again["top_logprobs"]])


def test_log_probabilities_are_the_models_own(drafting: ServerProcess) -> None:
    """Those of a relaxed answer are what the model says of the very same tokens when it scores them."""
    answer = ask(drafting, {"verifier": "ensemble", "target_weight": 0.1}, logprobs=0)
    assert answer["speculation"]["bias"] > 0
    choice, start = answer["choices"][0], post(drafting.url, "/tokenize", {"prompt": PROMPT}).json()["tokens"]
    body = {"prompt": start + choice["token_ids"], "max_tokens": 0, "echo": True, "logprobs": 0}
    scored = post(drafting.url, "/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scored[len(start) :], abs=1e-4)


def test_a_stream_ends_with_the_report(drafting: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 24, "stream": True}
    body |= {"speculation": {"verifier": "bounded", "epsilon": 0.3}}
    with http().stream("POST", f"{drafting.url}/v1/chat/completions", json=body) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    (report,) = (chunk["speculation"] for chunk in chunks if "speculation" in chunk)
    assert "speculation" in chunks[-1]
    assert (report["verifier"], report["knobs"], report["bias_bound"]) == ("bounded", {"epsilon": 0.3}, 0.3)


def test_the_documented_bounds_are_those_of_the_verifiers(drafting: ServerProcess) -> None:
    fields = get(drafting.url, "/openapi.json").json()["components"]["schemas"]["Speculation"]["properties"]
    offered = get(drafting.url, "/v1/models").json()["data"][0]["speculation"]["verifiers"]
    assert {card["name"] for card in offered} >= {wish["verifier"] for wish in LOSSY + LOSSLESS}
    for card in offered:
        for knob in card["knobs"]:
            kind, _ = fields[knob["name"]]["anyOf"]
            assert (kind["minimum"], kind["maximum"]) == (knob["low"], knob["high"])
            assert kind["type"] == ("integer" if knob["whole"] else "number")
            wish = {"verifier": card["name"], knob["name"]: knob["high"] + 1}
            refused = error_of(post(drafting.url, "/v1/completions", {"prompt": "x", "speculation": wish}))
            assert refused["param"] == f"speculation.{knob['name']}"
