"""Every field that a generation request may have: accepted ones work, refused ones are a 400 that names the field.

`docs/parameters.md` lists them all; its list, the schemas and what is tried here are one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server import unsupported
from server.schemas import CompletionBody
from server.schemas_chat import ChatBody
from tests.server.fake_engine import FakeEngine, make_tokenizer
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving

TABLE = Path(__file__).resolve().parents[2] / "docs" / "parameters.md"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
USER = {"role": "user", "content": "hi"}

# Field: (values that are fine, values that are not). Of the latter a dict is the whole request around it.
NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 3], [0, -1, 129, "1", True, 1.5, 2**31]),
    "max_tokens": ([1, 7, 10**6], [0, -1, "1", True, 1.5, 2**63]),
    "min_tokens": ([0, 3], [-1, 10**6, "1", True]),
    "temperature": ([0, 0.0, 1, 2, 1e-9], [-0.1, 2.1, "1", True, 1e999]),
    "top_p": ([0.1, 1], [0, -1, 1.1, "1"]),
    "top_k": ([-1, 0, 5, 10**6], [-2, 1.5, "1", 2**31]),
    "min_p": ([0, 0.5, 1], [-0.1, 1.1, "1"]),
    "presence_penalty": ([-2, 0, 2], [-2.1, 2.1, "1"]),
    "frequency_penalty": ([-2, 0, 2], [-2.1, 2.1, "1"]),
    "repetition_penalty": ([0.01, 1, 1.3, 100], [0, -1, 101, "1"]),
    "seed": ([0, -5, 2**63 - 1, -(2**63)], [2**63, "1", 1.5, True]),
    "prompt_logprobs": ([0, 5, 20], [-1, 21, "1", 1.5]),
    "truncate_prompt_tokens": ([-1, 1, 4096], [-2, 0, 4097, "1", 1.5]),
    "stream_interval": ([1, 10, 1024], [0, -1, 1025, "1", 1.5]),
    "priority": ([-5, 0, 7], ["1", 1.5, 2**31]),
    "thinking_token_budget": ([0, 100], [-1, "1", 1.5, 2**31]),
    "max_thinking_tokens": ([0, 100], [-1, "1", 1.5]),
    "thinking_budget": ([0, 100], [-1, "1", 1.5]),
}
LISTS: dict[str, tuple[list[Any], list[Any]]] = {
    "stop": (["x", ["x", "yz"], [], ["a"] * 4], ["", [""], ["a"] * 5, 1, [1], {}, "x" * 1025]),
    "stop_regex": (
        ["a+b", [], ["x|y", r"\d{2,3}", "(?i)stop[.!]"]],
        ["", "(", "a{5,2}", "^a", "a*", r"(a)\1", "(?=a)", "[z-a]", "x" * 257, "((a{99}){99}){99}", ["a"] * 5, 1, [1]],
    ),
    "stop_token_ids": ([[], [5, 257]], [[-1], [10**6], "x", 5, ["a"], [1.5], [1] * 1025]),
    "bad_words": ([[], ["no", "bad word"]], ["x", [""], [1], ["x" * 257], ["x"] * 1025]),
    "allowed_token_ids": ([[1, 2, 257]], [[], [-1], [10**6], "x", [1.5]]),
    "logit_bias": ([{}, {"5": 100, "6": -100}], [{"5": 101}, {"x": 1}, {"-1": 1}, {"1000000": 1}, [], "x", {"5": "1"}]),
    "repetition_detection": (
        [{"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}, {"repetition_detection": {}}],
        [
            {"repetition_detection": {"max_pattern_size": 4}},
            {"repetition_detection": {"max_pattern_size": 4, "min_count": 1}},
            {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}},
            {"repetition_detection": {"max_pattern_size": 257, "min_count": 2}},
            {"repetition_detection": {"max_pattern": 2}},
            {"repetition_detection": True},
        ],
    ),
}
SWITCHES = (
    *("stream", "include_stop_str_in_output", "no_stop_trim", "ignore_eos", "skip_special_tokens"),
    *("spaces_between_special_tokens", "return_token_ids", "return_tokens_as_token_ids"),
)
OTHERS: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["tiny"], ["other", 5, ""]),
    "truncation_side": (
        [{"truncation_side": side, "truncate_prompt_tokens": 5} for side in ("left", "right")],
        ["left", {"truncation_side": "middle", "truncate_prompt_tokens": 5}],
    ),
    "stream_options": (
        [{"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}],
        [{"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {"include_usage": "yes"}}],
    ),
    "cache_salt": (["a"], ["", "x" * 257, 1]),
    "speculation": ([{"speculation": {}}], [{"speculation": {"max_draft": "x"}}, {"speculation": {"nonsense": 1}}]),
    "diffusion": ([], [{"diffusion": {"rule": "entropy"}}, "x"]),
    "response_format": (
        [{"response_format": {"type": kind}} for kind in ("text", "json_object")],
        [{"response_format": value} for value in ({"type": "json_schema"}, {"type": "yaml"}, {}, "json", 5)],
    ),
    "structured_outputs": (
        [{"structured_outputs": {"regex": "[ab]+"}}, {"structured_outputs": {"choice": ["a", "b"]}}],
        [{"structured_outputs": value} for value in ({}, {"regex": "("}, {"regex": "a", "choice": ["a"]}, "x")],
    ),
}
ONLY: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    COMPLETION_URL: {
        "prompt": (
            ["hi", ["hi", "you"], [72, 105], [[72], [105, 33]]],
            ["", [], [""], [[]], [["x"]], 5, None, [True], [-1], [10**6], ["a", 1]],
        ),
        "logprobs": ([0, 5, 20], [-1, 21, "1", True]),
        "logprob_token_ids": (
            [{"logprobs": 1, "logprob_token_ids": [1, 2]}],
            [{"logprobs": 1, "logprob_token_ids": [10**6]}, {"logprob_token_ids": [1]}, "x"],
        ),
        "echo": ([True, False], ["yes", 1]),
        "add_special_tokens": ([True, False], ["yes", 1]),
    },
    CHAT_URL: {
        "messages": (
            [[USER], [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, USER]],
            [[], None, "hi", [{"role": "user"}], [{"role": "alien", "content": "x"}], [{"role": "user", "content": 5}]],
        ),
        "max_completion_tokens": ([1, 10**6], [0, -1, "1", True]),
        "logprobs": ([True, False], [1, "yes"]),
        "logprob_token_ids": (
            [{"logprobs": True, "logprob_token_ids": [1, 2]}],
            [{"logprobs": True, "logprob_token_ids": [10**6]}, {"logprob_token_ids": [1]}, "x"],
        ),
        "top_logprobs": (
            [{"logprobs": True, "top_logprobs": 5}, 0],
            [3, {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1}],
        ),
        "echo": (
            [{"echo": True, "continue_final_message": True, "messages": [USER, {"role": "assistant", "content": "a"}]},
             False],
            [True, "yes"],
        ),
        "add_special_tokens": ([False], [True, "yes"]),
        "add_generation_prompt": ([True, False], ["yes"]),
        "continue_final_message": (
            [{"continue_final_message": True, "messages": [USER, {"role": "assistant", "content": "a"}]}],
            ["yes", {"continue_final_message": True, "add_generation_prompt": True}],
        ),
        "chat_template_kwargs": (
            [{"chat_template_kwargs": {"extra": 1}}],
            ["x", {"chat_template_kwargs": {"tools": 1}}],
        ),
        "reasoning_effort": (["none", "minimal", "low", "medium", "high", "xhigh", "max"], ["huge", 1, ""]),
        "reasoning": (
            [{"reasoning": {}}, {"reasoning": {"effort": "low", "max_tokens": 5, "exclude": True, "enabled": True}}],
            [{"reasoning": {"effort": "huge"}}, {"reasoning": {"x": 1}}, {"reasoning": {"max_tokens": -1}}, "low"],
        ),
        "enable_thinking": ([True, False], ["yes"]),
        "include_reasoning": ([True, False], ["yes"]),
        "separate_reasoning": ([True, False], ["yes"]),
        "stream_reasoning": ([True, False], ["yes"]),
        "tools": ([{"tools": [TOOL]}], [{"tools": []}, {"tools": [TOOL, TOOL]}, {"tools": "x"}, {"tools": [{}]}]),
        "tool_choice": (
            [{"tools": [TOOL], "tool_choice": choice} for choice in ("none", "auto", "required")],
            ["required", {"tools": [TOOL], "tool_choice": "maybe"}],
        ),
        "parallel_tool_calls": ([True, False], ["yes"]),
    },
}  # fmt: skip
SHARED = {**NUMBERS, **LISTS, **OTHERS, **{name: ([True, False], ["yes", 1, {}]) for name in SWITCHES}}
BASE: dict[str, Json] = {COMPLETION_URL: COMPLETION, CHAT_URL: CHAT}
DECLARED = {
    url: {field.alias or name for name, field in body.model_fields.items()}
    for url, body in ((COMPLETION_URL, CompletionBody), (CHAT_URL, ChatBody))
}
# Fields with tests of their own, which need more than a row here.
ELSEWHERE = {
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern"),
    *("json_schema", "regex", "ebnf", "grammar", "request_id", "functions", "function_call"),
}


def fields(url: str) -> dict[str, tuple[list[Any], list[Any]]]:
    return {**SHARED, **ONLY[url]}


def requests(url: str, bad: bool) -> Iterator[tuple[str, Json]]:
    """(field, request)"""
    for name, values in fields(url).items():
        for value in values[bad]:
            whole = isinstance(value, dict) and name in value
            yield name, {**BASE[url], **(value if whole else {name: value})}


def thinker(**options: Any) -> FakeEngine:
    """A model that thinks and calls tools."""
    tokenizer = make_tokenizer(marks=("<think>", "</think>"))
    engine = FakeEngine(tokenizer=tokenizer, max_model_len=4096, **options)
    name, marks = tokenizer.thinking_form("auto")
    info = replace(engine.info, reasoning_parser=name, thinking=marks, vocab_size=tokenizer.vocab_size)
    engine.info = replace(info, tool_parser="hermes")
    return engine


@pytest.mark.asyncio
@pytest.mark.parametrize("url", BASE)
async def test_good_values_are_taken(url: str) -> None:
    async with serving(thinker(answer="Hello, wörld!")) as client:
        for name, body in requests(url, bad=False):
            response = await client.post(url, json=body)
            assert response.status_code == 200, (name, body, response.text)
            if body.get("stream"):
                assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text, (name, body)


@pytest.mark.asyncio
@pytest.mark.parametrize("url", BASE)
async def test_bad_values_are_a_400_that_names_the_field(url: str) -> None:
    engine = thinker()
    async with serving(engine) as client:
        for name, body in requests(url, bad=True):
            if name == "model" and isinstance(body[name], str):
                assert error_of(await client.post(url, json=body), 404)["param"] == "model"
                continue
            content, kind = json.dumps(body).encode(), {"content-type": "application/json"}
            response = await client.post(url, content=content, headers=kind)
            assert response.status_code == 400, (name, body, response.text)
            error = error_of(response, 400)
            if 1e999 in body.values():
                continue  # no JSON at all
            assert (error["param"] or "").startswith(name), (name, body, error)
            assert error["code"], (name, body, error)
    assert engine.submitted == [], "nothing of it reached the engine"


@pytest.mark.asyncio
@pytest.mark.parametrize("url", BASE)
async def test_null_is_not_given(url: str) -> None:
    needed = {"prompt", "messages"}
    body = {**dict.fromkeys(fields(url)), **BASE[url]}
    assert needed & body.keys()
    engine = thinker(answer="Hello")
    async with serving(engine) as client:
        assert (await client.post(url, json=body)).status_code == 200
        assert (await client.post(url, json=BASE[url])).status_code == 200
    first, second = (replace(one.sampling, seed=0) for one in engine.submitted)
    assert first == second


@pytest.mark.asyncio
@pytest.mark.parametrize("url", BASE)
async def test_refused_fields_are_a_400_whatever_their_value(url: str) -> None:
    refused = {name for name in unsupported.REFUSED if name not in DECLARED[url]} - ELSEWHERE
    conditional = unsupported.CONDITIONAL.keys() - DECLARED[url] - ELSEWHERE
    assert {"top_n_sigma", "typical_p", "logits_processors", "prompt_embeds", "kv_transfer_params"} <= refused
    assert {"use_beam_search", "suffix", "length_penalty"} <= conditional
    async with serving(thinker()) as client:
        for name in (*sorted(refused), *sorted(conditional), "best_of"):
            for value in (2, {"a": 1}, ["x"], "x"):
                error = error_of(await client.post(url, json={**BASE[url], name: value}), 400)
                assert error["param"] == name and error["code"] == "unsupported_parameter", (name, value, error)
                assert len(error["message"]) > len(f"Unsupported parameter: '{name}': .") + 8, "it says what to do"
            assert (await client.post(url, json={**BASE[url], name: None})).status_code == 200
        for body in ({"length_penalty": 1.0, "use_beam_search": False, "early_stopping": False, "num_beams": 1},
                     {"suffix": "", "watermarking": False, "return_hidden_states": False, "best_of": 1},
                     {"best_of": 2, "n": 2, "modalities": ["text"]}):  # fmt: skip
            assert (await client.post(url, json={**BASE[url], **body})).status_code == 200, body


@pytest.mark.asyncio
@pytest.mark.parametrize("url", BASE)
async def test_ignored_fields_change_nothing(url: str) -> None:
    ignored = sorted(unsupported.IGNORED - DECLARED[url])
    assert {"user", "metadata", "store", "service_tier", "safety_identifier", "prediction"} <= set(ignored)
    async with serving(thinker(answer="Hello")) as client:
        for name in (*ignored, "nobody_knows_this"):
            for value in ("x", 5, {"a": [1]}, True):
                assert (await client.post(url, json={**BASE[url], name: value})).status_code == 200, name


@pytest.mark.parametrize("url", BASE)
def test_every_field_of_the_schema_is_tried(url: str) -> None:
    assert DECLARED[url] - ELSEWHERE == set(fields(url))


def test_the_documentation_lists_every_field() -> None:
    named = set(re.findall(r"^\| `([a-z_]+)`", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
    known = {name for url in BASE for name in DECLARED[url]}
    known |= {*unsupported.REFUSED, *unsupported.CONDITIONAL, *unsupported.IGNORED, "best_of"}
    assert known - named == set() and named - known == set()
