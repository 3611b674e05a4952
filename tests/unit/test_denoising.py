"""What a request's `diffusion` comes to, and every way in which it can be wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.diffusion import DiffusionParams
from engine.errors import InvalidRequest
from engine.types import ModelInfo, Request, SamplingParams, SpeculationParams
from engine.validate import validate
from tests.denoisers import BLOCK_INFO, DUAL_INFO, FULL_INFO, MASK, STOP

PLAIN = ModelInfo("m", "m", 64, 100, (99, STOP), 4, 32, 0, "none", "masked_diffusion")
FULL = replace(PLAIN, diffusion=FULL_INFO)
BLOCK = replace(PLAIN, diffusion=BLOCK_INFO)
DUAL = replace(PLAIN, diffusion=DUAL_INFO)


def fit(asked: DiffusionParams, info: ModelInfo = FULL, tokens: int = 16, prompt: int = 4, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, **sampling)
    return validate(Request("r", (1,) * prompt, params, diffusion=asked), info)


def settled(asked: DiffusionParams, info: ModelInfo = FULL, **fields: Any) -> DiffusionParams:
    return fit(asked, info, **fields).diffusion


def refusal(asked: DiffusionParams, info: ModelInfo = FULL, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        fit(asked, info, **fields)
    assert refused.value.message.startswith(f"{refused.value.param} ")
    return refused.value


def ask(rule: str = "", **fields: Any) -> DiffusionParams:
    knobs = tuple((name, fields.pop(name)) for name in ("threshold", "factor", "delta") if name in fields)
    return DiffusionParams(rule=rule, knobs=knobs, **fields)


@pytest.mark.parametrize(
    ("info", "asked", "expected"),
    [
        (FULL, ask(), ask("threshold", threshold=0.9, cache="none", block_length=8, canvas=16)),
        (FULL, ask("frechet", cache="dual", report=True),
         ask("frechet", delta=0.25, cache="dual", block_length=8, canvas=16, report=True)),
        (FULL, ask(threshold=1), ask("threshold", threshold=1.0, cache="none", block_length=8, canvas=16)),
        (FULL, ask("frechet", delta=-0.5, block_length=5),
         ask("frechet", delta=-0.5, cache="none", block_length=5, canvas=20)),
        (FULL, ask("quota", steps=3, canvas=24), ask("quota", cache="none", block_length=8, canvas=24, steps=3)),
        (FULL, ask("quota"), ask("quota", cache="none", block_length=8, canvas=16)),
        (BLOCK, ask(), ask("dynamic", threshold=0.85, cache="block", block_length=4, canvas=16)),
        (BLOCK, ask("threshold", block_length=4, cache="dual"),
         ask("threshold", threshold=0.9, cache="dual", block_length=4, canvas=16)),
        (DUAL, ask(), ask("threshold", threshold=0.9, cache="dual", block_length=8, canvas=16, drafter_steps=16,
                          verify="confidence", verify_threshold=0.9)),
        (DUAL, ask(drafter_steps=3, verify="both", verify_threshold=1),
         ask("threshold", threshold=0.9, cache="dual", block_length=8, canvas=16, drafter_steps=3, verify="both",
             verify_threshold=1.0)),
    ],
)  # fmt: skip
def test_what_is_left_open_is_the_servers_or_the_rules(
    info: ModelInfo, asked: DiffusionParams, expected: DiffusionParams
) -> None:
    found = settled(asked, info)
    assert found == expected
    assert all(type(value) is float for _, value in found.knobs)
    assert settled(found, info) == found


def test_a_namesakes_knob_is_another_one() -> None:
    """The server's threshold is that of its own rule, not of all rules with one."""
    own = replace(FULL_INFO, defaults=replace(FULL_INFO.defaults, knobs=(("threshold", 0.7),)))
    info = replace(PLAIN, diffusion=own)
    assert settled(ask(), info).knobs == settled(ask("threshold"), info).knobs == (("threshold", 0.7),)
    assert settled(ask("dynamic"), info).knobs == (("threshold", 0.85),)


