"""What the engine's own guard lets through, changes and refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from engine.diffusion import DiffusionInfo, DiffusionParams, DiffusionSpec
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.grammar import Grammar
from engine.types import ModelInfo, Request, SamplingParams, SpeculationParams
from engine.validate import validate

INFO = ModelInfo("m", "m", 64, 100, (99,), 4, 32, 0, "none", "autoregressive")


def request(prompt: tuple[Any, ...] = (1, 2, 3), **sampling: Any) -> Request:
    return Request("r", prompt, SamplingParams(**{"max_tokens": 8, **sampling}))


def test_a_plain_request_passes_unchanged() -> None:
    asked = request(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        stop=("\n",),
        stop_token_ids=(0, 99),
        logit_bias=((3, -100.0), (4, 100)),
        bad_words=((1,), (1, 2)),
        allowed_token_ids=(1, 2),
        logprobs=0,
        seed=-(2**63),
        min_tokens=8,
    )
    assert validate(asked, INFO) == asked


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, True, 1.5, "3", None, 2**70)),
        *(("temperature", value) for value in (-1, math.nan, math.inf, -math.inf, "1", True, 1e30, None)),
        *(("top_p", value) for value in (0, 1.01, -0.5, math.nan, False)),
        *(("top_k", value) for value in (-1, 1.0, True, 2**64)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, math.nan)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, math.inf)),
        *(("repetition_penalty", value) for value in (0, -1, 1e-310, 1e3, math.nan)),
        *(("seed", value) for value in (2**63, -(2**63) - 1, 0.5, True)),
        *(("min_tokens", value) for value in (-1, 9, True)),
        *(("logprobs", value) for value in (-1, 21, True)),
        *(("prompt_logprobs", value) for value in (-1, 21, 0.0)),
        *(("stop", value) for value in (("",), ("x" * 1025,), ("x",) * 65, ("\ud800",), (3,))),
        *(("stop_token_ids", value) for value in ((100,), (-1,), (True,), (1,) * 1025)),
        *(("logit_bias", value) for value in (((100, 1.0),), ((1, 101.0),), ((1, math.nan),), ((1, 1.0),) * 1025)),
        *(("allowed_token_ids", value) for value in ((), (100,), (-1,), (1,) * 101)),
        *(("bad_words", value) for value in (((),), ((100,),), ((1,),) * 1025, ((1,) * 65,))),
    ],
)
def test_a_bad_value_is_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(request(**{param: value}), INFO)
    assert refused.value.param == param
    assert refused.value.message.startswith(param)


@pytest.mark.parametrize("prompt", [(), (-1,), (100,), (True,), (1, 2.0), ("a",), (None,), (2**40,)])
def test_a_bad_prompt_is_refused_under_the_clients_name(prompt: tuple[object, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(request(prompt), INFO, param="messages")
    assert refused.value.param == "messages"


def test_max_tokens_is_cut_to_the_room_that_is_left() -> None:
    fitted = validate(request((1,) * 60, max_tokens=2**63, min_tokens=50), INFO)
    assert (fitted.sampling.max_tokens, fitted.sampling.min_tokens) == (4, 4)
    assert validate(request((1,) * 63, max_tokens=1), INFO).sampling.max_tokens == 1


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_that_leaves_no_room_gets_the_canonical_sentence(length: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"This model's maximum context length is 64 tokens") as refused:
        validate(request((1,) * length), INFO, param="messages")
    assert (refused.value.param, refused.value.code) == ("messages", "context_length_exceeded")


def test_values_with_an_equal_meaning_are_made_plain() -> None:
    fitted = validate(request(temperature=5e-324, top_k=100), INFO).sampling
    assert (fitted.temperature, fitted.top_k) == (0.0, 0)


@pytest.mark.parametrize("field", ["id", "group", "cache_salt"])
def test_text_that_no_encoding_can_carry_is_refused(field: str) -> None:
    fields: dict[str, Any] = {field: "\udfff"}
    with pytest.raises(InvalidRequest) as refused:
        validate(replace(request(), **fields), INFO)
    assert refused.value.param == field


@pytest.mark.parametrize("priority", [2**63, 0.5, True])
def test_priority_must_fit_a_message(priority: int) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        validate(replace(request(), priority=priority), INFO)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("enabled", value) for value in (1, "true", None)),
        *(("report", value) for value in (0, None)),
        *(("trace", value) for value in (1, "yes")),
        *(("max_draft", value) for value in (-1, 1025, 2.0, "3", True)),
    ],
)
def test_speculation_is_checked_by_name(field: str, value: Any) -> None:
    asked = SpeculationParams(**{field: value})
    with pytest.raises(InvalidRequest, match=rf"^speculation\.{field} must") as refused:
        validate(replace(request(), speculation=asked), INFO)
    assert refused.value.param == f"speculation.{field}"


@pytest.mark.parametrize("most", [None, 0, 4, 1024])
def test_a_model_without_a_drafter_takes_any_bound(most: int | None) -> None:
    asked = replace(request(), speculation=SpeculationParams(max_draft=most, report=True))
    assert validate(asked, INFO) == asked


def test_what_bans_every_token_is_refused() -> None:
    everything = tuple((token,) for token in range(100))
    with pytest.raises(InvalidRequest, match="ban every token"):
        validate(request(bad_words=everything), INFO)
    with pytest.raises(InvalidRequest, match="ban every token"):
        validate(request(allowed_token_ids=(5, 6), bad_words=((5,), (6,))), INFO)
    with pytest.raises(InvalidRequest, match="ban every token"):
        validate(request(allowed_token_ids=(99, 7), stop_token_ids=(7,), min_tokens=1), INFO)
    validate(request(allowed_token_ids=(99,), min_tokens=1, ignore_eos=True), INFO)
    validate(request(allowed_token_ids=(5,), bad_words=((5, 5),)), INFO)


def test_what_a_grammar_can_not_go_with_is_refused() -> None:
    grammar = Grammar("regex", "a+")
    validate(request(grammar=grammar, min_tokens=3, bad_words=((5,),), stop_token_ids=(4,)), INFO)
    for param, change in (("ignore_eos", {"ignore_eos": True}), ("allowed_token_ids", {"allowed_token_ids": (1,)})):
        with pytest.raises(InvalidRequest, match="structured output") as error:
            validate(request(grammar=grammar, **change), INFO)
        assert error.value.param == param
    denoising = DiffusionInfo(DiffusionSpec("full", 98), DiffusionParams(), ())
    with pytest.raises(InvalidRequest, match="denoise") as error:
        validate(request(grammar=grammar), replace(INFO, diffusion=denoising))
    assert error.value.param == "structured_outputs"
