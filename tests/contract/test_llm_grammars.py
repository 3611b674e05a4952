"""Grammars offline: the same parameters, the same checks, no server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.llm import LLM
from engine.types import FinishReason, SamplingParams, SpeculationParams
from tests.tiny import save_tiny

CODES = Grammar("regex", "[a-f]{3}(-[0-9]{3}){2}")
PARAMS = SamplingParams(40, temperature=1.0, seed=3, grammar=CODES)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder, threads = save_tiny("llama", tmp_path_factory.mktemp("offline")), torch.get_num_threads()
    draft = {"drafter": "ngram", "max_draft": 4}
    with LLM(str(folder), memory="3MiB", threads=1, pipeline="speculative", draft=draft) as made:
        yield made
    torch.set_num_threads(threads)


def test_answers_have_their_form(llm: LLM) -> None:
    params = [replace(PARAMS, seed=seed) for seed in range(4)]
    answers = llm.generate(["one", "two", "three", "four"], params)
    for answer in answers:
        assert answer.finish is FinishReason.STOP and re.fullmatch(CODES.text, answer.text), answer.text
    assert len({answer.text for answer in answers}) == 4
    off = llm.generate(["one", "two", "three", "four"], params, SpeculationParams(enabled=False))
    assert [answer.token_ids for answer in off] == [answer.token_ids for answer in answers]


def test_stop_strings_cut_what_a_grammar_goes_on_with(llm: LLM) -> None:
    whole = llm.generate("one", PARAMS)[0].text
    cut = llm.generate("one", replace(PARAMS, stop=("-",)))[0]
    assert (cut.text, cut.finish, cut.stop_reason) == (whole.partition("-")[0], FinishReason.STOP, "-")
    assert llm.generate("one", replace(PARAMS, max_tokens=5))[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"allowed_token_ids": (1, 2)}, "allowed_token_ids"),
        ({"grammar": Grammar("regex", "(")}, "grammar"),
        ({"grammar": Grammar("json", '{"type": "fish"}')}, "grammar"),
        ({"grammar": Grammar("lark", 'start: "a" other')}, "grammar"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_runs(llm: LLM, change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        llm.generate(["one", "two"], [PARAMS, replace(PARAMS, **change)])  # type: ignore[arg-type]
    assert error.value.param == param
    assert llm.generate("one", PARAMS)[0].finish is FinishReason.STOP