@pytest.mark.parametrize(
    ("prompt", "tokens", "canvas", "expected"),
    [
        (4, 1, 0, (8, 1)),
        (4, 8, 0, (8, 8)),
        (4, 9, 0, (16, 9)),
        (4, 9, 20, (24, 9)),  # a canvas of one's own is rounded up too
        (4, 9, 9, (16, 9)),
        (4, 41, 0, (44, 41)),  # as far as a step has room
        (4, 44, 44, (44, 44)),
    ],
)
def test_the_canvas_is_what_max_tokens_needs(prompt: int, tokens: int, canvas: int, expected: tuple[int, int]) -> None:
    found = fit(ask(canvas=canvas), FULL, tokens=tokens, prompt=prompt)
    assert (found.diffusion.canvas, found.sampling.max_tokens) == expected


def test_an_answer_ends_with_the_context() -> None:
    whole = replace(BLOCK, max_model_len=67)  # 16 blocks of 4 are run whole, and then there is no room for another
    for info, length in ((replace(FULL, max_model_len=32), 20), (BLOCK, 52), (whole, 52)):
        found = fit(ask(), info, tokens=10**9, prompt=12, min_tokens=60)
        assert (found.diffusion.canvas, found.sampling.max_tokens, found.sampling.min_tokens) == (length,) * 3


@given(st.integers(1, 63), st.integers(1, 70), st.integers(0, 70), st.integers(1, 20))
def test_what_passes_fits(prompt: int, tokens: int, canvas: int, block: int) -> None:
    asked = ask(canvas=canvas, block_length=block)
    try:
        found = fit(asked, FULL, tokens=tokens, prompt=prompt)
    except InvalidRequest as error:
        assert error.param in ("max_tokens", "diffusion.canvas", "prompt")
        assert (canvas and canvas < tokens) or prompt + (canvas or min(tokens, 64 - prompt)) > 48
    else:
        own = found.diffusion.canvas
        assert found.sampling.max_tokens == min(tokens, 64 - prompt) <= own <= 48 - prompt
        assert own % block == 0 or own == 48 - prompt
        assert own - (canvas or tokens) < block


