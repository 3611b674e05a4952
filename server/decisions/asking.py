"""From questions to requests that read: one prompt for each question, or one canvas for all of them.

The prompts of a request begin alike, with what the questions are about, and that is computed once. A model that
denoises has a mask where its answer would begin; asked jointly, it has one behind the number of each question.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.reading import MAX_PROBES, Probe, Reading
from engine.types import Request
from server.contract import Engine
from server.decisions.labels import Labels, tail_of
from server.decisions.questions import Question, Weighed, weigh
from server.embeddings import NOTHING
from server.errors import ApiError, invalid
from server.prompts import INLINE_CHARS, check_length, in_thread_if
from server.reads import Read
from server.service import Service

MAX_RENDERED = 32 << 20  # characters of all prompts together
_PLAIN_REPLY = "\n\nReply:"
_JOINT_REPLY = "Reply with one line for each question: its number, a colon and the answer to it."

Groups = list[tuple[int, ...]]  # the tokens of each option of a question


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked. `param` is the client's name of `state`, which the questions are about."""

    state: str
    questions: Sequence[Question]
    param: str
    instructions: str = ""
    template: Mapping[str, object] | None = None  # variables of the chat template
    joint: bool = False
    cache_salt: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """`groups` are of the questions, in their order; requests read one question each, or all."""

    requests: tuple[Request, ...]
    groups: list[Groups]

    def weighed(self, reads: Sequence[Read]) -> list[Weighed]:
        laws = [law for read in reads for law in read.readout.laws]
        return [weigh(groups, law.logprobs, law.best) for groups, law in zip(self.groups, laws, strict=True)]


async def ask(case: Case, engine: Engine, service: Service) -> Asked:
    """Raises ApiError and InvalidRequest."""
    check_length(len(case.state) + len(case.instructions), engine, service, case.param)
    if case.joint and engine.info.diffusion is None:
        message = "Unsupported parameter: 'joint': this model writes one token after another; it can't fill a canvas."
        raise ApiError(400, message, param="joint", code="unsupported_parameter")
    if case.joint and len(case.questions) > MAX_PROBES:
        raise invalid("joint", f"a canvas may have at most {MAX_PROBES} questions")
    prompts = [question.prompt() for question in case.questions]
    size = len(case.state) * (1 if case.joint else len(prompts)) + sum(map(len, prompts))
    if size > MAX_RENDERED:
        message = f"all prompts together have {size} characters, more than {MAX_RENDERED}: ask fewer at once"
        raise invalid("questions", message)
    made = _jointly if case.joint else _one_by_one
    return await in_thread_if(size > INLINE_CHARS, lambda: made(case, engine))


def _one_by_one(case: Case, engine: Engine) -> Asked:
    job_id, diffusion = f"decision-{secrets.token_hex(16)}", engine.info.diffusion
    labels: dict[str, Labels] = {}
    requests, found = [], []
    for index, question in enumerate(case.questions):
        ids = _encoded(case, f"{case.state}\n\n{question.prompt()}", engine)
        tail = tail_of(ids, engine.tokenizer)
        groups = labels.setdefault(tail, Labels(engine.tokenizer, tail)).groups(
            [option.label for option in question.options], question.where
        )
        probe = Probe(len(ids), tuple(id_ for group in groups for id_ in group))
        if diffusion is not None:
            ids = _with_masks(ids, engine)
        found.append(groups)
        requests.append(_request(f"{job_id}-{index}", ids, (probe,), case, index, job_id))
    return Asked(tuple(requests), found)


def _jointly(case: Case, engine: Engine) -> Asked:
    spec = engine.info.diffusion
    assert spec is not None
    asked = [question.numbered(number) for number, question in enumerate(case.questions, start=1)]
    ids = _encoded(case, "\n\n".join((case.state, *asked, _JOINT_REPLY)), engine)
    found, probes = [], []
    for number, question in enumerate(case.questions, start=1):
        line = f"{number}:"
        groups = Labels(engine.tokenizer, line).groups([option.label for option in question.options], question.where)
        ids += engine.tokenizer.encode(line if number == 1 else f"\n{line}", add_special_tokens=False)
        probes.append(Probe(len(ids), tuple(id_ for group in groups for id_ in group)))
        ids.append(spec.spec.mask_id)
        found.append(groups)
    job_id = f"decision-{secrets.token_hex(16)}"
    return Asked((_request(f"{job_id}-0", _padded(ids, engine), tuple(probes), case, 0, ""),), found)


def _encoded(case: Case, text: str, engine: Engine) -> list[int]:
    """The prompt up to where the reply begins. A model without a chat template reads plain text."""
    tokenizer = engine.tokenizer
    if not tokenizer.has_chat_template:
        head = f"{case.instructions}\n\n" if case.instructions else ""
        return tokenizer.encode(f"{head}{text}{_PLAIN_REPLY}")
    messages = [{"role": "user", "content": text}]
    if case.instructions:
        messages.insert(0, {"role": "system", "content": case.instructions})
    try:
        return tokenizer.encode_chat(messages, template={"enable_thinking": False, **(case.template or {})})
    except InvalidRequest as error:  # of messages that the client has not written
        param = case.param if error.param == "messages" else error.param
        raise InvalidRequest(error.message, param, error.code) from error


def _with_masks(ids: list[int], engine: Engine) -> list[int]:
    diffusion = engine.info.diffusion
    assert diffusion is not None
    return _padded([*ids, diffusion.spec.mask_id], engine)


def _padded(ids: list[int], engine: Engine) -> list[int]:
    """A block-causal model denoises whole blocks: what follows in the last one is not written yet, either."""
    diffusion = engine.info.diffusion
    assert diffusion is not None
    spec = diffusion.spec
    missing = -len(ids) % spec.block_length if spec.block_causal else 0
    return ids + [spec.mask_id] * missing


def _request(id_: str, ids: list[int], probes: tuple[Probe, ...], case: Case, choice: int, group: str) -> Request:
    """Requests of one group wait for the first of them, so that they find what it has computed."""
    return Request(
        id_,
        tuple(ids),
        NOTHING,
        choice=choice,
        group=group,
        priority=case.priority,
        cache_salt=case.cache_salt,
        reading=Reading(probes=probes),
    )
