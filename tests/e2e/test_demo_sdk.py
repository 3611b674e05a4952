"""The openai SDK against the demo model, synchronous: every answer also satisfies the SDK's own types, strictly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Completion

from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, post

PROMPT = "The first president of the United States was"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY: Any = [{"role": "user", "content": "Tell me about the sea in two sentences."}]
GREEDY: Any = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def client(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=60, _strict_response_validation=True
    ) as client:
        yield client
    assert_idle(demo.url)


@pytest.fixture(scope="module")
def lenient(demo: ServerProcess) -> Iterator[OpenAI]:
    """For what the API documents and sends but the SDK's types leave out: nulls in the parts of a completion."""
    with OpenAI(base_url=f"{demo.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def reference(client: OpenAI) -> Completion:
    """The greedy continuation of PROMPT with its log-probabilities; no choice in it is a near tie."""
    answer = client.completions.create(prompt=PROMPT, max_tokens=32, logprobs=2, **GREEDY)
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.top_logprobs is not None
    for top in scores.top_logprobs:
        first, second = sorted(top.values(), reverse=True)
        assert first - second > 0.05
    return answer


def ids_of(demo: ServerProcess, text: str) -> list[int]:
    tokens: list[int] = post(demo.url, "/tokenize", {"prompt": text}).json()["tokens"]
    return tokens


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "slipstream")
    assert client.models.retrieve("demo") == model


def test_a_prompt_as_text_and_as_ids_alone_and_in_lists(
    client: OpenAI, demo: ServerProcess, reference: Completion
) -> None:
    text, ids = reference.choices[0].text, ids_of(demo, PROMPT)
    other = client.completions.create(prompt="The capital of France is", max_tokens=4, **GREEDY).choices[0].text
    assert other.startswith(" Paris")
    assert client.completions.create(prompt=ids, max_tokens=32, **GREEDY).choices[0].text == text
    for pair in ([PROMPT, "The capital of France is"], [ids, ids_of(demo, "The capital of France is")]):
        answer = client.completions.create(prompt=pair, max_tokens=32, **GREEDY)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].text == text and answer.choices[1].text.startswith(other)
        assert answer.usage is not None and answer.usage.prompt_tokens == len(ids) + 5


def test_chat_knows_the_capital_of_france(client: OpenAI) -> None:
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert choice.message.content is not None and "Paris" in choice.message.content
    usage = answer.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    same = client.chat.completions.create(messages=parts, **GREEDY)
    assert same.choices[0].message.content == choice.message.content


def test_a_streamed_completion_is_the_whole_one_in_pieces(lenient: OpenAI, reference: Completion) -> None:
    chunks = list(lenient.completions.create(prompt=PROMPT, max_tokens=32, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reference.choices[0].text
    assert len(chunks) > 8  # token by token, not all at the end
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "demo", "text_completion")
    }
    finishes = [chunk.choices[0].finish_reason for chunk in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=STORY, max_tokens=40, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=STORY, max_tokens=40, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *told, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in told] == ["assistant"] + [None] * (len(told) - 1)
    assert [c.choices[0].finish_reason for c in told] == [None] * (len(told) - 1) + [whole.choices[0].finish_reason]
    assert (last.choices, [chunk.usage for chunk in told]) == ([], [None] * len(told))
    assert last.usage is not None and whole.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {(chunk.id, chunk.created) for chunk in chunks} == {(last.id, last.created)}


