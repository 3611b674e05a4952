"""Thoughts told apart from answers over HTTP: what requests say of thinking, and the fields of answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.server.fake_engine import FakeEngine, make_tokenizer
from tests.server.harness import CHAT, CHAT_URL, COMPLETION_URL, Json, error_of, serving, stream

pytestmark = pytest.mark.asyncio

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
    "{% if reasoning_effort %}[{{ reasoning_effort }}{% if reasoning_effort == 'xhigh' %}!{% endif %}]{% endif %}"
)
ANSWER = "<think>\nWhy? Ünd so.\n</think>\n\nBecause."


def thinker(answer: str = ANSWER, special: bool = True, template: str = TEMPLATE, marks: bool = True) -> FakeEngine:
    tokenizer = make_tokenizer(template=template, marks=("<think>", "</think>") if marks else (), special=special)
    engine = FakeEngine(answer=answer, tokenizer=tokenizer)
    name, ids = tokenizer.thinking_form("auto")
    engine.info = replace(engine.info, reasoning_parser=name, thinking=ids, vocab_size=tokenizer.vocab_size)
    return engine


async def ask(engine: FakeEngine, **fields: object) -> tuple[Json, list[Json]]:
    """The same request whole and as a stream."""
    async with serving(engine) as client:
        body: Json = {**CHAT, **fields}
        whole = await client.post(CHAT_URL, json=body)
        assert whole.status_code == 200, whole.text
        return whole.json(), await stream(client, CHAT_URL, {**body, "stream_options": {"include_usage": True}})


def streamed(chunks: list[Json], field: str) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("marks", [True, False])
async def test_point_70_reasoning_is_told_under_both_names(special: bool, marks: bool) -> None:
    answer, chunks = await ask(thinker(special=special, marks=marks))
    message = answer["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Why? Ünd so."
    assert message["content"] == "Because."
    for field in ("content", "reasoning", "reasoning_content"):
        assert streamed(chunks, field) == message[field]
    tokens = len("Why? Ünd so.\n".encode())
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": tokens}
    assert chunks[-1]["usage"] == answer["usage"]


async def test_include_reasoning_false_hides_it_and_counts_it() -> None:
    for fields in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        answer, chunks = await ask(thinker(), **fields)
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Because.", "refusal": None}
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("Why? Ünd so.\n".encode())
        assert "reasoning" not in {key for chunk in chunks for c in chunk["choices"] for key in c["delta"]}
        assert streamed(chunks, "content") == "Because."


async def test_separate_reasoning_false_leaves_it_in_the_content() -> None:
    answer, chunks = await ask(thinker(), separate_reasoning=False)
    assert answer["choices"][0]["message"]["content"] == streamed(chunks, "content") == ANSWER


async def test_stream_reasoning_false_tells_a_thought_in_one_piece() -> None:
    _, chunks = await ask(thinker(), stream_reasoning=False)
    told = [c["delta"]["reasoning"] for chunk in chunks for c in chunk["choices"] if "reasoning" in c["delta"]]
    assert told == ["Why? Ünd so."]


async def test_an_answer_that_begins_inside_the_span_is_told_by_the_prompt() -> None:
    answer, chunks = await ask(thinker("Why?\n</think>\n\nSo."), enable_thinking=True)
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Why?", "So.") == (
        streamed(chunks, "reasoning"), streamed(chunks, "content")
    )  # fmt: skip
    # What a user writes opens no span.
    engine = thinker("Well, so.")
    answer, _ = await ask(engine, messages=[{"role": "user", "content": "what is <think>"}])
    assert answer["choices"][0]["message"]["content"] == "Well, so."


async def test_a_continued_message_may_stand_inside_a_span() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>Wh"}]
    asked = {"messages": messages, "continue_final_message": True}
    for echo, thought in ((False, "y?"), (True, "Why?")):
        answer, chunks = await ask(thinker("y?</think>So."), **asked, echo=echo)
        assert answer["choices"][0]["message"]["reasoning"] == streamed(chunks, "reasoning") == thought
        assert answer["choices"][0]["message"]["content"] == streamed(chunks, "content") == "So."


@pytest.mark.parametrize(
    "fields, ending",
    [
        ({}, "<assistant>"),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        ({"reasoning": {"effort": "none"}}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({"reasoning": {"enabled": False}}, "<think>\n\n</think>\n\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think>\n\n</think>\n\n"),
        ({"reasoning_effort": "low"}, "<think>\n[low]"),
        ({"reasoning_effort": "minimal"}, "<think>\n[low]"),
        ({"reasoning_effort": "max"}, "<think>\n[high]"),
        ({"reasoning_effort": "xhigh"}, "<think>\n[xhigh!]"),
        ({"reasoning": {"effort": "high"}, "reasoning_effort": "high"}, "<think>\n[high]"),
        ({"enable_thinking": True}, "<think>\n"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, "</think>\n\n[high]"),
        ({"reasoning_effort": None, "reasoning": None, "enable_thinking": None}, "<assistant>"),
    ],
)
async def test_what_the_template_is_told(fields: Json, ending: str) -> None:
    engine = thinker()
    async with serving(engine) as client:
        assert (await client.post(CHAT_URL, json={**CHAT, **fields})).status_code == 200
        tokens = (await client.post("/tokenize", json={**CHAT, **fields})).json()["tokens"]
    prompt = engine.submitted[0].prompt_ids
    assert engine.tokenizer.decode(prompt, skip_special_tokens=False).endswith(ending)
    assert list(prompt) == tokens


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_effort": 0.5}, "reasoning_effort"),
        ({"reasoning_effort": ""}, "reasoning_effort"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
        ({"reasoning": "low"}, "reasoning"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, "reasoning.effort"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "enable_thinking"),
        ({"reasoning_effort": "low", "reasoning": {"enabled": False}}, "reasoning.enabled"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"include_reasoning": "no"}, "include_reasoning"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"thinking_token_budget": True}, "thinking_token_budget"),
        ({"thinking_token_budget": 2**40}, "thinking_token_budget"),
        ({"reasoning": {"max_tokens": -5}}, "reasoning.max_tokens"),
        ({"thinking_token_budget": 5, "reasoning": {"max_tokens": 6}}, "reasoning.max_tokens"),
        ({"thinking_token_budget": 5, "allowed_token_ids": [1, 2]}, "thinking_token_budget"),
    ],
)
async def test_bad_values_name_their_field(fields: Json, param: str) -> None:
    async with serving(thinker()) as client:
        assert error_of(await client.post(CHAT_URL, json={**CHAT, **fields}), 400)["param"] == param


async def test_budgets_reach_the_engine() -> None:
    engine = thinker()
    marks = engine.info.thinking
    async with serving(engine) as client:
        for fields in ({"thinking_token_budget": 7}, {"max_thinking_tokens": 7}, {"reasoning": {"max_tokens": 7}},
                       {"thinking_budget": 7, "thinking_token_budget": 7}):  # fmt: skip
            await client.post(CHAT_URL, json={**CHAT, **fields})
            budget = engine.submitted[-1].sampling.thinking
            assert budget is not None and (budget.tokens, budget.opened, budget.around) == (7, False, marks)
        await client.post(CHAT_URL, json={**CHAT, "enable_thinking": True, "thinking_token_budget": 0})
        budget = engine.submitted[-1].sampling.thinking
        assert budget is not None and (budget.tokens, budget.opened) == (0, True)
        texts = ["a", "<think>b", "<think>b</think>c"]
        await client.post(COMPLETION_URL, json={"prompt": texts, "thinking_token_budget": 3, "n": 2})
        opened = [request.sampling.thinking.opened for request in engine.submitted[-6:] if request.sampling.thinking]
        assert opened == [False, False, True, True, False, False]
        await client.post(CHAT_URL, json=CHAT)
        assert engine.submitted[-1].sampling.thinking is None


async def test_effort_none_ends_thoughts_at_once_where_the_template_has_no_switch() -> None:
    engine = thinker(template="{% for m in messages %}{{ m.content }}{% endfor %}<think>")
    async with serving(engine) as client:
        await client.post(CHAT_URL, json={**CHAT, "reasoning_effort": "none"})
        budget = engine.submitted[-1].sampling.thinking
        assert budget is not None and (budget.tokens, budget.opened) == (0, True)


async def test_a_model_that_does_not_think_says_so() -> None:
    async with serving(FakeEngine()) as client:
        for name in ("thinking_token_budget", "max_thinking_tokens", "thinking_budget"):
            for url, body in ((CHAT_URL, CHAT), (COMPLETION_URL, {"prompt": "a"})):
                error = error_of(await client.post(url, json={**body, name: 5}), 400)
                assert error["param"] == name and "no tokens around its thinking" in error["message"]
        for fields in ({"reasoning_effort": "high"}, {"include_reasoning": False}, {"enable_thinking": True}):
            answer = (await client.post(CHAT_URL, json={**CHAT, **fields})).json()
            assert answer["choices"][0]["message"]["content"] == "Hello, wörld!"
            assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_models_that_always_think_need_no_mark_in_the_prompt() -> None:
    engine = thinker("Why?</think>So.")
    engine.info = replace(engine.info, reasoning_parser="think_always")
    answer, _ = await ask(engine)
    assert answer["choices"][0]["message"]["reasoning"] == "Why?"
    engine = thinker("So.")
    engine.info = replace(engine.info, reasoning_parser="think_always")
    answer, _ = await ask(engine, enable_thinking=False)  # the template closes the span
    assert answer["choices"][0]["message"]["content"] == "So."


@pytest.mark.parametrize(
    "fields, begin, after",
    [
        ({}, True, True),  # the model opens its span by itself, or not
        ({"enable_thinking": True}, False, True),  # the template has opened it
        ({"enable_thinking": False}, False, False),  # the template has closed it
    ],
)
async def test_a_form_holds_behind_the_thought(fields: Json, begin: bool, after: bool) -> None:
    engine = thinker()
    marks = engine.info.thinking
    assert marks is not None
    async with serving(engine) as client:
        await client.post(CHAT_URL, json={**CHAT, **fields, "response_format": {"type": "json_object"}})
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None
    assert (grammar.begin, grammar.after) == (marks[0] if begin else None, marks[1] if after else None)


async def test_a_form_holds_from_the_first_token_where_nobody_knows_the_end_of_the_thought() -> None:
    engine = thinker('{"a": 1}', marks=False)
    assert engine.info.reasoning_parser == "think" and engine.info.thinking is None
    answer, chunks = await ask(engine, enable_thinking=True, response_format={"type": "json_object"})
    grammar = engine.submitted[0].sampling.grammar
    assert grammar is not None and (grammar.begin, grammar.after) == (None, None)
    assert answer["choices"][0]["message"]["content"] == streamed(chunks, "content") == '{"a": 1}'
