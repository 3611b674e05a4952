"""Tools over HTTP: scripted answers in every form, whole and streamed, plain tokens and special ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest
from engine.grammar import Grammar
from tests.denoisers import FULL_INFO
from tests.server.fake_engine import BOS, FakeEngine, make_tokenizer
from tests.server.fake_engine import TEMPLATE as PLAIN_TEMPLATE
from tests.server.harness import CHAT, CHAT_URL, Json, chat_text, error_of, serving, stream
from tests.server.tool_models import BODY, CLOCK, FORMS, MARKS, NAMED, NOTHING, OSLO, WEATHER, Shared, engine_of

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    shared = Shared(make_tokenizer(marks=MARKS))
    yield shared
    shared.end()


def prompt_of(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.submitted[-1].prompt_ids, False)


async def post(client: httpx.AsyncClient, **fields: Any) -> Json:
    response = await client.post(CHAT_URL, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    body: Json = response.json()
    return body


def joined(chunks: list[Json], index: int = 0) -> list[Json]:
    """The calls of a stream, as the openai SDK would join them; checks point 36 on the way."""
    calls: list[Json] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            for part in choice["delta"].get("tool_calls", []) if choice["index"] == index else []:
                if part["index"] == len(calls):
                    assert part["function"]["arguments"] == "" and part["type"] == "function"
                    assert set(part) == {"index", "id", "type", "function"}
                    calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
                    continue
                assert set(part) == {"index", "function"} and set(part["function"]) == {"arguments"}
                assert part["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return calls


def told(calls: list[Json]) -> list[tuple[str, str]]:
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("form", FORMS)
async def test_every_form_whole_and_streamed(shared: Shared, form: str, special: bool) -> None:
    engine = engine_of(shared, form, special=special)
    assert (engine.info.tool_parser, engine.info.tool_template) == (form, True)
    async with serving(engine) as client:
        choice = (await post(client))["choices"][0]
        chunks = await stream(client, CHAT_URL, BODY)
    assert choice["message"]["content"] is None and choice["message"]["refusal"] is None
    assert told(choice["message"]["tool_calls"]) == [("weather", OSLO), ("clock", NOTHING)]
    assert told(joined(chunks)) == told(choice["message"]["tool_calls"])
    assert chat_text(chunks) == ""
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert '{"type": "function", "function": {"name": "weather"' in prompt_of(engine)
    sampling = engine.submitted[-1].sampling
    assert sampling.grammar is not None and bool(sampling.shown_token_ids) is special


async def test_text_before_a_call_is_content(shared: Shared) -> None:
    engine = engine_of(shared, "hermes", "I look.\n\n" + FORMS["hermes"][2])
    async with serving(engine) as client:
        choice = (await post(client))["choices"][0]
        chunks = await stream(client, CHAT_URL, BODY)
    assert choice["message"]["content"] == chat_text(chunks) == "I look."
    assert len(choice["message"]["tool_calls"]) == len(joined(chunks)) == 2


async def test_without_calls_nothing_changes(shared: Shared) -> None:
    engine = engine_of(shared, "hermes", " 1 < 2, and {3} \n")
    async with serving(engine) as client:
        with_tools, without = await post(client), (await client.post(CHAT_URL, json=CHAT)).json()
        chunks = await stream(client, CHAT_URL, BODY)
    assert with_tools["choices"] == without["choices"]
    assert "tool_calls" not in with_tools["choices"][0]["message"]
    assert chat_text(chunks) == " 1 < 2, and {3} \n" and chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "choice, finish", [("auto", "tool_calls"), ("required", "tool_calls"), (NAMED, "stop")], ids=str
)
async def test_point_19_finish_reasons(shared: Shared, choice: object, finish: str) -> None:
    engine = engine_of(shared, "hermes", FORMS["hermes"][2].split("\n<")[0] + "\n</tool_call>")
    async with serving(engine) as client:
        whole = await post(client, tool_choice=choice)
        chunks = await stream(client, CHAT_URL, {**BODY, "tool_choice": choice})
        cut = await post(client, tool_choice=choice, max_tokens=40)
        cut_chunks = await stream(client, CHAT_URL, {**BODY, "tool_choice": choice, "max_tokens": 40})
    assert whole["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == finish
    assert cut["choices"][0]["finish_reason"] == cut_chunks[-1]["choices"][0]["finish_reason"] == "length"
    partial = told(cut["choices"][0]["message"]["tool_calls"])
    assert partial == told(joined(cut_chunks)) and OSLO.startswith(partial[0][1]) and partial[0][1] != OSLO


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral", "pythonic"])
@pytest.mark.parametrize("place, finish", [("Osl", "stop"), ("clock", "tool_calls")])
async def test_a_stop_string_inside_a_call_is_no_call(shared: Shared, form: str, place: str, finish: str) -> None:
    engine = engine_of(shared, form)
    async with serving(engine) as client:
        choice = (await post(client, stop=place))["choices"][0]
        chunks = await stream(client, CHAT_URL, {**BODY, "stop": place})
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == finish
    assert choice["stop_reason"] == chunks[-1]["choices"][0]["stop_reason"] == place
    calls = told(choice["message"]["tool_calls"])
    assert calls == told(joined(chunks)) and len(calls) == 1 and (calls[0][1] == OSLO) is (finish == "tool_calls")


async def test_scores_ids_and_trace_stay_with_their_tokens(shared: Shared) -> None:
    engine = engine_of(shared, "hermes", "So: " + FORMS["hermes"][2])
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    async with serving(engine) as client:
        whole = (await post(client, **fields))["choices"][0]
        chunks = await stream(client, CHAT_URL, {**BODY, **fields})
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids", ())]
    scores = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert ids == whole["token_ids"] and scores == whole["logprobs"]["content"] and len(scores) == len(ids)
    for choice in choices:  # each chunk has those of its own tokens, or none
        assert len((choice["logprobs"] or {"content": []})["content"]) == len(choice.get("token_ids", ()))


async def test_choices_are_read_each_for_itself(shared: Shared) -> None:
    engine = engine_of(shared, "hermes")
    texts = [FORMS["hermes"][2], "No call."]
    engine.answer = lambda request: [*engine.tokenizer.encode(texts[request.choice], False), *engine.tokenizer.eos_ids]
    async with serving(engine) as client:
        whole = (await post(client, n=2))["choices"]
        chunks = await stream(client, CHAT_URL, {**BODY, "n": 2})
    assert [choice["finish_reason"] for choice in whole] == ["tool_calls", "stop"]
    assert len(joined(chunks, 0)) == 2 and joined(chunks, 1) == [] and chat_text(chunks, 1) == "No call."
    ids = [call["id"] for call in [*joined(chunks, 0), *whole[0]["message"]["tool_calls"]]]
    assert len(set(ids)) == 4


async def test_what_may_be_called(shared: Shared) -> None:
    """Of a call that was not allowed the text is told: nothing of an answer is lost."""
    engine = engine_of(shared, "hermes")
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CLOCK]}}
    async with serving(engine) as client:
        none = (await post(client, tool_choice="none"))["choices"][0]["message"]
        prompt = prompt_of(engine)
        single = (await post(client, parallel_tool_calls=False))["choices"][0]["message"]
        subset = (await post(client, tool_choice=allowed))["choices"][0]["message"]
    assert "tool_calls" not in none and "weather" in none["content"] and "description" not in prompt
    assert told(single["tool_calls"]) == [("weather", OSLO)] and "clock" in single["content"]
    assert told(subset["tool_calls"]) == [("clock", NOTHING)] and "weather" in subset["content"]
    assert "description" in prompt_of(engine)  # the others are told of all the same


async def test_tools_and_response_format(shared: Shared) -> None:
    schema = {"type": "object", "properties": {"q": {"type": "integer"}}, "required": ["q"]}
    engine = engine_of(shared, "hermes", '{"q": 1}')
    form = {"type": "json_schema", "json_schema": {"name": "q", "schema": schema}}
    async with serving(engine) as client:
        answer = (await post(client, response_format=form))["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ('{"q": 1}', "stop")
    grammar = engine.submitted[-1].sampling.grammar
    assert grammar is not None and '"q"' in grammar.text and "f0" in grammar.text


async def test_a_model_that_thinks_first(shared: Shared) -> None:
    tokenizer = make_tokenizer(template=PLAIN_TEMPLATE, marks=["<think>", "</think>", *MARKS])
    engine = FakeEngine(answer="<think>Well: <tool_call></think>\n\n" + FORMS["hermes"][2], tokenizer=tokenizer)
    name, marks = tokenizer.thinking_form("auto")
    engine.info = replace(
        engine.info, vocab_size=tokenizer.vocab_size, max_model_len=4096, reasoning_parser=name, thinking=marks
    )
    async with serving(engine) as client:
        whole = (await post(client, tool_choice="required", parallel_tool_calls=True))["choices"][0]
        chunks = await stream(client, CHAT_URL, {**BODY, "tool_choice": "required", "parallel_tool_calls": True})
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    thought = "".join(delta.get("reasoning", "") for delta in deltas)
    assert thought == whole["message"]["reasoning"] == whole["message"]["reasoning_content"] == "Well: <tool_call>"
    assert told(joined(chunks)) == told(whole["message"]["tool_calls"]) == [("weather", OSLO), ("clock", NOTHING)]
    assert whole["message"]["content"] is None and chat_text(chunks) == ""
    grammar = engine.submitted[-1].sampling.grammar
    assert grammar is not None and marks is not None and (grammar.begin, grammar.after) == marks


class Unheld(Shared):
    """As for a tokenizer whose tokens' bytes are not known."""

    async def admit(self, grammar: Grammar, param: str) -> None:
        raise InvalidRequest("Structured output is not supported for this model's tokenizer.", param)