def test_usage_on_every_chunk(lenient: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        lenient.completions.create(prompt=PROMPT, max_tokens=6, stream=True, stream_options=options, **GREEDY)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 6


def test_the_stream_helper_of_the_sdk(client: OpenAI) -> None:
    with client.chat.completions.stream(messages=QUESTION, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert "Paris" in text and final.choices[0].message.content == text


def test_three_choices_differ_and_come_again_with_their_seed(client: OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": STORY, "n": 3, "seed": 11, "temperature": 1, "max_tokens": 16}
    first = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert first.usage is not None
    alone = client.chat.completions.create(**{**asked, "n": 1})
    assert alone.usage is not None and first.usage.prompt_tokens == alone.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert alone.choices[0].message.content == texts[0]
    other = client.chat.completions.create(**{**asked, "seed": 12})
    assert [choice.message.content for choice in other.choices] != texts


def test_without_a_seed_answers_differ(client: OpenAI) -> None:
    texts = {client.completions.create(model="demo", prompt=PROMPT, max_tokens=12).choices[0].text for _ in range(3)}
    assert len(texts) > 1


def test_the_second_request_finds_its_prompt_in_the_cache(client: OpenAI, demo: ServerProcess) -> None:
    prompt = "A list of the rivers of Europe, from the longest to the shortest: " + "the Volga, the Danube, " * 12
    answers = [client.completions.create(prompt=prompt, max_tokens=12, **GREEDY) for _ in range(2)]
    salted: Any = {"cache_salt": "another tenant"}
    answers.append(client.completions.create(prompt=prompt, max_tokens=12, **GREEDY, extra_body=salted))
    details = [answer.usage.prompt_tokens_details for answer in answers if answer.usage is not None]
    cached = [detail.cached_tokens for detail in details if detail is not None]
    assert cached == [0, len(ids_of(demo, prompt)) // 16 * 16, 0]
    assert len({answer.choices[0].text for answer in answers}) == 1


# ---- log-probabilities -----------------------------------------------------------------------------------


def test_logprobs_of_completions(lenient: OpenAI, reference: Completion) -> None:
    text, scores = reference.choices[0].text, reference.choices[0].logprobs
    assert scores is not None and scores.tokens and scores.token_logprobs and scores.top_logprobs and scores.text_offset
    assert "".join(scores.tokens) == text
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset) == 32
    for token, logprob, top, offset in zip(
        scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset, strict=True
    ):
        assert text.startswith(token, offset)
        assert len(top) == 2 and max(top, key=top.__getitem__) == token and top[token] == logprob <= 0
    streamed: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for chunk in lenient.completions.create(prompt=PROMPT, max_tokens=32, logprobs=0, stream=True, **GREEDY):
        part = chunk.choices[0].logprobs
        assert part is not None
        for name, values in streamed.items():
            values += getattr(part, name)
    assert streamed["tokens"] == scores.tokens and streamed["text_offset"] == scores.text_offset
    assert streamed["token_logprobs"] == pytest.approx(scores.token_logprobs, abs=1e-2)


def test_logprobs_of_chats(client: OpenAI) -> None:
    asked: Any = {**GREEDY, "messages": STORY, "max_tokens": 24, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None
    told = b"".join(bytes(entry.bytes or ()) for entry in whole.logprobs.content).decode()
    assert told == (whole.message.content or "") + ("<|im_end|>" if whole.finish_reason == "stop" else "")
    for entry in whole.logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        ranked = [alternative.logprob for alternative in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True) and ranked[0] == entry.logprob
    tokens: list[str] = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        scores = chunk.choices[0].logprobs
        tokens += [entry.token for entry in (scores.content or ())] if scores is not None else []
    assert tokens == [entry.token for entry in whole.logprobs.content]


def test_echo_scores_a_prompt_as_lm_eval_asks(lenient: OpenAI, demo: ServerProcess, reference: Completion) -> None:
    """Scoring prompt and continuation gives the continuation the log-probabilities that it was generated with."""
    generated = reference.choices[0]
    assert generated.logprobs is not None and generated.logprobs.token_logprobs is not None
    prompt, text = ids_of(demo, PROMPT), PROMPT + generated.text
    ids = ids_of(demo, text)
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 32
    for max_tokens in (0, 1):
        answer = lenient.completions.create(
            model="demo", prompt=[ids], max_tokens=max_tokens, logprobs=1, temperature=0, seed=1234, echo=True
        )
        (choice,) = answer.choices
        scores: Any = choice.logprobs
        assert len(scores.tokens) == len(scores.text_offset) == len(ids) + max_tokens
        assert choice.text.startswith(text) and (choice.text == text) is (max_tokens == 0)
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        scored = scores.token_logprobs[len(prompt) : len(ids)]
        assert scored == pytest.approx(generated.logprobs.token_logprobs, abs=2e-2)
        *starts, last = scores.text_offset[: len(ids) + 1]
        assert all(choice.text.startswith(token, at) for at, token in zip(starts, scores.tokens, strict=False))
        assert last == len(text) if max_tokens else choice.text.startswith(scores.tokens[-1], last)
        assert answer.usage is not None and answer.usage.completion_tokens == max_tokens


# ---- stop strings ----------------------------------------------------------------------------------------


def border_stops(tokens: list[str]) -> list[tuple[str, int]]:
    """Stops that begin in one token of a text and end in a later one, with the number of tokens they end in."""
    text, found = "".join(tokens), []
    for i in range(2, len(tokens) - 2):
        for stop, last in ((tokens[i][-1:] + tokens[i + 1][:2], i + 1), (tokens[i][-2:] + tokens[i + 1] + " ", i + 2)):
            start = len("".join(tokens[:i])) + len(tokens[i]) - (1 if last == i + 1 else len(tokens[i][-2:]))
            if text.find(stop) == start and len(stop) > 2:
                found.append((stop, last + 1))
    return found


def test_stop_strings_across_token_borders(client: OpenAI, lenient: OpenAI, reference: Completion) -> None:
    text, scores = reference.choices[0].text, reference.choices[0].logprobs
    assert scores is not None and scores.tokens is not None
    stops = border_stops(scores.tokens)
    assert len(stops) >= 4 and {len(stop) > 3 for stop, _ in stops} == {True, False}
    for stop, count in stops[:6]:
        asked: Any = {**GREEDY, "prompt": PROMPT, "max_tokens": 32, "stop": ["never to be seen", stop]}
        whole = client.completions.create(**asked, logprobs=0)
        (choice,) = whole.choices
        assert (choice.text, choice.finish_reason) == (text[: text.find(stop)], "stop"), stop
        assert choice.model_extra is not None and choice.model_extra["stop_reason"] == stop
        assert whole.usage is not None and whole.usage.completion_tokens == count
        assert choice.logprobs is not None and choice.logprobs.tokens == scores.tokens[:count]
        streamed = list(lenient.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
        assert streamed[-1].choices[0].finish_reason == "stop"
        shown = client.completions.create(**asked, extra_body={"include_stop_str_in_output": True})
        assert shown.choices[0].text == choice.text + stop


def test_stop_strings_of_chats(client: OpenAI) -> None:
    asked: Any = {**GREEDY, "messages": QUESTION}
    whole = client.chat.completions.create(**asked, stop="Paris")
    assert whole.choices[0].finish_reason == "stop" and "Paris" not in (whole.choices[0].message.content or "")
    chunks = client.chat.completions.create(**asked, stop=["Paris"], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


# ---- errors and headers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_a_prompt_longer_than_the_context(client: OpenAI, demo: ServerProcess, kind: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        if kind == "prompt":
            client.completions.create(prompt=[5] * 8192, max_tokens=10, **GREEDY)
        else:
            long: Any = [{"role": "user", "content": "one " * 9000}]
            client.chat.completions.create(messages=long, max_tokens=10, **GREEDY)
    error = caught.value
    assert (error.code, error.param, error.type) == ("context_length_exceeded", kind, "invalid_request_error")
    assert isinstance(error.body, dict)
    count = int(error.body["message"].split("requested ")[1].split()[0])
    assert count == 8202 if kind == "prompt" else count > 9010
    assert error.body["message"] == (
        f"This model's maximum context length is 8192 tokens. However, you requested {count} tokens "
        f"({count - 10} in the {kind}, 10 in the completion). Please reduce the length of the {kind} or completion."
    )


def test_errors_are_typed(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4o", prompt="hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/name-with-slash")
    wrong: list[tuple[Any, str]] = [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"stop": list("abcde")}, "stop"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "demo", "messages": QUESTION, **fields})
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
        assert caught.value.request_id


def test_an_error_before_a_stream_is_an_http_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt=[5] * 9000, stream=True, **GREEDY)


def test_request_ids_and_raw_responses(client: OpenAI) -> None:
    answer = client.completions.with_raw_response.create(
        prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "my-id-1"}, **GREEDY
    )
    assert answer.headers["x-request-id"] == "my-id-1" and answer.parse().choices[0].text
    assert client.completions.create(prompt=PROMPT, max_tokens=1, **GREEDY)._request_id
    with client.chat.completions.with_streaming_response.create(
        messages=QUESTION, max_tokens=4, stream=True, **GREEDY
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[0].startswith("data: {") and [line for line in lines if line][-1] == "data: [DONE]"
    assert lines[1::2] == [""] * (len(lines) // 2)
