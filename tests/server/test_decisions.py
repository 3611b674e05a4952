"""/v1/decisions and /v1/systemone over fake engines: prompts, labels, probabilities, and all that can be wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from engine.diffusion import DiffusionInfo, DiffusionParams, DiffusionSpec
from engine.reading import Law, Readout
from engine.types import Request
from server.decisions.labels import Labels
from server.errors import ApiError
from tests.server.fake_engine import FakeEngine, make_tokenizer
from tests.server.harness import Json, error_of, serving
from tests.server.test_openai_sdk import connected

URL, TWIN = "/v1/decisions", "/v1/systemone"
PREDICATE: Json = {"type": "predicate", "instructions": "Is it urgent?", "name": "urgent"}
CHOICE: Json = {
    "type": "choice",
    "instructions": "What is it about?",
    "choices": [{"value": "billing", "description": "money"}, {"value": True}, {"value": "true"}],
}
SCORE: Json = {
    "type": "score",
    "instructions": "How angry?",
    "levels": [{"label": "calm"}, {"label": "cross", "description": "short words"}, {"label": "mad"}],
}
MASK = 255
pytestmark = pytest.mark.asyncio


def denoiser(*, block: int = 0, shift: bool = False, **options: Any) -> FakeEngine:
    """A model that denoises; block-causal where it has blocks."""
    spec = DiffusionSpec("block_causal" if block else "full", MASK, block or 8, shift=shift)
    defaults = DiffusionParams("threshold", cache="dual", block_length=block or 8, canvas=64)
    info = DiffusionInfo(spec, defaults, (), max_canvas=0 if block else 1000)
    return FakeEngine(diffusion=info, **options)


def text_of(engine: FakeEngine, request: Request) -> str:
    return engine.tokenizer.decode([i for i in request.prompt_ids if i != MASK or engine.info.diffusion is None])


async def test_each_question_is_a_prompt_that_begins_with_the_input() -> None:
    engine = FakeEngine(max_model_len=2048)
    async with serving(engine) as client:
        body = {"model": "tiny", "input": "Pay me!", "questions": [PREDICATE, CHOICE, SCORE]}
        answer = (await client.post(URL, json=body)).json()
    first, second, third = engine.submitted
    assert {request.group for request in engine.submitted} == {first.group} and first.group
    assert [request.choice for request in engine.submitted] == [0, 1, 2]
    assert text_of(engine, first).startswith("<user>Pay me!\n\nQuestion: Is it urgent?\n")
    assert text_of(engine, first).endswith("<assistant>") and "yes or no" in text_of(engine, first)
    assert "\nA. billing: money\nB. true\nC. true\n" in text_of(engine, second)
    assert "\n0. calm\n1. cross: short words\n2. mad\n" in text_of(engine, third)
    probe = second.reading and second.reading.probes[0]
    assert probe and probe.position == len(second.prompt_ids)
    ids = engine.tokenizer.encode("ABC", add_special_tokens=False)
    assert probe.token_ids == tuple(ids)  # with a space before them they are two tokens each
    assert set(answer) == {"answers", "model", "usage"}
    tokens = sum(len(request.prompt_ids) for request in engine.submitted)
    assert answer["usage"] == {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }


async def test_probabilities_are_those_of_the_labels_among_themselves() -> None:
    engine = FakeEngine(max_model_len=2048)
    async with serving(engine) as client:
        body = {"input": "Pay me!", "questions": [CHOICE, SCORE], "diagnostics": True}
        answer = (await client.post(URL, json=body)).json()
    choice, score = answer["answers"]
    shares = [4 / 7, 2 / 7, 1 / 7]  # each label is half as likely as the one before
    assert [row["value"] for row in choice["probabilities"]] == ["billing", True, "true"]
    assert [row["probability"] for row in choice["probabilities"]] == pytest.approx(shares)
    assert (choice["choice"], choice["name"], choice["type"]) == ("billing", None, "choice")
    assert choice["confidence"] == pytest.approx((4 / 7 - 1 / 3) / (2 / 3))
    assert [(row["label"], row["value"]) for row in score["probabilities"]] == [("calm", 0), ("cross", 1), ("mad", 2)]
    assert score["score"] == pytest.approx(2 / 7 + 2 / 7)
    assert answer["diagnostics"][0] == {"label_mass": pytest.approx(7 / 8), "argmax_is_label": True}


async def test_all_forms_of_a_label_count_together() -> None:
    """yes, Yes and YES say the same."""
    engine = FakeEngine()

    def words(request: Request) -> Readout:
        assert request.reading is not None
        ids = request.reading.probes[0].token_ids
        return Readout(laws=(Law(tuple(math.log(0.1 * (i + 1)) for i in range(len(ids))), 7),))

    engine.readout = words
    backend = engine.tokenizer._backend
    backend.add_tokens(["yes", "Yes", " no"])
    engine.info = replace(engine.info, vocab_size=300)
    async with serving(engine) as client:
        body = {"input": "x", "questions": [PREDICATE], "diagnostics": True}
        answer = (await client.post(URL, json=body)).json()
    assert answer["answers"] == [{"type": "predicate", "name": "urgent", "probability": pytest.approx(0.5)}]
    assert answer["diagnostics"] == [{"label_mass": pytest.approx(0.6), "argmax_is_label": False}]


async def test_labels_that_begin_alike_can_not_be_told_apart() -> None:
    labels = Labels(make_tokenizer(), "x")
    assert [len(group) for group in labels.groups(["yes", "no"], "q")] == [2, 2]  # y and Y, n and N
    with pytest.raises(ApiError) as error:
        labels.groups(["yes", "yep"], "q")
    assert error.value.param == "q"


async def test_labels_that_can_not_come_leave_it_open() -> None:
    engine = FakeEngine()
    engine.readout = lambda request: Readout(laws=(Law((-math.inf,) * 2, 3),))
    two = {**CHOICE, "choices": CHOICE["choices"][:2]}
    async with serving(engine) as client:
        answer = (await client.post(URL, json={"input": "x", "questions": [two]})).json()["answers"][0]
    assert [row["probability"] for row in answer["probabilities"]] == [0.5, 0.5] and answer["confidence"] == 0


async def test_a_conversation_becomes_a_transcript() -> None:
    engine = FakeEngine(max_model_len=2048)
    items: list[Json] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_json", "data": {"a": [1]}}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Here."}]},
    ]
    async with serving(engine) as client:
        response = await client.post(URL, json={"input": items, "questions": [CHOICE]})
        assert response.status_code == 200, response.text
        one = await client.post(URL, json={"input": items[1:2], "questions": [CHOICE]})
        assert one.status_code == 200
        orphan = await client.post(URL, json={"input": items[3:], "questions": [CHOICE]})
        assert error_of(orphan, 400)["param"] == "input[0].call_id"
    assert text_of(engine, engine.submitted[0]).startswith(
        '<user>[developer]\nBe kind.\n\n[user]\nHi\n{"a":[1]}\n\n[tool call c1: look]\n{}\n\n'
        "[tool result c1]\nfound\n\n[assistant]\nHere.\n\nQuestion:"
    )
    assert text_of(engine, engine.submitted[1]).startswith('<user>Hi\n{"a":[1]}\n\nQuestion:')


async def test_the_sdk_reads_every_type_of_answer() -> None:
    engine = FakeEngine(max_model_len=2048)
    async with connected(engine) as sdk:
        questions: Any = [PREDICATE, CHOICE, SCORE]
        decision = await sdk.decisions.create(
            model="tiny",
            input=[{"role": "user", "content": "Pay me!"}],
            questions=questions,
            prompt_cache_key="mine",
            prompt_cache_options={"mode": "implicit"},
            safety_identifier="me",
        )
    predicate, choice, score = decision.answers
    assert predicate.type == "predicate" and predicate.name == "urgent" and predicate.probability == pytest.approx(0.8)
    assert choice.type == "choice" and [row.value for row in choice.probabilities] == ["billing", True, "true"]
    assert score.type == "score" and 0 <= score.score <= 2
    assert decision.usage.input_tokens_details.cached_tokens == 6
    assert {request.cache_salt for request in engine.submitted} == {"mine"}


async def test_the_twin_answers_by_name() -> None:
    engine = FakeEngine(max_model_len=2048)
    body: Json = {
        "state": {"text": "Pay me!"},
        "instructions": "You judge tickets.",
        "questions": {
            "refund": {"type": "noul", "instructions": "A refund?", "criteria": {"true": "asks for money"}},
            "topic": {"type": "choice", "criteria": {"billing": None, "other": {"hint": 1}}},
            "anger": {"type": "score", "instructions": "How angry?", "criteria": ["calm", ["very", "mad"]]},
        },
    }
    async with serving(engine) as client:
        answer = (await client.post(TWIN, json=body)).json()
    assert answer["object"] == "structured_decision" and answer["model"] == "tiny"
    assert answer["id"].startswith("decision-") and isinstance(answer["created"], int)
    refund, topic, anger = (answer["answers"][name] for name in ("refund", "topic", "anger"))
    assert refund["noul"] == pytest.approx(0.8) == refund["probabilities"]["yes"]  # y and Y, n and N
    assert topic["choice"] == "billing" and set(topic["probabilities"]) == {"billing", "other"}
    assert anger["legend"] == {"0": "calm", "1": ["very", "mad"]} and anger["score"] == pytest.approx(1 / 3)
    assert set(answer["diagnostics"]) == set(body["questions"])
    prompt = text_of(engine, engine.submitted[0])
    assert prompt.startswith('<system>You judge tickets.<user>{"text":"Pay me!"}\n\nQuestion: A refund?\nyes. asks')
    assert 'A. billing\nB. other: {"hint":1}\n' in text_of(engine, engine.submitted[1])


async def test_a_model_that_denoises_has_a_mask_where_its_answer_begins() -> None:
    full, blocks = denoiser(max_model_len=2048), denoiser(block=16, shift=True, max_model_len=2048)
    for engine in (full, blocks):
        async with serving(engine) as client:
            response = await client.post(URL, json={"input": "Pay me!", "questions": [PREDICATE, SCORE]})
            assert response.status_code == 200, response.text
        for request in engine.submitted:
            reading, ids = request.reading, request.prompt_ids
            assert reading is not None and len(reading.probes) == 1 and ids[reading.probes[0].position] == MASK
            assert ids.count(MASK) == (1 if engine is full else 16 - ids.index(MASK) % 16)
            assert len(ids) % 16 == 0 or engine is full
            assert reading.probes[0].position == ids.index(MASK)


async def test_one_canvas_holds_all_questions() -> None:
    engine = denoiser(max_model_len=2048)
    async with serving(engine) as client:
        body: Json = {"input": "Pay me!", "questions": [PREDICATE, CHOICE, SCORE], "joint": True}
        answer = (await client.post(URL, json=body)).json()
    (request,) = engine.submitted
    assert request.reading is not None
    places = [probe.position for probe in request.reading.probes]
    assert [request.prompt_ids[place] for place in places] == [MASK] * 3
    assert text_of(engine, request).endswith("<assistant>1:\n2:\n3:")
    assert "\n\nQuestion 2 (a letter): What is it about?\nA. billing" in text_of(engine, request)
    assert [found["type"] for found in answer["answers"]] == ["predicate", "choice", "score"]
    assert answer["usage"]["input_tokens"] == len(request.prompt_ids)


async def test_a_model_without_a_template_reads_plain_text() -> None:
    engine = FakeEngine(tokenizer=make_tokenizer(template=None), max_model_len=2048)
    async with serving(engine) as client:
        assert (await client.post(URL, json={"input": "Pay me!", "questions": [PREDICATE]})).status_code == 200
    assert text_of(engine, engine.submitted[0]).startswith("Pay me!\n\nQuestion: Is it urgent?")
    assert text_of(engine, engine.submitted[0]).endswith("\n\nReply:")


def asks(**question: Any) -> Json:
    return {"input": "x", "questions": [question]}


def states(**question: Any) -> Json:
    return {"state": "x", "questions": {"q": question}}


OPTIONS = [{"value": "a"}, {"value": "b"}]
DEEP: Json = {}
for _ in range(40):
    DEEP = {"a": DEEP}
WRONG: dict[str, tuple[str, Json, str | None, str]] = {
    "no input": (URL, {"questions": [PREDICATE]}, "input", "missing_required_parameter"),
    "empty input": (URL, {"input": "", "questions": [PREDICATE]}, "input", "invalid_value"),
    "no items": (URL, {"input": [], "questions": [PREDICATE]}, "input", "invalid_value"),
    "a number": (URL, {"input": 3, "questions": [PREDICATE]}, "input", "invalid_type"),
    "an image": (
        URL,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "questions": [PREDICATE]},
        "input[0].content",
        "unsupported_parameter",
    ),
    "deep JSON": (
        URL,
        {"input": [{"role": "user", "content": [{"type": "input_json", "data": DEEP}]}], "questions": [PREDICATE]},
        "input[0].content",
        "invalid_value",
    ),
    "no role": (URL, {"input": [{"content": "x"}], "questions": [PREDICATE]}, "input[0].role", "invalid_value"),
    "a role": (
        URL,
        {"input": [{"role": "boss", "content": "x"}], "questions": [PREDICATE]},
        "input[0].role",
        "invalid_value",
    ),
    "too long": (URL, {"input": "x" * 3000, "questions": [PREDICATE]}, "input", "context_length_exceeded"),
    "no questions": (URL, {"input": "x", "questions": []}, "questions", "invalid_value"),
    "too many": (URL, {"input": "x", "questions": [PREDICATE] * 401}, "questions", "invalid_value"),
    "a kind": (URL, asks(type="essay", instructions="x"), "questions[0].type", "invalid_value"),
    "no instructions": (URL, asks(type="predicate"), "questions[0].instructions", "missing_required_parameter"),
    "nothing asked": (URL, asks(type="predicate", instructions=" "), "questions[0].instructions", "invalid_value"),
    "no choices": (URL, asks(type="choice", instructions="x"), "questions[0].choices", "invalid_value"),
    "one choice": (
        URL,
        asks(type="choice", instructions="x", choices=OPTIONS[:1]),
        "questions[0].choices",
        "invalid_value",
    ),
    "too many choices": (
        URL,
        asks(type="choice", instructions="x", choices=[{"value": str(i)} for i in range(27)]),
        "questions[0].choices",
        "invalid_value",
    ),
    "twice": (
        URL,
        asks(type="choice", instructions="x", choices=OPTIONS[:1] * 2),
        "questions[0].choices",
        "invalid_value",
    ),
    "a value": (
        URL,
        asks(type="choice", instructions="x", choices=[{"value": 1}, {"value": "b"}]),
        "questions[0].choices[0].value",
        "invalid_type",
    ),
    "levels of a choice": (
        URL,
        asks(type="choice", instructions="x", choices=OPTIONS, levels=[{"label": "a"}, {"label": "b"}]),
        "questions[0].levels",
        "invalid_value",
    ),
    "eleven levels": (
        URL,
        asks(type="score", instructions="x", levels=[{"label": "a"}] * 11),
        "questions[0].levels",
        "invalid_value",
    ),
    "a field": (URL, asks(type="predicate", instructions="x", weight=1), "questions[0].weight", "invalid_value"),
    "joint": (URL, {"input": "x", "questions": [PREDICATE], "joint": True}, "joint", "unsupported_parameter"),
    "thinking": (
        URL,
        {"input": "x", "questions": [PREDICATE], "chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs.enable_thinking",
        "invalid_value",
    ),
    "streamed": (URL, {"input": "x", "questions": [PREDICATE], "tools": [{}]}, "tools", "unsupported_parameter"),
    "no state": (TWIN, {"questions": {"q": {"type": "noul"}}}, "state", "missing_required_parameter"),
    "null state": (TWIN, {"state": None, "questions": {"q": {"type": "noul"}}}, "state", "invalid_type"),
    "no named questions": (TWIN, {"state": "x", "questions": {}}, "questions", "invalid_value"),
    "a list": (TWIN, {"state": "x", "questions": [PREDICATE]}, "questions", "invalid_type"),
    "no options": (TWIN, states(type="choice"), "questions.q.criteria", "invalid_value"),
    "one level": (TWIN, states(type="score", criteria=["a"]), "questions.q.criteria", "invalid_value"),
    "null level": (TWIN, states(type="score", criteria=["a", None]), "questions.q.criteria", "invalid_type"),
    "other sides": (TWIN, states(type="noul", criteria={"maybe": "x"}), "questions.q.criteria", "invalid_value"),
    "an unknown field": (TWIN, states(type="noul", weight=2), "questions.q.weight", "invalid_value"),
    "images": (TWIN, {**states(type="noul"), "images": ["x"]}, "images", "unsupported_parameter"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_bad_field_is_named(what: str) -> None:
    url, body, param, code = WRONG[what]
    engine = FakeEngine(max_model_len=2048)
    async with serving(engine) as client:
        error = error_of(await client.post(url, json=body), 400)
        assert (error["param"], error["code"]) == (param, code), error
        assert not engine.submitted
        assert (await client.post(URL, json={"input": "x", "questions": [PREDICATE]})).status_code == 200


async def test_a_key_is_needed_as_everywhere() -> None:
    async with serving(FakeEngine(), api_key="secret") as client:
        for url in (URL, TWIN, "/v1/embeddings"):
            error_of(await client.post(url, json={}), 401)
