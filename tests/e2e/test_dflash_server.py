"""A server with a draft network over HTTP: counters equal reports, and whatever ends a request leaves nothing behind.

The draft is of random weights, and hardly anything of it stands; the model's answers are those of plain decoding.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, get, metrics, post

OFF = {"enabled": False}
PROMPTS = ["one two three one two three", "abcabc", "a plain beginning", "x" * 40]
COUNTERS = {"rounds": "num_drafts", "drafted": "num_draft_tokens", "accepted": "num_accepted_tokens"}


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True, **fields}


def ask(server: ServerProcess, prompt: str, **fields: Any) -> dict[str, Any]:
    response = post(server.url, "/v1/completions", body(prompt, **fields))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def counted(server: ServerProcess) -> dict[str, float]:
    page = metrics(server.url)
    return {name: page[f"vllm:spec_decode_{metric}_total"] for name, metric in COUNTERS.items()}


def test_counters_equal_the_reports_and_answers_those_without_drafts(drafting: ServerProcess) -> None:
    plain = {prompt: ask(drafting, prompt, speculation=OFF)["choices"][0]["text"] for prompt in PROMPTS}
    before, sums = counted(drafting), dict.fromkeys(COUNTERS, 0)
    for prompt in PROMPTS:
        answer = ask(drafting, prompt, speculation={"report": True})
        assert answer["choices"][0]["text"] == plain[prompt]
        report = answer["speculation"]
        assert sum(report["histogram"]) == report["rounds"] > 0
        assert sum(stood * rounds for stood, rounds in enumerate(report["histogram"])) == report["accepted"]
        sums = {name: count + report[name] for name, count in sums.items()}
    after = counted(drafting)
    assert {name: after[name] - before[name] for name in COUNTERS} == sums
    assert sums["drafted"] > 3 * sums["rounds"], "whole blocks are verified"
    card = get(drafting.url, "/v1/models").json()["data"][0]["speculation"]
    assert (card["drafter"], card["max_draft"]) == ("dflash", 5)


def test_stop_strings_and_seeds_hold(drafting: ServerProcess) -> None:
    seeded = {"temperature": 1, "seed": 4, "n": 2}
    plain = ask(drafting, "abcabc", speculation=OFF, **seeded)["choices"]
    assert [c["text"] for c in ask(drafting, "abcabc", **seeded)["choices"]] == [c["text"] for c in plain]
    whole = plain[0]["text"]
    stop = whole[11:13]
    choice = ask(drafting, "abcabc", stop=stop, temperature=1, seed=4)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_streams_and_cancels_under_load_leave_nothing(drafting: ServerProcess) -> None:
    """A third is read to its end, a third is left after the first chunk, a third never reads at all."""
    jobs = [(i, f"{PROMPTS[i % 4]} {i % 5}") for i in range(18)]
    expected = {prompt: ask(drafting, prompt, speculation=OFF)["choices"][0]["text"] for _, prompt in jobs}

    def one(job: tuple[int, str]) -> str | None:
        number, prompt = job
        wanted = body(prompt, stream=True, **({} if number % 3 == 0 else {"max_tokens": 300}))
        with httpx.stream("POST", f"{drafting.url}/v1/completions", json=wanted, timeout=60, trust_env=False) as answer:
            if number % 3 == 2:
                return None
            text = ""
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                    if number % 3 == 1:
                        return None
            return text

    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(one, jobs))
    assert [text for text in answers if text is not None] == [
        expected[prompt] for number, prompt in jobs if number % 3 == 0
    ]
    assert_idle(drafting.url)
    assert (
        ask(drafting, PROMPTS[0])["choices"][0]["text"]
        == ask(drafting, PROMPTS[0], speculation=OFF)["choices"][0]["text"]
    )
