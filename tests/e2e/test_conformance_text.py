"""Points 31 to 35 of the wire's conformance list: characters, stops and white space, over real sockets."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.streams import CHAT, COMPLETIONS, chunks, client_of, of_choice, text_of, whole
from tests.e2e.wire import Json, error_of, post
from tests.server.fake_engine import EOS, FakeEngine, make_tokenizer

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
TEXT = "Grüße 👩‍👩‍👧 日本語 ✓"


def tokens(text: bytes) -> list[int]:
    """One for each byte."""
    tokenizer = make_tokenizer()
    ids = {tokenizer.token_bytes(token): token for token in range(256)}
    return [ids[bytes([byte])] for byte in text]


def told(server: ScriptedServer | ServerProcess, path: str, **fields: Any) -> str:
    """The text of the first choice, which is the same whole and streamed."""
    fields = {"max_tokens": 100, **fields}
    choice = whole(server, path, **fields)["choices"][0]
    text: str = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert text_of(chunks(server, path, **fields)) == text
    return text


@PATHS
def test_point_31_no_character_is_broken(scripted: ScriptedServer, path: str) -> None:
    scripted.engine.answer = TEXT
    events = chunks(scripted, path, max_tokens=100)
    assert text_of(events) == TEXT and all("\ufffd" not in str(choice) for choice in of_choice(events))
    scripted.engine.answer = [*tokens(b"ab\xe6\x97"), EOS]  # it ends within a character
    assert told(scripted, path) == "ab\ufffd"
    scripted.engine.answer = [*tokens(b"\xffab"), EOS]
    assert told(scripted, path) == "\ufffdab"


@PATHS
def test_point_32_stops_across_tokens(scripted: ScriptedServer, path: str) -> None:
    scripted.engine.answer = "one STO two STOP three STOP"
    for stop, kept in (("STOP", "one STO two "), (["zzz", "STOP"], "one STO two "), ("two STOP", "one STO ")):
        assert told(scripted, path, stop=stop) == kept
    assert told(scripted, path, stop="STOP", include_stop_str_in_output=True) == "one STO two STOP"
    assert told(scripted, path, stop="never") == scripted.engine.answer


@PATHS
def test_point_32_what_comes_behind_a_stop_counts_nowhere(path: str) -> None:
    """The stop lies inside a round of drafted tokens: those behind it are neither told, scored nor billed."""
    with ScriptedServer(FakeEngine(answer="abcdefghijkl", stands=(4, 4))) as server:
        asked: Json = {"stop": "cd", "return_token_ids": True}
        asked |= {"logprobs": True} if path == CHAT else {"logprobs": 0}
        answer = whole(server, path, **asked)
        choice = answer["choices"][0]
        scores = choice["logprobs"]["content"] if path == CHAT else choice["logprobs"]["tokens"]
        assert choice["token_ids"] == tokens(b"abcd")
        assert len(scores) == 4 and answer["usage"]["completion_tokens"] == 4
        events = chunks(server, path, **asked, stream_options={"include_usage": True})
        assert events[-1]["usage"]["completion_tokens"] == 4 and text_of(events) == "ab"
        assert sum(len(c.get("token_ids", ())) for c in of_choice(events)) == 4


@PATHS
def test_point_33_up_to_four_stops(tiny: ServerProcess, path: str) -> None:
    body: Json = {"prompt": "x"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    good: list[Any] = [None, [], "a", ["a"], ["a", "b", "c", "d"]]
    bad: list[Any] = ["", [""], ["a", ""], ["a"] * 5, 7, [7]]
    for stop in good:
        assert post(tiny.url, path, {**body, "stop": stop, "max_tokens": 2}).status_code == 200
    for stop in bad:
        assert error_of(post(tiny.url, path, {**body, "stop": stop}))["param"] == "stop"


@PATHS
def test_point_34_a_stream_is_the_whole_answer(demo: ServerProcess, tiny: ServerProcess, path: str) -> None:
    for server in (demo, tiny):
        assert told(server, path, temperature=0, max_tokens=40)
        assert told(server, path, temperature=0.8, seed=7, max_tokens=20)


def test_point_35_spaces_between_words_survive(demo: ServerProcess) -> None:
    prompt = "The capital of France is"
    with client_of(demo) as client:
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
        pieces = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True)
        streamed = "".join(piece.choices[0].text for piece in pieces)
    assert answer.choices[0].text.startswith(" ") and streamed == answer.choices[0].text
    assert " " in streamed.strip()


@PATHS
def test_point_35_a_first_space_survives(scripted: ScriptedServer, path: str) -> None:
    scripted.engine.answer = "  two spaces,  and two "
    assert told(scripted, path) == "  two spaces,  and two "
