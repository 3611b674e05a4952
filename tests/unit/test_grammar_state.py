"""A request's place in its grammar, against finite languages whose texts are all known; and what becomes of bounds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from engine.structured.grammars import KEPT, Grammars
from engine.structured.matcher import Matcher
from engine.structured.state import GrammarState
from engine.structured.vocabulary import Mask, Texts, Vocabulary
from tests.unit.demo_tokenizer import demo_tokenizer
from tests.unit.fake_worker import EOS, VOCAB_SIZE, write_checkpoint

WORDS = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"ca", b"", b"\xff", b"<think>", b"</think>", b"<eos>", b"<end>"]
THINK_BEGIN, THINK_END, ENDS = 9, 10, (11, 12)
TEXTS = ("a", "abc", "abcabc", "acb", "bca", "bcab", "cccc", "cbabca")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS, frozenset({9, 10, *ENDS}), ENDS, Texts(WORDS[:9]))


@pytest.fixture(scope="module")
def template(vocabulary: Vocabulary) -> Matcher:
    return Matcher.compile(Grammar("regex", "|".join(TEXTS)), vocabulary)


@pytest.fixture
def state(template: Matcher, vocabulary: Vocabulary) -> GrammarState:
    return GrammarState(template, vocabulary)


def ids(mask: Mask | None, size: int = len(WORDS)) -> set[int]:
    assert mask is not None
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return set(np.flatnonzero(bits).tolist())


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(WORDS[token] for token in tokens).decode()


def goes_on(text: str) -> bool:
    return any(one.startswith(text) for one in TEXTS)


def right(tokens: Sequence[int]) -> set[int]:
    """All tokens that may follow these, by the list of texts."""
    text = text_of(tokens)
    found = {token for token in range(7) if goes_on(text + text_of([token]))}
    return found | (set(ENDS) if text in TEXTS else set())


def walks(rng: random.Random, state: GrammarState) -> list[int]:
    tokens: list[int] = []
    while (mask := state.mask) is not None:
        tokens.append(rng.choice(sorted(ids(mask))))
        state.push(tokens[-1])
    return tokens


def test_whatever_the_masks_allow_is_a_text_of_the_language(template: Matcher, vocabulary: Vocabulary) -> None:
    seen = set()
    for seed in range(60):
        tokens = walks(random.Random(seed), GrammarState(template, vocabulary))
        assert tokens[-1] in ENDS
        seen.add(text_of(tokens[:-1]))
    assert seen == set(TEXTS)


def test_masks_allow_all_that_goes_on_where_nothing_is_forced(template: Matcher, vocabulary: Vocabulary) -> None:
    """Where only one text goes on, they may ask for its usual tokens."""
    for seed in range(40):
        state = GrammarState(template, vocabulary)
        tokens: list[int] = []
        rng = random.Random(seed)
        while True:
            wanted, forced = right(tokens), state.forced(9)
            got = ids(state.mask)
            if forced:
                assert got <= wanted and got
                assert goes_on(text_of(tokens + forced))
            else:
                assert got == wanted
            token = rng.choice(sorted(wanted))
            if token in ENDS:
                break
            tokens.append(token)
            state.push(token)
        assert not state.failure


def test_rows_ahead_are_those_of_states_that_went_there(template: Matcher, vocabulary: Vocabulary) -> None:
    """Chains and trees, behind legal tokens, illegal ones and ends."""
    rng = random.Random(4)
    for _ in range(150):
        state = GrammarState(template, vocabulary)
        told: list[int] = []
        for _ in range(rng.randrange(3)):
            told.append(rng.choice(sorted(right(told) - set(ENDS)) or [0]))
            state.push(told[-1])
        size = rng.randrange(9)
        tokens = [rng.choice([*range(7), 7, 8, 9, *ENDS, -1, 99]) if rng.random() < 0.3 else -2 for _ in range(size)]
        parents = [rng.randrange(-1, node) for node in range(size)] if rng.random() < 0.6 else None
        paths: list[list[int]] = []
        for node in range(size):
            parent = node - 1 if parents is None else parents[node]
            path = [] if parent < 0 else paths[parent]
            if tokens[node] == -2:  # one that may come, where there is one
                tokens[node] = rng.choice(sorted(right([*told, *path]) or [0])) if is_legal(told, path) else 0
            paths.append([*path, tokens[node]])
        before = state.mask
        masks, legal = state.masks(tokens, parents), state.legal(tokens, parents)
        for path, mask, is_good in zip(paths, masks, legal, strict=True):
            assert is_good == is_legal(told, path), (told, path)
            if not is_good or path[-1] in ENDS:
                assert mask is None
                continue
            alone = GrammarState(template, vocabulary)
            for token in [*told, *path]:
                alone.push(token)
            assert ids(mask) == ids(alone.mask) <= right([*told, *path])
        assert state.mask is before or np.array_equal(state.mask, before)  # type: ignore[arg-type]


def is_legal(told: Sequence[int], path: Sequence[int]) -> bool:
    if not path:
        return True
    *head, last = path
    return is_legal(told, head) and not set(head) & set(ENDS) and last in right([*told, *head])


def test_nothing_matters_behind_the_end(state: GrammarState) -> None:
    for token in (0, 11):
        state.push(token)
    for _ in range(2):
        assert (state.mask, state.masks([1, 2]), state.legal([1])) == (None, [None, None], [False])
        state.push(8)
    assert (state.failure, state.forced(3)) == ("", [])


def test_the_grammar_holds_from_behind_its_token(template: Matcher, vocabulary: Vocabulary) -> None:
    state = GrammarState(template, vocabulary, after=THINK_END)
    free = set(range(len(WORDS))) - set(ENDS)
    assert ids(state.mask) == free  # an answer that ended here would have no form
    masks = state.masks([8, THINK_END, 0, 11])
    assert [mask if mask is None else ids(mask) for mask in masks] == [free, right([]), right([0]), None]
    assert state.legal([7, 11, THINK_END]) == [True, False, False]
    assert state.legal([THINK_END, THINK_END]) == [True, False]
    for token in (5, 8, THINK_END, 0):
        state.push(token)
    assert ids(state.mask) == right([0]) and not state.failure


def test_it_may_begin_with_a_token_behind_which_it_is_free(template: Matcher, vocabulary: Vocabulary) -> None:
    def begun(*tokens: int) -> GrammarState:
        state = GrammarState(template, vocabulary, after=THINK_END, begin=THINK_BEGIN)
        for token in tokens:
            state.push(token)
        return state

    assert ids(begun().mask) == right([]) | {THINK_BEGIN}
    assert ids(begun(0).mask) == right([0]), "no thought any more"
    assert ids(begun(THINK_BEGIN).mask) == set(range(len(WORDS))) - set(ENDS)
    assert ids(begun(THINK_BEGIN, 2, 2, THINK_END).mask) == right([])
    state = begun()
    for tokens in ([0, 1], [THINK_BEGIN, 2, THINK_END, 0], [2, THINK_BEGIN]):
        drafted = [None if row is None else ids(row) for row in state.masks(tokens)]
        for size, row in enumerate(drafted, 1):
            if all(state.legal(tokens)[:size]):
                assert row == ids(begun(*tokens[:size]).mask)
        assert ids(state.mask) == right([]) | {THINK_BEGIN}, "nothing of it was committed"
    assert state.legal([2, THINK_BEGIN]) == [True, False]
    assert state.legal([THINK_BEGIN, 0, 0, 0, 0, THINK_END, 6]) == [True] * 6 + [False]


def test_a_token_that_may_not_come_ends_it(state: GrammarState) -> None:
    """As when somebody else decides: nothing may be drawn any more."""
    state.push(0)
    state.push(0)
    assert "no token" in state.failure and ids(state.mask) == set()
    assert ids(state.masks([0])[0]) == set()


def test_a_vocabulary_that_can_not_go_on_ends_it(vocabulary: Vocabulary) -> None:
    state = GrammarState(Matcher.compile(Grammar("regex", "a(xyz|xzy)"), vocabulary), vocabulary)
    state.push(0)
    assert ids(state.mask) == set() and "no text satisfies it" in state.failure


@dataclass
class Brittle:
    """A matcher of the library that meets a bound where it comes to a token, or makes a mask behind it."""

    inner: object
    at: int
    when: str
    told: list[int] = field(default_factory=list)
    broken: bool = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def deep_copy(self) -> Brittle:
        return Brittle(self.inner.deep_copy(), self.at, self.when, [*self.told])  # type: ignore[attr-defined]

    def consume_token(self, token: int) -> bool:
        self.broken |= self.when == "consume" and token == self.at
        self.told.append(token)
        return not self.broken and self.inner.consume_token(token)  # type: ignore[attr-defined]

    def rollback(self, count: int) -> None:
        del self.told[-count:]
        self.inner.rollback(count)  # type: ignore[attr-defined]

    def unsafe_compute_mask_ptr(self, at: int, size: int) -> None:
        self.broken |= self.when == "mask" and self.told[-1:] == [self.at]
        self.inner.unsafe_compute_mask_ptr(at, size)  # type: ignore[attr-defined]

    def is_error(self) -> bool:
        return self.broken

    def get_error(self) -> str:
        return "lexer error: a bound was met"


@pytest.mark.parametrize("when", ["consume", "mask"])
def test_a_bound_that_is_met_ahead_is_met_there_alone(template: Matcher, vocabulary: Vocabulary, when: str) -> None:
    brittle = Matcher(Brittle(template._inner, 2, when), vocabulary)  # type: ignore[arg-type]
    state = GrammarState(brittle, vocabulary)
    state.push(0)  # a: abc, acb
    rows = state.masks([1, 2, 0, 1])
    assert ids(rows[0]) == {2, 6} and [ids(row) for row in rows[1:]] == [set()] * 3  # nobody knows: nothing is drawn
    assert not state.failure and {1, 2, 4} <= ids(state.mask)
    assert ids(state.masks([1])[0]) == {2, 6}
    tree = state.masks([2, 1, 4], [-1, -1, -1])
    assert ids(tree[0]) == set() and not state.failure
    state.push(2)  # now it is met
    assert ids(state.mask) == set() and "too complex" in state.failure


# ---- vocabularies ------------------------------------------------------------------------------------------


def test_the_demo_tokenizer_spells_json() -> None:
    vocabulary = Vocabulary.of(demo_tokenizer(), 49152)
    grammar = Grammar("json", '{"type": "object", "properties": {"naïve": {"enum": ["😀", 1]}}, "required": ["naïve"]}')
    state = GrammarState(Matcher.compile(grammar, vocabulary), vocabulary)
    tokens = []
    while (mask := state.mask) is not None:
        tokens.append(max(ids(mask, 49152) - set(vocabulary.eos_ids), default=vocabulary.eos_ids[0]))
        state.push(tokens[-1])
        assert len(tokens) < 400
    assert demo_tokenizer().decode(tokens[:-1]).startswith("{") and tokens[-1] in vocabulary.eos_ids


def test_a_model_may_have_fewer_logits_than_its_tokenizer_tokens() -> None:
    vocabulary = Vocabulary.of(demo_tokenizer(), 300)
    state = GrammarState(Matcher.compile(Grammar("regex", "hello there"), vocabulary), vocabulary)
    written = b""
    while (mask := state.mask) is not None:
        token = min(ids(mask, 300) - set(vocabulary.eos_ids), default=vocabulary.eos_ids[0])
        written += demo_tokenizer().token_bytes(token) if token not in vocabulary.eos_ids else b""
        state.push(token)
    assert written == b"hello there" and not state.failure


def test_forced_texts_are_spelt_byte_by_byte_where_the_tokenizer_does_not() -> None:
    texts = Texts([b"x", b" x", b"xy"])
    assert texts.encode(b"xyx x") == [2, 0, 1]
    assert texts.encode(b"x?x") == [0]  # no token goes on
    assert Texts([]).encode(b"x") == []


def test_a_model_whose_answers_never_end_has_no_grammars() -> None:
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        Vocabulary([b"a"], frozenset(), (), Texts([b"a"]))
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        Vocabulary.of(demo_tokenizer(), 300, eos_ids=(300,))


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json", '{"type": "fish"}'), ("json", "["), ("regex", "("), ("lark", "a b"), ("ebnf", "x"), ("lark", "")],
)
def test_what_can_not_be_compiled_is_told(vocabulary: Vocabulary, kind: str, text: str) -> None:
    with pytest.raises(InvalidRequest):
        Matcher.compile(Grammar(kind, text), vocabulary)


# ---- a worker's grammars -----------------------------------------------------------------------------------


def test_grammars_are_compiled_once_and_kept_within_bounds(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(write_checkpoint(tmp_path), VOCAB_SIZE)  # type: ignore[arg-type]
    made: list[str] = []
    compile_ = Matcher.compile

    def counted(grammar: Grammar, vocabulary: Vocabulary) -> Matcher:
        made.append(grammar.text)
        return compile_(grammar, vocabulary)

    monkeypatch.setattr(Matcher, "compile", counted)
    first = Grammar("regex", "(yes|no)")
    for _ in range(3):
        grammars.prepare(first)
        state = grammars.state(Grammar("regex", "(yes|no)", after=65))
    assert made == ["(yes|no)"]
    assert ids(state.mask, VOCAB_SIZE) == set(range(VOCAB_SIZE)) - {EOS}
    assert ids(grammars.state(first).mask, VOCAB_SIZE) == {ord("y"), ord("n")}
    for number in range(KEPT):
        grammars.prepare(Grammar("regex", f"a{number}"))
    grammars.prepare(first)
    assert made.count("(yes|no)") == 2
    for number in range(4):  # much text
        grammars.prepare(Grammar("regex", f"(a{number}|{'x' * 400_000})"))
    assert len(grammars._kept) <= 2
    with pytest.raises(InvalidRequest):
        grammars.state(Grammar("regex", "("))


@pytest.mark.parametrize(
    ("regex", "first"),
    [
        (r"\d", "0123456789"),
        (r"[\d_]", "0123456789_"),
        (r"\\d", "\\"),
        (r"[a-c]\d", "abc"),
        (r"[\w--[0-9]]", "_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"),
    ],
)
def test_digits_and_words_are_ascii(tmp_path: object, regex: str, first: str) -> None:
    """As in the patterns of JSON schemas; the bytes that begin other scripts' digits are none."""
    grammars = Grammars(write_checkpoint(tmp_path), VOCAB_SIZE)  # type: ignore[arg-type]
    assert ids(grammars.state(Grammar("regex", regex)).mask, VOCAB_SIZE) == set(first.encode())
