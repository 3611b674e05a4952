"""Points 50 to 63 of the wire's conformance list: the fields of requests and answers, over real sockets."""

from __future__ import annotations

import re
import time
from typing import Any

import openai
import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.streams import CHAT, COMPLETIONS, MESSAGES, body_of, chunks, client_of, text_of, whole
from tests.e2e.wire import Json, assert_idle, error_of, post

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
CONTEXT = 512  # of `tiny`


@PATHS
def test_point_50_ids_kinds_and_times(tiny: ServerProcess, path: str) -> None:
    answer = whole(tiny, path, max_tokens=2)
    assert re.fullmatch(r"chatcmpl-\w+" if path == CHAT else r"cmpl-\w+", answer["id"])
    assert answer["object"] == ("chat.completion" if path == CHAT else "text_completion")
    assert type(answer["created"]) is int and abs(answer["created"] - time.time()) < 60
    assert answer["model"] == "tiny" == whole(tiny, path, model="tiny", max_tokens=1)["model"]
    assert answer["id"] != whole(tiny, path, max_tokens=2)["id"]


@PATHS
def test_point_51_the_fingerprint_is_a_text(tiny: ServerProcess, path: str) -> None:
    (one,) = {answer["system_fingerprint"] for answer in (whole(tiny, path, max_tokens=2) for _ in range(2))}
    assert isinstance(one, str) and re.fullmatch(r"fp_[0-9a-f]+", one)
    assert {event["system_fingerprint"] for event in chunks(tiny, path, max_tokens=2)} == {one}


@PATHS
def test_point_52_usage_counts_the_end_too(scripted: ScriptedServer, path: str) -> None:
    scripted.engine.answer = "Hello"
    answer = whole(scripted, path, return_token_ids=True)
    usage, ids = answer["usage"], answer["choices"][0]["token_ids"]
    assert usage["completion_tokens"] == len(ids) == 2, "one token, and the end of the sequence"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_point_53_which_length_counts(tiny: ServerProcess) -> None:
    def count(path: str, **fields: Any) -> int:
        tokens: int = whole(tiny, path, ignore_eos=True, **fields)["usage"]["completion_tokens"]
        return tokens

    assert count(CHAT, max_tokens=9, max_completion_tokens=3) == 3
    assert count(CHAT, max_tokens=3, max_completion_tokens=None) == 3
    assert count(COMPLETIONS) == 16 == count(COMPLETIONS, max_tokens=None)
    for path, prompt in ((CHAT, None), (COMPLETIONS, "x" * 480)):
        body: Json = {} if prompt is None else {"prompt": prompt}
        usage = whole(tiny, path, ignore_eos=True, max_tokens=100_000, **body)["usage"]
        assert usage["total_tokens"] == CONTEXT, "cut to the room that there is"
    usage = whole(tiny, CHAT, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == CONTEXT, "a chat may use all of it"


@PATHS
def test_point_54_unknown_fields_pass_and_known_constraints_do_not(tiny: ServerProcess, path: str) -> None:
    assert whole(tiny, path, **GREEDY)["choices"] == whole(tiny, path, **GREEDY, nobody_knows={"x": 1})["choices"]
    assert "nobody_knows" in tiny.log
    constrained = whole(tiny, path, max_tokens=20, guided_choice=["yes", "no"])["choices"][0]
    assert (constrained["message"]["content"] if path == CHAT else constrained["text"]) in ("yes", "no")
    for name, value in (("guided_decoding", {"regex": "a"}), ("structural_tag", {}), ("custom_logit_processor", "x")):
        error = error_of(post(tiny.url, path, body_of(path, **{name: value})))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@PATHS
def test_point_55_null_is_not_given(tiny: ServerProcess, path: str) -> None:
    names = (
        "model n max_completion_tokens stop tools tool_choice logprobs top_logprobs seed user response_format "
        "logit_bias stream stream_options min_p top_k top_p presence_penalty frequency_penalty suffix best_of "
        "reasoning_effort parallel_tool_calls metadata thinking_token_budget stop_regex truncate_prompt_tokens"
    )
    nulls = dict.fromkeys(names.split())
    assert whole(tiny, path, **GREEDY, **nulls)["choices"] == whole(tiny, path, **GREEDY)["choices"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_point_56_content_in_parts_for_all_roles(tiny: ServerProcess, role: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = {**GREEDY, "return_token_ids": True}
    answers = [whole(tiny, CHAT, messages=[{"role": role, "content": c}], **asked) for c in (parts, "one\ntwo")]
    assert answers[0]["prompt_token_ids"] == answers[1]["prompt_token_ids"]
    assert answers[0]["choices"] == answers[1]["choices"]
    for part in ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"type": "x"}, {"text": "x"}, 5):
        error = error_of(post(tiny.url, CHAT, {"messages": [{"role": role, "content": [part]}]}))
        assert error["param"] == "messages[0].content"


def test_point_56_messages_of_tools(tiny: ServerProcess) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "call_1", "content": "42"})
    assert whole(tiny, CHAT, messages=messages, max_tokens=2)["choices"][0]["message"]["role"] == "assistant"


