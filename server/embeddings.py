"""POST /v1/embeddings: from a body to reads, and from what they read to vectors."""

from __future__ import annotations

import base64
import secrets
import sys
import time
from array import array
from collections.abc import Sequence

from engine.errors import ContextLengthExceeded
from engine.reading import MEAN, Reading
from engine.types import Request, SamplingParams
from server import unsupported
from server.answers import Fields
from server.contract import Engine
from server.errors import ApiError, invalid
from server.prompts import INLINE_CHARS, Prompt, check_length, check_limit, cut, in_thread_if
from server.reads import Read
from server.schemas import default
from server.schemas_reading import EmbeddingBody
from server.service import Service

NOTHING = SamplingParams(max_tokens=1, temperature=0.0)  # a request that reads has no use for any


async def embedding_requests(body: EmbeddingBody, engine: Engine, service: Service) -> tuple[Request, ...]:
    """One for each input, in their order. Raises ApiError."""
    unsupported.check(body, 1, service.unknown_fields)
    if body.dimensions is not None:
        message = "Unsupported parameter: 'dimensions': this model was not trained to have its vectors cut."
        raise ApiError(400, message, param="dimensions", code="unsupported_parameter")
    prompts = [cut(prompt, body, engine.info, 0) for prompt in await _encode(body, engine, service)]
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > engine.info.max_model_len:  # else it would be seen when its turn comes
        raise ContextLengthExceeded(engine.info.max_model_len, longest, 0, "input")
    most, total = service.settings.max_input_tokens, sum(len(prompt.ids) for prompt in prompts)
    if total > most:
        raise invalid("input", f"all inputs together may have at most {most} tokens; they have {total}")
    reading, job_id = Reading(body.pooling or MEAN, default(body.normalize, True)), f"embd-{secrets.token_hex(16)}"
    return tuple(
        Request(
            f"{job_id}-{index}",
            prompt.ids,
            NOTHING,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            reading=reading,
        )
        for index, prompt in enumerate(prompts)
    )


async def _encode(body: EmbeddingBody, engine: Engine, service: Service) -> Sequence[Prompt]:
    single = isinstance(body.input, str) or isinstance(body.input[0], int)
    given: Sequence[str | list[int]] = [body.input] if single else body.input  # type: ignore[list-item, assignment]
    check_limit("input", len(given), service.settings.max_inputs, "entries")
    for index, item in enumerate(given):
        if len(item) == 0:
            raise invalid("input" if single else f"input[{index}]", "an input is empty")
        if isinstance(item, str):
            check_length(len(item), engine, service, "input")
    special = default(body.add_special_tokens, True)

    def encode() -> list[Prompt]:
        return [
            Prompt(tuple(engine.tokenizer.encode(item, add_special_tokens=special) if isinstance(item, str) else item))
            for item in given
        ]

    return await in_thread_if(sum(map(len, given)) > INLINE_CHARS, encode)


def embedding_answer(body: EmbeddingBody, engine: Engine, reads: Sequence[Read]) -> Fields:
    """The body of the answer, in OpenAI's shape."""
    vector = _base64 if body.encoding_format == "base64" else _floats
    tokens = sum(read.usage.prompt_tokens for read in reads)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector(read.readout.vector)}
            for index, read in enumerate(reads)
        ],
        "model": default(body.model, engine.info.id),
        "created": int(time.time()),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _floats(vector: bytes) -> list[float]:
    found = array("f", vector)
    if sys.byteorder == "big":
        found.byteswap()
    return found.tolist()