@pytest.mark.parametrize(
    ("info", "asked", "fields", "param", "text"),
    [
        (FULL, ask(canvas=15), {}, "diffusion.canvas", "must be at least max_tokens, which is 16"),
        (FULL, ask(canvas=61), {}, "diffusion.canvas",
         "must be at most 60: the context of 64 tokens holds the prompt's 4 too"),
        (FULL, ask(canvas=45), {}, "diffusion.canvas",
         "must be at most 44: a canvas of 45 tokens behind the prompt's 4 is more than the 48 that one step of this"
         " server takes"),
        (FULL, ask(), {"tokens": 45}, "max_tokens",
         "must be at most 44: a canvas of 45 tokens behind the prompt's 4 is more than the 48 that one step of this"
         " server takes"),
        (FULL, ask(), {"tokens": 10**9}, "max_tokens",
         "must be at most 44: a canvas of 60 tokens behind the prompt's 4 is more than the 48 that one step of this"
         " server takes"),
        (DUAL, ask(verify="masked_copy"), {"tokens": 37}, "max_tokens",  # a copy of a block stands behind it
         "must be at most 36: a canvas of 37 tokens behind the prompt's 4 is more than the 48 that one step of this"
         " server takes"),
        (FULL, ask("quota", steps=17), {}, "diffusion.steps", "must be at most 16, the tokens of the canvas"),
        (FULL, ask(block_length=1025), {}, "diffusion.block_length", "must be between 1 and 1024"),
        (BLOCK, ask(block_length=8), {}, "diffusion.block_length", "must be 4 here: this model has no other"),
        (DUAL, ask(drafter_steps=1025), {}, "diffusion.drafter_steps", "must be at most 1024"),
        (DUAL, ask(verify_threshold=1.01), {}, "diffusion.verify_threshold", "must be between 0 and 1"),
        (DUAL, ask(verify_threshold=math.nan), {}, "diffusion.verify_threshold", "must be between 0 and 1"),
        *((FULL, ask("threshold", threshold=value), {}, "diffusion.threshold", "must be a number between 0 and 2")
          for value in (-0.1, 2.1, math.nan, math.inf, "0.5", True, None, 10**400)),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_what_would_do(
    info: ModelInfo, asked: DiffusionParams, fields: dict[str, Any], param: str, text: str
) -> None:
    error = refusal(asked, info, **fields)
    assert (error.param, error.message, error.code) == (param, f"{param} {text}", None)


@pytest.mark.parametrize(("prompt", "where"), [(48, "steps take 48 tokens"), (63, "steps take 48 tokens")])
def test_a_prompt_that_leaves_no_room_for_a_canvas(prompt: int, where: str) -> None:
    error = refusal(ask(), FULL, prompt=prompt, tokens=1)
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert error.message == f"prompt has {prompt} tokens, which leaves no room for an answer: this server's {where}"
    assert fit(ask(), FULL, prompt=47, tokens=1).diffusion.canvas == 1
    error = refusal(ask(verify="masked_copy"), replace(DUAL, max_model_len=32), prompt=24, tokens=1)
    assert "this server's context holds 32 tokens" in error.message
    error = refusal(ask(), replace(BLOCK, max_model_len=67), prompt=64)
    assert "this server's context holds 64 tokens" in error.message


@pytest.mark.parametrize(
    ("info", "asked", "field", "text"),
    [
        (FULL, ask("frechet", threshold=0.9), "threshold",
         "is no knob of the rule 'frechet', which has delta; it belongs to threshold and dynamic"),
        (FULL, ask(delta=0.1), "delta",
         "is no knob of the rule 'threshold', which has threshold; it belongs to frechet"),
        (FULL, ask("quota", factor=1), "factor",
         "is no knob of the rule 'quota', which has none; it belongs to factor"),
        (FULL, DiffusionParams(knobs=(("x" * 99, 1),)), "x" * 63 + "…",
         "is no knob of the rule 'threshold', which has threshold"),
        (FULL, ask(steps=4), "steps", "does nothing with the rule 'threshold', which has no schedule"),
        (FULL, ask(drafter_steps=4), "drafter_steps", "does nothing here: this model's answers are not drafted and"
         " verified"),
        (FULL, ask(verify="trust"), "verify", "does nothing here: this model's answers are not drafted and verified"),
        (BLOCK, ask(verify_threshold=0.5), "verify_threshold",
         "does nothing here: this model's answers are not drafted and verified"),
        (DUAL, ask(verify="exact", verify_threshold=0.5), "verify_threshold",
         "does nothing where `verify` is 'exact'"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(info: ModelInfo, asked: DiffusionParams, field: str, text: str) -> None:
    error = refusal(asked, info)
    assert error.message == f"diffusion.{field} {text}"
    assert (error.param, error.code) == (f"diffusion.{field}", "unsupported_parameter")


@pytest.mark.parametrize("name", ["Threshold", "low_confidence", "x" * 500, "\ud800"])
def test_unknown_names_hear_of_the_known_ones(name: str) -> None:
    for info, field, known in (
        (FULL, "rule", "quota, threshold, factor, frechet, dynamic"),
        (FULL, "cache", "none, prefix, dual"),
        (BLOCK, "cache", "block, dual"),
        (DUAL, "cache", "dual"),
        (DUAL, "verify", "trust, exact, confidence, both, masked_copy"),
    ):
        error = refusal(DiffusionParams(**{field: name}), info)  # type: ignore[arg-type]
        assert error.param == f"diffusion.{field}"
        assert error.message.endswith(f"is not offered by this model; it has {known}")
        assert len(error.message) < 200 and error.message.encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rule", value) for value in (None, 3)),
        *((name, value) for name in ("block_length", "canvas", "steps", "drafter_steps")
          for value in (-1, 1.0, True, None, "8")),
        *(("verify_threshold", value) for value in (True, "0.5", None)),
        *(("report", value) for value in (1, None)),
        *(("knobs", value) for value in ([("threshold", 0.5)], (0.5,), (("threshold",),), {"threshold": 0.5})),
    ],
)  # fmt: skip
def test_types_are_checked_by_name(field: str, value: Any) -> None:
    error = refusal(DiffusionParams(**{field: value}), DUAL)
    assert error.param == f"diffusion.{field}" and " must be " in error.message


def test_a_knob_is_given_once() -> None:
    error = refusal(DiffusionParams(knobs=(("threshold", 0.5), ("threshold", 0.6))))
    assert error.message == "diffusion.threshold is given twice"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (ask("threshold"), "rule"),
        (ask(delta=0.1), "delta"),
        (ask(canvas=64), "canvas"),
        (ask(report=True), "report"),
        (ask(verify_threshold=0.5), "verify_threshold"),
        (DiffusionParams(knobs=(("y" * 99, 1),)), "y" * 63 + "…"),
    ],
)
def test_an_autoregressive_model_takes_none_of_it(asked: DiffusionParams, field: str) -> None:
    error = refusal(asked, PLAIN)
    assert error.message == f"diffusion.{field} does nothing here: this model is autoregressive"
    assert error.code == "unsupported_parameter"
    assert settled(ask(), PLAIN) == ask()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"presence_penalty": 0.5}, "it counts the tokens before a token"),
        ({"frequency_penalty": -0.5}, "it counts the tokens before a token"),
        ({"repetition_penalty": 1.1}, "it counts the tokens before a token"),
        ({"bad_words": ((5,), (6, 7))}, "may hold only words of one token here"),
        ({"prompt_logprobs": 0}, "no probability of a token given those before it alone"),
    ],
)
def test_what_needs_an_order_is_refused_by_name(fields: dict[str, Any], text: str) -> None:
    for info in (FULL, BLOCK):
        error = refusal(ask(), info, **fields)
        assert ([error.param], error.code) == ([*fields], "unsupported_parameter")
        assert text in error.message
    fit(ask(), PLAIN, **fields)