def test_point_57_a_message_says_that_nothing_was_refused(tiny: ServerProcess) -> None:
    message = whole(tiny, CHAT, max_tokens=2)["choices"][0]["message"]
    assert message["refusal"] is None and message["role"] == "assistant"
    with client_of(tiny, _strict_response_validation=True) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2)
    assert answer.choices[0].message.refusal is None


@PATHS
def test_point_58_several_answers_without_temperature(tiny: ServerProcess, path: str) -> None:
    choices = whole(tiny, path, n=3, **GREEDY)["choices"]
    assert [choice.pop("index") for choice in choices] == [0, 1, 2]
    assert choices[0] == choices[1] == choices[2]


@PATHS
def test_point_59_seeds_repeat_answers(tiny: ServerProcess, path: str) -> None:
    for seed in (0, -3, 2**63 - 1, -(2**63)):
        first, second = (whole(tiny, path, seed=seed, max_tokens=12, n=2)["choices"] for _ in range(2))
        assert first == second
    assert error_of(post(tiny.url, path, body_of(path, seed=2**63)))["param"] == "seed"
    free = [whole(tiny, path, max_tokens=12, temperature=2)["choices"] for _ in range(2)]
    assert free[0] != free[1]


@PATHS
def test_point_60_biases_of_tokens(tiny: ServerProcess, path: str) -> None:
    wanted = whole(tiny, path, logit_bias={"65": 100}, return_token_ids=True, **GREEDY)["choices"][0]
    assert wanted["token_ids"] == [65] * 6
    for bias in ({"259": 1}, {"-1": 1}, {"x": 1}, {"1": 100.5}, {"1": "1"}, {"1": None}, [[1, 1]]):
        error = error_of(post(tiny.url, path, body_of(path, logit_bias=bias)))
        assert (error["param"] or "").startswith("logit_bias")


@PATHS
def test_point_61_a_form_that_is_no_form_is_refused_before(tiny: ServerProcess, path: str) -> None:
    wrong: list[tuple[Json, str]] = [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= missing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_regex": "("}, "guided_regex"),
    ]  # fmt: skip
    for fields, param in wrong:
        for stream in (False, True):
            error = error_of(post(tiny.url, path, body_of(path, stream=stream, **fields)))
            assert (error["param"] or "").startswith(param), (fields, error)
    assert_idle(tiny.url)


def test_point_61_strict_is_taken(tiny: ServerProcess) -> None:
    for strict in (True, False, None):
        schema = {"name": "x", "strict": strict, "schema": {"enum": ["a", "b"]}}
        choice = whole(tiny, CHAT, response_format={"type": "json_schema", "json_schema": schema})["choices"][0]
        assert choice["message"]["content"] in ('"a"', '"b"') and choice["finish_reason"] == "stop"


def test_point_62_prompts_of_all_kinds(tiny: ServerProcess) -> None:
    wrong: list[Any] = ["", [], [[]], [""], ["a", ""], None, 5, ["a", 5], [[5], "a"], [True]]
    outside: list[Any] = [[-1], [259], [1 << 40], [[5], [259]]]
    for prompt in wrong + outside:
        assert error_of(post(tiny.url, COMPLETIONS, {"prompt": prompt}))["param"] == "prompt"
    ids = [post(tiny.url, "/tokenize", {"prompt": text}).json()["tokens"] for text in ("one", "two")]
    asked: Json = {"n": 2, "seed": 4, "max_tokens": 5}
    by_text = whole(tiny, COMPLETIONS, prompt=["one", "two"], **asked)["choices"]
    assert [choice["index"] for choice in by_text] == [0, 1, 2, 3]
    assert whole(tiny, COMPLETIONS, prompt=ids, **asked)["choices"] == by_text
    assert whole(tiny, COMPLETIONS, prompt="two", **asked)["choices"][1]["text"] == by_text[3]["text"]
    events = chunks(tiny, COMPLETIONS, prompt=ids, **asked)
    assert [text_of(events, index) for index in range(4)] == [choice["text"] for choice in by_text]


@PATHS
def test_point_63_what_is_not_supported_says_so(tiny: ServerProcess, path: str) -> None:
    for fields in ({"suffix": "tail"}, {"best_of": 3}, {"use_beam_search": True}, {"prompt_embeds": "AAAA"}):
        error = error_of(post(tiny.url, path, body_of(path, **fields)))
        assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_parameter")
        assert error["message"].startswith(f"Unsupported parameter: '{next(iter(fields))}': ")
    assert whole(tiny, path, suffix="", best_of=2, n=2, max_tokens=1)["choices"][1]["index"] == 1
    with client_of(tiny) as client, pytest.raises(openai.BadRequestError, match="inserting between two texts"):
        client.completions.create(model="tiny", prompt="x", suffix="y")
