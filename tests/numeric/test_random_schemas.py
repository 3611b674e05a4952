"""Random schemas, followed by a model of random weights: whatever it draws, an answer that stops fits its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jsonschema
import pytest

from benchmarks.grammar_schemas import Schemas
from engine.grammar import Grammar
from engine.llm import LLM, Completion
from engine.types import FinishReason, SamplingParams
from server.structured import schema_text
from tests.tiny import byte_tokenizer, save_tiny

COUNT, LARGE = 300, 3000
MAX_TOKENS = 320
QUOTE = byte_tokenizer().encode('"').ids[0]  # made likelier: random weights would never find the end of a text


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = save_tiny("llama", tmp_path_factory.mktemp("random_schemas"))
    with LLM(str(folder), quant="none", memory="48MiB", threads=1, max_num_seqs=64) as llm:
        yield llm


def answers(llm: LLM, schemas: list[dict[str, object]], spacing: bool) -> list[Completion]:
    params = []
    for seed, schema in enumerate(schemas):
        text = (
            schema_text(schema, "schema")
            if spacing
            else json.dumps({**schema, "x-guidance": {"whitespace_pattern": ""}})
        )
        params.append(
            SamplingParams(MAX_TOKENS, 1.0, seed=seed, grammar=Grammar("json", text), logit_bias=((QUOTE, 4.0),))
        )
    return llm.generate([[seed % 256] for seed in range(len(schemas))], params)


def test_answers_that_stop_fit_their_schemas(llm: LLM, full: bool) -> None:
    source = Schemas(seed=1)
    schemas = [source.one() for _ in range(LARGE if full else COUNT)]
    stopped = 0
    for number, (schema, answer) in enumerate(zip(schemas, answers(llm, schemas, spacing=False), strict=True)):
        assert answer.finish in (FinishReason.STOP, FinishReason.LENGTH)
        if answer.finish is FinishReason.STOP:
            stopped += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
        else:
            assert len(answer.token_ids) == MAX_TOKENS, number
    assert stopped > 0.8 * len(schemas)


def test_white_space_is_bounded(llm: LLM) -> None:
    """Between two tokens stands a space, or a line break and some indentation, or nothing; nothing at the ends."""
    source = Schemas(seed=2)
    schemas = [source.one() for _ in range(24)]
    found = answers(llm, schemas, spacing=True)
    assert any("\n" in answer.text for answer in found)
    for answer in found:
        assert answer.text == answer.text.lstrip()
        assert "\n\n" not in answer.text and "\r" not in answer.text
        if answer.finish is FinishReason.STOP:
            json.loads(answer.text)
            assert answer.text == answer.text.rstrip()


def test_the_same_seed_gives_the_same_answers(llm: LLM) -> None:
    source = Schemas(seed=3)
    schemas = [source.one() for _ in range(8)]
    assert [one.token_ids for one in answers(llm, schemas, False)] == [
        one.token_ids for one in answers(llm, schemas, False)
    ]
