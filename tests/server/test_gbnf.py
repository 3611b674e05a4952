"""GBNF becomes Lark that takes the same texts."""

from __future__ import annotations

import contextlib
import time

import pytest
from llguidance import LLMatcher

from engine.structured.vocabulary import Texts, Vocabulary
from server.gbnf import GrammarError, is_gbnf, lark_of

EOS = 256
BYTES = [*(bytes([byte]) for byte in range(256)), b"<eos>"]
VOCABULARY = Vocabulary(BYTES, frozenset((EOS,)), (EOS,), Texts(BYTES))
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
# nothing, or a little
ws ::= | " " | "\n" [ \t]{0,20}
"""
ARITHMETIC = """
root ::= expr
expr ::= term ([-+] term)*  # left to right
term ::= [0-9]+ | "(" expr ")"
"""


def takes(text: str, answer: str) -> bool:
    matcher = LLMatcher(VOCABULARY.handle, lark_of(text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(answer.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (JSON, ('{"a": [1, 2.5e3, "x\\n\\u00e9", {"b": null}]}', "{}", '{"é":-0.5} '), ('{"a": }', "[1]", '{"a":01}')),
        (ARITHMETIC, ("1", "(1+2)-33", "((7))"), ("", "1+", "()", "1*2")),
        ('root ::= "a" | [0-9]{2,} "x"?', ("a", "12", "123x"), ("1", "ax", "")),
        ('root ::= ("yes" | "no") "!"*', ("yes!!", "no"), ("yes?", "yesno")),
        ('root ::= "x" {3} "y"{,2} "z" { 1 , 2 }', ("xxxz", "xxxyyzz"), ("xxz", "xxxyyyz", "xxx")),
        ('root ::= "a" | "b"\n  | "c"\n', ("a", "b", "c"), ("d", "ab")),
        ('root ::= foo-bar "!"\nfoo-bar ::= "q" |\n', ("q!", "!"), ("q", "")),
        ("root ::= [^a\\n] .", ("bc", "]x", "é-"), ("ab", "b\n", "\nb")),
        (r'root ::= "\u00e9\U0001F600" "\x41\n/\t\""', ('é😀A\n/\t"',), ("é😀A",)),
        (r"root ::= [\u4e00-\u9fff^\]\-a/]", ("中", "]", "-", "a", "^", "/"), ("b", "é", ",")),
        ('root ::= "[" [a-] [-a] [+--] "^"', ("[--,^", "[aa+^"), ("[b-,^", "[---^"[:-1])),
        ('root ::= "(" root? ")"', ("()", "((()))"), ("", "(()")),
        ('root ::= "" ""', ("",), ("a",)),
        ("root ::= ( | [x]) ( [y] | )", ("", "x", "y", "xy"), ("yx",)),
    ],
)  # fmt: skip
def test_it_takes_what_the_gbnf_says(grammar: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    assert is_gbnf(grammar)
    assert [answer for answer in good if not takes(grammar, answer)] == []
    assert [answer for answer in bad if takes(grammar, answer)] == []


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('a ::= "x"', "needs a rule named 'root'"),
        ("root ::= foo", "'foo' is used and not defined"),
        ('root ::= "a"\nroot ::= "b"', "line 2 of the grammar: the rule 'root' is defined twice"),
        ('root ::= "a" ::= "b"', "'::=' can't stand here"),
        ('"a" root ::= "b"', "must start with its name"),
        ('root ::= "a', "line 1 of the grammar: '\"' can't stand here"),
        ("root ::= [a", "'[' can't stand here"),
        ("root ::= 'a'", "can't stand here"),
        ('root ::= "a" )', "nothing to close"),
        ('root ::= ( "a"\n', "not closed"),
        ('root ::= ( "a"\nb ::= "c" )', "not closed"),
        ("root ::= *", "nothing to repeat"),
        ('root ::= "a" | +', "nothing to repeat"),
        (r'root ::= "\u12"', "more hexadecimal digits"),
        (r'root ::= "\ud800"', "stands for no character"),
        (r'root ::= "\UFFFFFFFF"', "stands for no character"),
        ("root ::= " + "(" * 100 + '"a"' + ")" * 100, "nested deeper than 64 levels"),
    ],
)
def test_mistakes_are_told_with_their_line(grammar: str, words: str) -> None:
    with pytest.raises(GrammarError) as error:
        lark_of(grammar)
    assert words in str(error.value)


def test_lark_is_not_taken_for_gbnf() -> None:
    assert not is_gbnf('start: "::="\n')
    assert not is_gbnf('%llguidance {}\nstart: a\na: "::="')
    assert not is_gbnf('start: "a"')
    assert is_gbnf('root ::= "start:"')


@pytest.mark.parametrize(
    "text",
    [
        *('root ::= "' + '\\"' * 60_000, "root ::= [" + "\\]" * 60_000, "\n" * 120_000 + "::=", " " * 120_000 + "::="),
        *("a-" * 60_000 + " ::=", "root ::= " + "a " * 60_000, "root ::= " + "{1," * 40_000, "a \t" * 40_000 + "::="),
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(6_000)) + 'r6000 ::= "a"',
        'root ::= "a"' + "{1,2}" * 20_000,
    ],
)
def test_time_grows_with_the_text_alone(text: str) -> None:
    """Anything quadratic would take minutes; the bound is far above what a busy machine needs."""
    began = time.thread_time()
    is_gbnf(text)
    with contextlib.suppress(GrammarError):
        lark_of(text)
    assert time.thread_time() - began < 10
