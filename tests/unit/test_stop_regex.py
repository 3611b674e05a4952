"""Stop patterns against Python's own, under any cut; what is refused; and answers that repeat themselves."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import pytest

from engine.errors import InvalidRequest
from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.repetition import RepetitionDetector
from engine.tokenizer.stop_regex import MAX_LINKS, PatternMatcher, compile_stop
from engine.tokenizer.stop_strings import StopMatcher
from engine.types import ModelInfo, Request, SamplingParams
from engine.validate import validate
from tests.server.fake_engine import make_tokenizer

ATOMS = ("a", "b", "c", ".", "[ab]", "[^a]", r"\d", r"\w", "[a-c]", r"\.", r"[\d.]", r"\x61", r"[]a]", r"\S", r"\n")
INFO = ModelInfo("x", "", 100, 1000, (), 16, 10, 0, "", "")


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    kind = rng.random()
    if depth > 3 or kind < 0.4:
        return rng.choice(ATOMS)
    if kind < 0.6:
        return random_pattern(rng, depth + 1) + random_pattern(rng, depth + 1)
    if kind < 0.75:
        return f"({random_pattern(rng, depth + 1)}|{random_pattern(rng, depth + 1)})"
    return f"(?:{random_pattern(rng, depth + 1)}){rng.choice(['*', '+', '?', '{2}', '{1,3}', '{2,}', '+?', '*?'])}"


def first_match(pattern: str, text: str) -> tuple[int, int] | None:
    """(end, length) of the match that ends first, of these the longest."""
    found = re.compile(pattern)
    for end in range(1, len(text) + 1):
        for start in range(end):
            if found.fullmatch(text, start, end):
                return end, end - start
    return None


def ours(pattern: str, text: str) -> tuple[int, int] | None:
    matcher = PatternMatcher(compile_stop(pattern))
    for end, char in enumerate(text, 1):
        if length := matcher.feed(char):
            return end, length
    return None


@pytest.mark.parametrize("seed", range(4))
def test_the_first_match_is_that_of_python(seed: int) -> None:
    rng, tried = random.Random(seed), 0
    for _ in range(500):
        pattern = random_pattern(rng)
        try:
            compile_stop(pattern)
        except ValueError as error:
            assert re.compile(pattern).match("") or "too large" in str(error), pattern
            continue
        text = "".join(rng.choice("abcA1.\n") for _ in range(rng.randrange(12)))
        assert ours(pattern, text) == first_match(pattern, text), (pattern, text)
        tried += 1
    assert tried > 300


@pytest.mark.parametrize(
    "pattern, text",
    [("(?i)StOp[a-c]", "xstopB"), ("(?s)a.b", "a\nb"), (r"é|\u00fc+", "xü"), (r"a{0,2}b", "aab"), ("}", "}")],
)
def test_flags_and_letters(pattern: str, text: str) -> None:
    assert ours(pattern, text) == first_match(pattern, text) is not None


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("", "1 to 256 characters"),
        ("x" * 257, "1 to 256 characters"),
        ("(", "ends too early|not closed"),
        ("(a", "not closed"),
        ("a)", "too many"),
        ("[a", "ends too early"),
        ("\\", "ends too early"),
        ("*a", "nothing before it"),
        ("a**", "two quantifiers"),
        ("a{3,2}", "wrong way round"),
        ("[z-a]", "bad range"),
        (r"[a-\d]", "bad range"),
        (r"\x4", "bad"),
        (r"\Uffffffff", "bad"),
        (r"(a)\1", "not supported"),
        (r"\b", "not supported"),
        ("^a", "anchor"),
        ("a$", "anchor"),
        ("(?=a)", "not supported"),
        ("(?P<n>a)", "not supported"),
        ("a*", "empty text"),
        ("(a|)", "empty text"),
        ("((a{99}){99}){99}", "too large"),
        ("(?:a?){60}a{60}", "too large"),
        ("(" * 20 + "a" + ")" * 20, "inside each other"),
    ],
)
def test_what_is_no_pattern_of_ours_says_why(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compile_stop(pattern)
    request = Request("x", (1,), SamplingParams(5, stop_regex=(pattern,)))
    with pytest.raises(InvalidRequest, match=r"stop_regex (has|must)") as found:
        validate(request, INFO)
    assert found.value.param == "stop_regex"


@pytest.mark.parametrize("pattern", ["(a+)+b", "(?:a|aa)*b", "(x+x+)+y", ".*.*.*=.*", "(.*a){9}b", "[a-z]{90}z"])
def test_no_pattern_is_slow(pattern: str) -> None:
    """The steps of one character are bounded by the links of the automaton, whatever the text."""
    automaton = compile_stop(pattern)
    assert sum(map(len, automaton.links)) + len(automaton.first) <= MAX_LINKS
    matcher = PatternMatcher(automaton)
    assert not any(matcher.feed(char) for char in "a" * 3000)


def cut(text: str, stops: Sequence[str], patterns: Sequence[str], pieces: Sequence[str]) -> tuple[str, int, str] | None:
    matcher, read = StopMatcher(stops, patterns), 0
    for piece in pieces:
        if (found := matcher.feed(piece)) is not None:
            return text[: read + found.end], found.length, found.stop
        read += len(piece)
        assert matcher.held <= read
    return None


def test_strings_and_patterns_together_under_any_cut() -> None:
    rng, hits = random.Random(5), 0
    for _ in range(300):
        text = "".join(rng.choice("abc") for _ in range(15))
        stops, patterns = ["cab", "bb"], ["a[bc]+a", "c{3}"]
        whole = cut(text, stops, patterns, [text])
        assert whole == cut(text, stops, patterns, list(text))
        ends = [first_match(re.escape(stop), text) for stop in stops] + [first_match(one, text) for one in patterns]
        best = min((end for end in ends if end is not None), key=lambda pair: (pair[0], -pair[1]), default=None)
        assert (whole is None) == (best is None)
        if whole is not None and best is not None:
            assert (len(whole[0]), whole[1]) == best
            hits += 1
    assert hits > 200


def streamed(text: str, sampling: SamplingParams) -> tuple[str, str | None, int]:
    """The answer, what stopped it, and its tokens, from a tokenizer with about one token for each byte."""
    tokenizer = make_tokenizer()
    detokenizer, told, count = Detokenizer(tokenizer, sampling), "", 0
    for token in tokenizer.encode(text, add_special_tokens=False):
        piece = detokenizer.push([token])
        told, count = told + piece.text, count + piece.num_tokens
        if piece.stop is not None:
            return told, piece.stop, count
    return told + detokenizer.push([], final=True).text, None, count


def test_answers_end_before_the_match() -> None:
    text = "Wörld: 12 or 345 or so"
    assert streamed(text, SamplingParams(99, stop_regex=(r"\d{3}",))) == ("Wörld: 12 or ", r"\d{3}", 17)
    kept = SamplingParams(99, stop_regex=(r"\d{3}",), include_stop_str_in_output=True)
    assert streamed(text, kept) == ("Wörld: 12 or 345", r"\d{3}", 17)
    assert streamed(text, SamplingParams(99, stop_regex=("ö.*5",), stop=("so",))) == ("W", "ö.*5", 17)
    both = SamplingParams(99, stop_regex=("l[d]:",), stop=("ld:",))
    assert streamed(text, both) == ("Wör", "ld:", 7), "of two that match the same text, the string is told"
    assert streamed(text, SamplingParams(99, stop_regex=("ö.*9",))) == (text, None, 23), "what was held comes at last"
    assert streamed(text, SamplingParams(99, stop_regex=("o[a-z]",), min_tokens=18))[0] == "Wörld: 12 or 345 or s"[:17]


@pytest.mark.parametrize("seed", range(4))
def test_repetition_against_a_plain_search(seed: int) -> None:
    rng, ended = random.Random(seed), 0
    for _ in range(400):
        least, count = rng.randrange(1, 4), rng.randrange(2, 5)
        most = least + rng.randrange(4)
        detector, tokens = RepetitionDetector(least, most, count), []
        for _ in range(30):
            tokens.append(rng.randrange(3))
            expected = any(
                len(tokens) >= size * count and tokens[-size * count :] == tokens[-size:] * count
                for size in range(least, most + 1)
            )
            assert detector.push(tokens[-1]) == expected, (tokens, least, most, count)
            if expected:
                ended += 1
                break
    assert ended > 150


def test_an_answer_that_repeats_itself_ends_with_the_last_of_them() -> None:
    sampling = SamplingParams(99, repetition=(2, 4, 3))
    assert streamed("xyabcabcabcabc", sampling) == ("xyabcabcabc", "repetition_detected", 11)
    assert streamed("aaaaaaaaa", sampling) == ("aaaaaa", "repetition_detected", 6)
    late = SamplingParams(99, repetition=(2, 4, 3), min_tokens=12)
    assert streamed("xyabcabcabcabcabc", late) == ("xyabcabcabcab", "repetition_detected", 13)
    assert streamed("ababcab", sampling)[1] is None
