"""Incremental text: its pieces add up to the decoded whole, and stop strings cut it wherever they fall."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.hub.gguf_convert import write_tokenizer
from engine.hub.gguf_reader import read_gguf
from engine.tokenizer.detokenizer import Detokenizer, Piece
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import SamplingParams
from tests.unit.demo_tokenizer import demo_tokenizer
from tests.unit.gguf_files import write_gguf
from tests.unit.test_gguf_tokenizer import SPM, SPM_TOKENS

EMOJI = "\U0001f469\u200d\U0001f680"


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece with a space before the first word, and byte tokens."""
    folder = tmp_path_factory.mktemp("spm")
    keys = {f"tokenizer.{key}": value for key, value in SPM.items()}
    write_tokenizer(read_gguf(write_gguf(folder / "m.gguf", keys=keys)), folder)
    return Tokenizer.load(folder)


def _params(**options: object) -> SamplingParams:
    return SamplingParams(max_tokens=1000, **options)  # type: ignore[arg-type]


def _stream(
    tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams, widths: Sequence[int] = (1,), **options: bool
) -> tuple[str, list[int], str | None, int]:
    """All pushes joined: text, offsets, stop, kept tokens. The last push is final and has the `options`."""
    detokenizer = Detokenizer(tokenizer, params)
    pieces: list[Piece] = []
    start = turn = 0
    while start < len(ids) or not pieces:
        width = widths[turn % len(widths)]
        last = start + width >= len(ids)
        pieces.append(detokenizer.push(ids[start : start + width], final=last, **(options if last else {})))
        start, turn = start + width, turn + 1
    offsets = [offset for piece in pieces for offset in piece.offsets]
    return "".join(p.text for p in pieces), offsets, pieces[-1].stop, sum(p.num_tokens for p in pieces)


IDS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 49151), st.just(49152)), max_size=25)
WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(ids=IDS, widths=WIDTHS, skip=st.booleans())
def test_pieces_add_up_to_the_decoded_whole(ids: list[int], widths: list[int], skip: bool) -> None:
    tokenizer = demo_tokenizer()
    text, offsets, _, kept = _stream(tokenizer, ids, _params(skip_special_tokens=skip), widths)
    assert text == tokenizer.decode(ids, skip) and kept == len(ids)
    if "\ufffd" not in text:
        visible = [b"" if skip and tokenizer.is_special(i) else tokenizer.token_bytes(i) for i in ids]
        starts = [len(b"".join(visible[:i]).decode(errors="ignore")) for i in range(len(ids))]
        assert offsets == starts


@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"]), max_size=30))
def test_encoded_text_streams_back_without_replacement_characters(text: str) -> None:
    tokenizer = demo_tokenizer()
    detokenizer = Detokenizer(tokenizer, _params())
    seen = ""
    for token_id in tokenizer.encode(text):
        piece = detokenizer.push([token_id]).text
        assert text.startswith(seen + piece)
        seen += piece
    assert seen == text


def test_sentencepiece_pieces_add_up_too(spm: Tokenizer) -> None:
    chosen = random.Random(0)
    for _ in range(300):
        ids = [chosen.choice([chosen.randrange(3, 259), chosen.randrange(len(SPM_TOKENS))]) for _ in range(12)]
        for skip in (True, False):
            assert _stream(spm, ids, _params(skip_special_tokens=skip), (1, 3))[0] == spm.decode(ids, skip)


def test_the_first_space_is_dropped_at_the_start_of_a_text_only(spm: Tokenizer) -> None:
    ids = [SPM_TOKENS.index("\u2581hello")] * 2
    assert _stream(spm, ids, _params())[:2] == ("hello hello", [0, 5])
    for prompt, expected in (([1], "hello"), ([1, ids[0]], " hello")):
        assert Detokenizer(spm, _params(), prompt).push(ids[:1]).text == expected


def test_incomplete_characters_wait_and_an_invalid_tail_is_flushed() -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode(EMOJI)
    assert len(ids) > 3
    detokenizer = Detokenizer(tokenizer, _params())
    texts = [detokenizer.push([i]).text for i in ids[:-1]]
    assert "" in texts and "\ufffd" not in "".join(texts)
    assert detokenizer.push([], final=True).text == "\ufffd"
    assert _stream(tokenizer, ids, _params())[0] == EMOJI


@pytest.mark.parametrize("widths", [(1,), (2,), (3, 1), (100,)])
@pytest.mark.parametrize(
    ("stops", "expected", "matched"),
    [
        (("world",), "Hello ", "world"),
        ((" wor",), "Hello", " wor"),
        (("o",), "Hell", "o"),
        (("ld! Th", "!"), "Hello world", "!"),  # the one that ends first
        (("lo wor", "wor", "r"), "Hel", "lo wor"),  # of those that end together the longest
        (("r", "wor", "lo wor"), "Hel", "lo wor"),
        (("worlds", "Hello world? "), "Hello world! That is all \U0001f642.", None),
        (("\U0001f642",), "Hello world! That is all ", "\U0001f642"),
        (("all \U0001f642. And then some",), "Hello world! That is all \U0001f642.", None),
    ],
)
def test_stops_cut_the_text_wherever_tokens_end(
    widths: tuple[int, ...], stops: tuple[str, ...], expected: str, matched: str | None
) -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode("Hello world! That is all \U0001f642.")
    text, offsets, stop, kept = _stream(tokenizer, ids, _params(stop=stops), widths)
    assert (text, stop) == (expected, matched)
    assert kept == len(offsets) == _first_token_with(tokenizer, ids, expected + (matched or ""))
    included = _stream(tokenizer, ids, _params(stop=stops, include_stop_str_in_output=True), widths)
    assert included[0] == expected + (matched or "") and included[3] == kept


