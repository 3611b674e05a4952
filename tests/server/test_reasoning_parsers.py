"""Thoughts told apart from answers, under any cut of the text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.thinking import FORMS, ThinkingForm
from engine.types import TokenEvent, Usage
from server.echo import EchoManner
from server.fragments import Fragment, Manner, Plain
from server.reasoning.manner import Thinking, ThinkingManner, ThoughtMeter

THINK = FORMS["think"]
LABELLED = FORMS["gemma4"]
FORM_LIST = sorted(set(FORMS.values()), key=repr)


def read(manner: Manner, pieces: Sequence[str]) -> tuple[str, str]:
    """(reasoning, content)"""
    parser = manner.parser()
    found: list[Fragment] = [fragment for piece in pieces for fragment in parser.feed(piece)]
    found += parser.end()
    assert all(fragment.text for fragment in found)
    thought, answer = ("".join(f.text for f in found if f.kind == kind) for kind in ("reasoning", "content"))
    return thought, answer


def manner(form: ThinkingForm, opened: bool = False, shown: bool = True, at_once: bool = False) -> ThinkingManner:
    return ThinkingManner(Thinking(form, opened), Plain(), shown, at_once)


@pytest.mark.parametrize("form", FORM_LIST, ids=lambda form: form.begin)
@pytest.mark.parametrize(
    "text, opened, thought, answer",
    [
        ("{begin}\n why?\n\n{end}\n\nBecause.", False, "why?", "Because."),
        ("  \n{begin}why{end}Because.\n", False, "why", "Because.\n"),
        ("why?\n{end}\n\nBecause.", True, "why?", "Because."),
        ("{begin}\nwhy{end}so", True, "why", "so"),  # begun once more, inside
        ("{begin}\n\n{end}\n\nso", False, "", "so"),
        ("{end}so", True, "", "so"),
        ("{begin}never ends \n", False, "never ends", ""),
        ("never ends", True, "never ends", ""),
        ("no thought, {begin} is a word{end}", False, "", "no thought, {begin} is a word{end}"),
        ("\n  no thought", False, "", "\n  no thought"),
        ("stray {end} end", False, "", "stray {end} end"),
        ("{begin}a{end}b{begin}c{end}d", False, "a", "b{begin}c{end}d"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_every_form(form: ThinkingForm, text: str, opened: bool, thought: str, answer: str) -> None:
    marks = {"begin": form.begin, "end": form.end}
    spelled, expected = text.format(**marks), (thought.format(**marks), answer.format(**marks))
    assert read(manner(form, opened), [spelled]) == expected
    assert read(manner(form, opened), list(spelled)) == expected
    assert read(manner(form, opened, at_once=True), list(spelled)) == expected
    assert read(manner(form, opened, shown=False), list(spelled)) == ("", expected[1])


def test_a_label_is_no_part_of_the_thought() -> None:
    for label in ("thought\n", "thought\n\n ", ""):
        assert read(manner(LABELLED), list(f"<|channel>{label}why<channel|>so")) == ("why", "so")
    assert read(manner(LABELLED), list("<|channel>thoughtful<channel|>so")) == ("thoughtful", "so")


WORDS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<",
        "</",
        "think",
        ">",
        " ",
        "\n",
        "a",
        "ü",
        "thought\n",
        "tho",
        "<|channel>",
        "<channel|>",
    ]
)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(WORDS, max_size=12), cuts=st.lists(st.integers(0, 60)), opened=st.booleans(), once=st.booleans())
def test_no_cut_changes_what_is_read(words: list[str], cuts: list[int], opened: bool, once: bool) -> None:
    text = "".join(words)
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    for form in (THINK, LABELLED):
        reading = manner(form, opened, at_once=once)
        assert read(reading, pieces) == read(reading, [text]) == read(reading, list(text))
        assert tokens_in_thought(form, opened, pieces) == tokens_in_thought(form, opened, [text])


def tokens_in_thought(form: ThinkingForm, opened: bool, pieces: Sequence[str]) -> int:
    """What is counted of a text with one token per character, whose events lag behind their tokens at will."""
    meter, usage, text = ThoughtMeter(Thinking(form, opened)), Usage(1, 1), "".join(pieces)
    meter.note(TokenEvent("x", (1,) * len(text), "", usage, offsets=tuple(range(len(text)))))
    for piece in pieces:
        meter.note(TokenEvent("x", (), piece, usage))
    meter.note(TokenEvent("x", (), "", usage, finish="stop"))  # type: ignore[arg-type]  # any end will do
    return meter.tokens


def test_marks_and_the_space_around_thoughts_are_not_counted() -> None:
    assert tokens_in_thought(THINK, False, ["<think>\nabc\n</think>\n\nxyz"]) == 4  # with the space before the end
    assert tokens_in_thought(THINK, True, ["abc</think>xyz"]) == 3
    assert tokens_in_thought(THINK, False, ["xyz <think>abc</think>"]) == 0
    assert tokens_in_thought(THINK, True, ["abc"]) == 3
    assert tokens_in_thought(THINK, True, ["<think>", "abc"]) == 3  # begun once more


def test_a_long_silence_inside_a_thought_takes_linear_time() -> None:
    pieces = ["<think>", *["\n"] * 200_000, "x", *[" "] * 200_000, "</think>", *["<"] * 100_000]
    assert read(manner(THINK), pieces) == ("x", "<" * 100_000)


def test_a_continued_message_may_be_told_from_its_beginning() -> None:
    assert read(EchoManner("Once ", Plain()), ["upon", " a"]) == ("", "Once upon a")
    assert read(EchoManner("<think>wh", manner(THINK)), ["y</think>", "so"]) == ("why", "so")
    assert read(EchoManner("Once", Plain()), []) == ("", "Once")