def test_the_rest_of_sampling_is_fine() -> None:
    found = fit(
        ask(), temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3, min_tokens=4, logprobs=5, stop=("x",),
        stop_token_ids=(7,), logit_bias=((5, 1.0),), bad_words=((5,),), allowed_token_ids=(1, 2, MASK), ignore_eos=True,
    )  # fmt: skip
    assert found.diffusion == settled(ask())


def test_drafting_is_of_no_use() -> None:
    request = Request("r", (1,), SamplingParams(8), speculation=SpeculationParams(max_draft=3))
    for wish, param in (
        (SpeculationParams(max_draft=3), "max_draft"),
        (SpeculationParams(verifier="strict"), "verifier"),
    ):
        with pytest.raises(InvalidRequest, match="does nothing here") as refused:
            validate(replace(request, speculation=wish), FULL)
        assert refused.value.param == f"speculation.{param}"
    for fine in (SpeculationParams(enabled=False, report=True, trace=True), SpeculationParams(max_draft=0)):
        validate(replace(request, speculation=fine), FULL)


def test_the_mask_can_neither_be_given_nor_drawn() -> None:
    request = Request("r", (1, 2, MASK, 3), SamplingParams(8))
    with pytest.raises(InvalidRequest) as refused:
        validate(request, FULL, param="messages")
    assert refused.value.message.startswith(f"messages holds the token {MASK} at index 2, the mask ")
    assert refused.value.param == "messages"
    validate(request, PLAIN)
    assert refusal(ask(), allowed_token_ids=(MASK,)).param == "allowed_token_ids"
    for fields in ({"bad_words": ((5,),)}, {"min_tokens": 1, "stop_token_ids": (5,)}):
        with pytest.raises(InvalidRequest, match="together ban every token"):
            fit(ask(), allowed_token_ids=(MASK, 5), **fields)
    with pytest.raises(InvalidRequest, match="together ban every token"):
        fit(ask(), allowed_token_ids=(MASK, STOP), min_tokens=1)