def _first_token_with(tokenizer: Tokenizer, ids: list[int], text: str) -> int:
    return next(n for n in range(1, len(ids) + 1) if tokenizer.decode(ids[:n]).startswith(text))


@given(
    text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), widths=WIDTHS
)
def test_stops_agree_with_a_plain_search(text: str, stops: list[str], widths: list[int]) -> None:
    tokenizer = demo_tokenizer()
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))] if stops else []
    expected, matched = text, None
    if ends:
        matched = max((s for s in stops if text[: ends[0]].endswith(s)), key=len)
        expected = text[: ends[0]].removesuffix(matched)
    found = _stream(tokenizer, tokenizer.encode(text), _params(stop=tuple(stops)), widths)
    assert (found[0], found[2]) == (expected, matched)


def test_what_may_become_a_stop_is_held_back_and_released() -> None:
    tokenizer = demo_tokenizer()
    detokenizer = Detokenizer(tokenizer, _params(stop=("###END",)))
    pushes = ["a#", "##", "E", "x", "#", "##"]
    assert [detokenizer.push(tokenizer.encode(t)).text for t in pushes] == ["a", "", "", "###Ex", "", ""]
    assert detokenizer.push([], final=True).text == "###"
    eager = Detokenizer(tokenizer, _params(stop=("###END",), include_stop_str_in_output=True))
    assert [eager.push(tokenizer.encode(t)).text for t in ("a#", "##")] == ["a#", "##"]


def test_nothing_follows_a_stop() -> None:
    tokenizer = demo_tokenizer()
    detokenizer = Detokenizer(tokenizer, _params(stop=("b",)))
    first = detokenizer.push(tokenizer.encode("a b c d"))
    assert (first.text, first.stop, first.num_tokens, first.offsets) == ("a ", "b", 2, (0, 1))
    assert detokenizer.push(tokenizer.encode("more"), final=True) == Piece(stop="b")


@pytest.mark.parametrize(
    ("stop", "min_tokens", "expected", "tokens"),
    [
        ("x", 0, "", 1),
        ("x", 1, "x ", 2),
        ("x", 4, "x x x x ", 5),
        ("x", 5, "x x x x x", 5),
        ("x x x", 2, "", 3),  # it begins among the first tokens, but ends after them
        ("x x x", 3, "x ", 4),
    ],
)
def test_stops_are_not_looked_for_before_min_tokens(stop: str, min_tokens: int, expected: str, tokens: int) -> None:
    ids = demo_tokenizer().encode("x x x x x")
    assert len(ids) == 5
    for widths in ((1,), (5,)):
        text, _, _, kept = _stream(demo_tokenizer(), ids, _params(stop=(stop,), min_tokens=min_tokens), widths)
        assert (text, kept) == (expected, tokens)


@pytest.mark.parametrize(
    ("include", "skip", "expected"),
    [(False, True, "Hi"), (False, False, "Hi"), (True, True, "Hi"), (True, False, "Hi<|im_end|>")],
)
def test_the_token_that_ends_a_request_is_silent_unless_stops_are_included(
    include: bool, skip: bool, expected: str
) -> None:
    tokenizer = demo_tokenizer()
    params = _params(include_stop_str_in_output=include, skip_special_tokens=skip)
    text, _, stop, kept = _stream(tokenizer, [*tokenizer.encode("Hi"), 2], params, (4,), stop_token=True)
    assert (text, stop, kept) == (expected, None, 2)


def test_a_stop_string_before_the_terminal_token_wins() -> None:
    tokenizer = demo_tokenizer()
    found = _stream(tokenizer, [*tokenizer.encode("a b"), 2], _params(stop=("b",)), (9,), stop_token=True)
    assert found == ("a ", [0, 1], "b", 2)


def test_decoders_of_unknown_kind_are_decoded_in_windows() -> None:
    """WordPiece joins by what stands before: its pieces are right only when decoded together."""
    words = ["[UNK]", "hel", "##lo", "wor", "##ld", "!", "a"]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer, chosen = Tokenizer(backend), random.Random(0)
    for _ in range(100):
        ids = [chosen.randrange(1, len(words)) for _ in range(chosen.randrange(1, 15))]
        assert _stream(tokenizer, ids, _params(), (1, 2))[0] == tokenizer.decode(ids)
    assert tokenizer.decode([1, 2, 3, 4, 5]) == "hello world!"
