"""A server with a draft network: the answers of plain decoding, and what is told of drafts, whoever asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import LIKED, setting_arguments
from tests.e2e.process import ServerProcess, run_command
from tests.e2e.test_drafting_server import OFF, PROMPTS, ask
from tests.e2e.wire import assert_idle, get, metrics, post

WHOLE = setting_arguments("models.0.quant=none", "kv.memory=6MiB", "models.0.draft.adaptive=false")


@pytest.fixture(scope="module", params=[(), ("--draft-tree", "9")], ids=["chains", "trees"])
def neural(request: pytest.FixtureRequest, tiny_folder: Path, draft_folder: Path) -> Iterator[ServerProcess]:
    """Every draft is verified as a whole, whether that pays or not."""
    with ServerProcess(str(tiny_folder), "--draft", str(draft_folder), *request.param, *WHOLE) as server:
        yield server.wait_ready()
        assert_idle(server.url)
        server.assert_clean_end()


def traced(server: ServerProcess, prompt: str, stream: bool) -> tuple[str, str, list[int], dict[str, int]]:
    """An answer that says everything of its drafts: text, origins, offsets, report."""
    body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": stream}
    response = post(server.url, "/v1/completions", {**body, "speculation": {"report": True, "trace": True}})
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    answers = [json.loads(line) for line in lines] if stream else [response.json()]
    choices = [choice for answer in answers for choice in answer["choices"]]
    traces = [choice["speculation"] for choice in choices]
    text, origins = (
        "".join(parts) for parts in zip(*((c["text"], c["speculation"]["origins"]) for c in choices), strict=True)
    )
    report = answers[-1]["speculation"]
    assert sum(report["histogram"]) == report["rounds"]
    return text, origins, [offset for trace in traces for offset in trace["offsets"]], report


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "seed": 3, "n": 2}])
def test_answers_are_those_of_plain_decoding(neural: ServerProcess, sampling: dict[str, Any]) -> None:
    for prompt, tokens in ((LIKED, 40), (PROMPTS[0], 20)):
        fields = {"logprobs": 1, "max_tokens": tokens, **sampling}
        plain = ask(neural, prompt, speculation=OFF, **fields)["choices"]
        for wish in (None, {"max_draft": 2}):
            choices = ask(neural, prompt, speculation=wish, **fields)["choices"]
            for have, want in zip(choices, plain, strict=True):
                assert (have["text"], have["logprobs"]["tokens"]) == (want["text"], want["logprobs"]["tokens"])
                assert have["logprobs"]["token_logprobs"] == pytest.approx(want["logprobs"]["token_logprobs"], abs=1e-3)


def test_trace_report_and_counters_tell_the_same(neural: ServerProcess) -> None:
    before = metrics(neural.url)
    counted = dict.fromkeys(("rounds", "drafted", "accepted"), 0)
    for prompt in (LIKED, PROMPTS[2]):
        plain = ask(neural, prompt, speculation=OFF)["choices"][0]["text"]
        for stream in (True, False):
            text, origins, offsets, report = traced(neural, prompt, stream)
            assert text == plain and len(origins) == len(offsets) == 60
            assert offsets == sorted(offsets) and offsets[-1] <= len(text)
            assert origins.count("d") == report["accepted"]
            runs = [len(run) for run in re.findall("(d*)[cb]", origins)]
            # The last round may have been cut, so that it has no token of the target's own.
            assert abs(len(runs) - report["rounds"]) <= 1 and max(runs) <= 5
            for name in counted:
                counted[name] += report[name]
    assert counted["accepted"] > 40, "the draft knows the one token that this model says again and again"
    after = metrics(neural.url)
    names = {"rounds": "drafts", "drafted": "draft_tokens", "accepted": "accepted_tokens"}
    for name, metric in names.items():
        series = f"vllm:spec_decode_num_{metric}_total"
        assert after[series] - before[series] == counted[name], name
    series = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert after[series] - before[series] == counted["accepted"]


def test_positions_are_depths(neural: ServerProcess) -> None:
    """As many series as a draft is deep, also where a tree has more nodes; a deeper one stands less often."""
    page = get(neural.url, "/metrics").text
    found = re.findall(r'_accepted_tokens_per_pos_total\{.*position="(\d+)".*\} ([\d.]+)', page)
    assert [int(position) for position, _ in found] == list(range(5))
    counts = [float(count) for _, count in found]
    assert counts == sorted(counts, reverse=True)


def test_the_card_names_the_draft(neural: ServerProcess) -> None:
    card = get(neural.url, "/v1/models").json()["data"][0]["speculation"]
    offered = [verifier["name"] for verifier in card.pop("verifiers")]
    assert offered == ["strict", "rejection", "block", "ensemble", "bounded", "lenient", "typical", "top_k_gap"]
    assert card == {
        "drafter": "dflash",
        "draft": "Tiny-DFlash-b6",
        "max_draft": 5,
        "sample": False,
        "verifier": "strict",
        "knobs": {},
        "lossy": False,
        "max_bias": 1.0,
        "head": None,
    }


def test_chat_shows_drafts(neural: ServerProcess) -> None:
    flags = ("--url", neural.url, "--temperature", "0", "--max-tokens", "30", "--show-drafts")
    plain, shown = run_command("complete", LIKED, *flags[:-1]), run_command("complete", LIKED, *flags)
    assert (shown.returncode, shown.stderr) == (0, "") and "\x1b" not in shown.stdout
    legend, *lines = shown.stdout.removesuffix("\n").split("\n")
    assert legend.startswith("d: drafted") and any(re.fullmatch("[dcbp ]*dd[dcbp ]*", line) for line in lines)
    assert re.fullmatch(r"\[30 tokens: \d+ drafted, \d+ corrected, \d+ bonus, [01] plain\]", lines[-2])
    assert re.fullmatch(r"\[\d+ rounds of \d\.\d\d tokens; \d+ of \d+ drafted .*: 0: \d+( .*)?\]", lines[-1])
    assert plain.returncode == 0 and "drafted" not in plain.stdout
