"""A server that drafts, over HTTP: the answers of plain decoding, and a report and counters of what drafting did.

One server answers both ways: `speculation: {enabled: false}` is plain decoding. Exact weights, because the packed ones
round a step of one token and a step of nine differently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import setting_arguments
from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, error_of, get, metrics, post

OFF = {"enabled": False}
PROMPTS = ["one two three one two three one two", "abcabcabcabc", "a plain beginning", "x" * 40]


@pytest.fixture(scope="module")
def drafting(tiny_folder: Path) -> Iterator[ServerProcess]:
    settings = setting_arguments("models.0.quant=none", "kv.memory=6MiB", "models.0.draft.max_draft=6")
    with ServerProcess(str(tiny_folder), "--draft", "ngram", *settings) as server:
        yield server.wait_ready()
        assert_idle(server.url)
        server.assert_clean_end()


def ask(server: ServerProcess, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, **fields}
    response = post(server.url, "/v1/completions", body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.4, "seed": 3}, {"temperature": 0.2, "seed": 1, "n": 3}])
def test_answers_are_those_of_plain_decoding(drafting: ServerProcess, sampling: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        plain = ask(drafting, prompt, logprobs=2, speculation=OFF, **sampling)["choices"]
        for wish in (None, {"max_draft": 1}, {"max_draft": 50}):
            choices = ask(drafting, prompt, logprobs=2, speculation=wish, **sampling)["choices"]
            assert [choice["text"] for choice in choices] == [choice["text"] for choice in plain]
            for have, want in zip(choices, plain, strict=True):
                assert have["logprobs"]["tokens"] == want["logprobs"]["tokens"]
                assert have["logprobs"]["token_logprobs"] == pytest.approx(want["logprobs"]["token_logprobs"], abs=1e-3)


def test_the_report_and_the_counters_agree(drafting: ServerProcess) -> None:
    before = metrics(drafting.url)
    report = {"rounds": 0, "drafted": 0, "accepted": 0}
    for prompt in PROMPTS:
        found = ask(drafting, prompt, max_tokens=300, speculation={"report": True})["speculation"]
        assert (found["verifier"], found["lossy"]) == ("strict", False)
        assert sum(found["histogram"]) == found["rounds"]
        assert sum(accepted * rounds for accepted, rounds in enumerate(found["histogram"])) == found["accepted"]
        for name in report:
            report[name] += found[name]
    assert report["accepted"] > 20, "greedy answers of this model go round in circles"
    after = metrics(drafting.url)
    names = {"rounds": "num_drafts", "drafted": "num_draft_tokens", "accepted": "num_accepted_tokens"}
    for name, metric in names.items():
        series = f"vllm:spec_decode_{metric}_total"
        assert after[series] - before[series] == report[name], name
    series = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert after[series] - before[series] == report["accepted"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_tells_where_its_tokens_came_from(drafting: ServerProcess, stream: bool) -> None:
    fields = {"prompt": PROMPTS[1], "max_tokens": 50, "temperature": 0.2, "seed": 2, "n": 2, "ignore_eos": True}
    wish = {"report": True, "trace": True}
    response = post(drafting.url, "/v1/completions", {**fields, "stream": stream, "speculation": wish})
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    answers = [json.loads(line) for line in lines] if stream else [response.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    told = [choice["speculation"] for choice in choices if choice.get("speculation")]
    origins, report = "".join(trace["origins"] for trace in told), answers[-1]["speculation"]
    assert len(origins) == sum(len(trace["offsets"]) for trace in told) == 2 * 50
    assert origins.count("d") == report["accepted"] and set(origins) <= set("dcbp")
    assert report["accepted"] > 0 and origins.count("c") + origins.count("b") <= report["rounds"]


def test_a_stop_string_inside_a_round_cuts_there(drafting: ServerProcess) -> None:
    whole = ask(drafting, "abcabcabcabc")["choices"][0]["text"]
    for start in (5, 17, 30):
        stop = whole[start : start + 2]
        choice = ask(drafting, "abcabcabcabc", stop=stop)["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


def test_many_clients_at_once_and_streams(drafting: ServerProcess) -> None:
    """Drafting and plain requests share steps; a stream's pieces make up the whole answer."""
    prompts = [f"{prompt}{i % 3}" for i, prompt in enumerate(PROMPTS * 5)]
    expected = {prompt: ask(drafting, prompt, speculation=OFF)["choices"][0]["text"] for prompt in set(prompts)}

    def one(job: tuple[int, str]) -> str:
        number, prompt = job
        if number % 3:
            wish = {"max_draft": number % 5} if number % 2 else OFF
            text: str = ask(drafting, prompt, speculation=wish)["choices"][0]["text"]
            return text
        client = OpenAI(base_url=f"{drafting.url}/v1", api_key="none")
        model = client.models.list().data[0].id
        stream = client.completions.create(
            model=model, prompt=prompt, max_tokens=60, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(one, enumerate(prompts)))
    assert answers == [expected[prompt] for prompt in prompts]


def test_a_model_without_a_drafter_says_so(tiny: ServerProcess, drafting: ServerProcess) -> None:
    body = {"prompt": "a", "max_tokens": 2, "speculation": {"enabled": True}}
    assert error_of(post(tiny.url, "/v1/completions", body))["param"] == "speculation.enabled"
    cards = [get(server.url, "/v1/models").json()["data"][0]["speculation"] for server in (tiny, drafting)]
    assert cards[0] is None and (cards[1]["drafter"], cards[1]["max_draft"]) == ("ngram", 6)