@pytest.mark.parametrize("denoises", [True, False])
async def test_models_that_no_grammar_can_hold(shared: Shared, denoises: bool) -> None:
    """Their calls are read as they come; they can't be made to call."""
    engine = engine_of(shared, "hermes")
    if denoises:
        denoising = replace(FULL_INFO, max_canvas=4096, spec=replace(FULL_INFO.spec, mask_id=BOS))
        engine.info = replace(engine.info, diffusion=denoising, pipeline="masked_diffusion")
    else:
        engine.grammars = Unheld(engine.tokenizer)  # type: ignore[assignment]
    async with serving(engine) as client:
        choice = (await post(client, max_tokens=400))["choices"][0]
        assert len(choice["message"]["tool_calls"]) == 2 and choice["finish_reason"] == "tool_calls"
        assert engine.submitted[-1].sampling.grammar is None
        error = error_of(await client.post(CHAT_URL, json={**BODY, "tool_choice": "required"}), 400)
    assert error["param"] == "tool_choice"


async def test_a_model_without_tools(shared: Shared) -> None:
    engine = engine_of(shared, "hermes")
    engine.info = replace(engine.info, tool_parser="", tool_template=False)
    async with serving(engine) as client:
        error = error_of(await client.post(CHAT_URL, json=BODY), 400)
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")


async def test_the_tokenize_endpoint_tells_of_tools(shared: Shared) -> None:
    engine = engine_of(shared, "hermes")
    async with serving(engine) as client:
        with_tools = (await client.post("/tokenize", json={"messages": CHAT["messages"], "tools": [WEATHER]})).json()
        await post(client, tools=[WEATHER])
        assert with_tools["tokens"] == list(engine.submitted[-1].prompt_ids)
        error = error_of(await client.post("/tokenize", json={"messages": CHAT["messages"], "tools": []}), 400)
    assert error["param"] == "tools"
