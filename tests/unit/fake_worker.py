"""A worker without torch or weights whose answers can be told in advance, and a checkpoint folder to go with it.

Token ids are bytes. After n tokens the "model" says the letter n % 26, so a prompt of 26 tokens is continued with
"abcd...". Three control bytes in a prompt make it misbehave. A FIFO named `gate` in the folder holds every step
until a byte is written to it: tests stop an engine process at the step they want, without sleeping.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import InvalidRequest, ModelLoadError
from engine.types import (
    Admission,
    Capacity,
    DecodeTraits,
    Phase,
    Request,
    ScheduledSeq,
    SeqResult,
    StepOutput,
    StepPlan,
    TokenLogprob,
)
from engine.verification import Knob, VerifierCard

EOS = 256
VOCAB_SIZE = 257
VERIFIERS = (
    VerifierCard("strict", True, "exact", exact=True),
    VerifierCard("ensemble", False, "a mixture", (Knob("target_weight", 0.7, 0.0, 1.0, "weight", neutral=1.0),)),
    VerifierCard("typical", False, "without a bound"),
)
FAIL_SUBMIT, FAIL_RESULT, FAIL_REQUEST, EARLY_EOS = 1, 2, 3, 4  # in a prompt


def letter(position: int) -> int:
    return ord("a") + position % 26


def answer(prompt_tokens: int, max_tokens: int) -> str:
    """What the fake model says to a prompt of that many tokens."""
    return "".join(chr(letter(prompt_tokens + i)) for i in range(max_tokens))


def write_checkpoint(folder: Path, *, gate: bool = False, **script: int) -> Path:
    """A folder that `hub.resolve` accepts; `script` sets fields of Script."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "eos_token_id": EOS, "vocab_size": VOCAB_SIZE})
    )
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": _TEMPLATE}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "fake.json").write_text(json.dumps(script))
    if gate:
        os.mkfifo(folder / "gate")
    return folder


_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def _tokenizer() -> dict[str, object]:
    """A byte-level BPE without merges in which the id of a byte is the byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelled = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": EOS, "content": "<eos>", **special}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: byte for byte, text in spelled.items()}, "merges": []},
    }


@dataclass(frozen=True)
class Script:
    num_blocks: int = 256
    block_size: int = 4
    max_model_len: int = 512
    lookahead: int = 0  # a step says this many tokens more than one: drafts that all stand
    drafts: int = 0  # these are drafts that requests may do without, or have verified by `ensemble`: a bias of 1/4 each
    refuse: int = 0  # loading fails


@dataclass
class State:
    admission: Admission
    tokens: list[int] = field(default_factory=list)
    computed: int = 0


@dataclass(frozen=True)
class Done:
    output: StepOutput
    error: Exception | None = None

    def result(self) -> StepOutput:
        if self.error is not None:
            raise self.error
        return self.output


class Gate:
    """The test's end of a folder's gate: shut at first."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "gate", os.O_RDWR | os.O_NONBLOCK)

    def allow(self, steps: int = 1) -> None:
        os.write(self._fd, bytes(steps))

    def open(self) -> None:
        self.allow(4096)

    def shut(self) -> None:
        """Steps under way finish; the next one waits."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 4096):
                pass

    def close(self) -> None:
        os.close(self._fd)


class FakeWorker:
    def __init__(self, _config: EngineConfig, folder: Path, on_phase: Callable[[Phase], None]) -> None:
        self.folder = folder
        self.script = Script(**json.loads((folder / "fake.json").read_text()))
        if self.script.refuse:
            raise ModelLoadError("scripted refusal")
        self.states: dict[str, State] = {}
        gate = folder / "gate"
        self.gate = os.open(gate, os.O_RDONLY) if gate.exists() else None
        on_phase(Phase("fake weights", 0.0, 0))

    def capacity(self) -> Capacity:
        script = self.script
        traits = DecodeTraits(lookahead=script.lookahead, drafts=bool(script.drafts))
        verifiers = VERIFIERS if script.drafts else ()
        size = script.num_blocks, script.block_size, script.max_model_len, VOCAB_SIZE
        return Capacity(*size, traits, verifiers=verifiers)

    def prepare(self, request: Request) -> None:
        """A grammar's text says what becomes of it: "refused", "broken", or the name of a gate to wait for."""
        grammar = request.sampling.grammar
        if grammar is None:
            return
        if grammar.text == "refused":
            raise InvalidRequest("scripted refusal of a grammar")
        if grammar.text == "broken":
            raise RuntimeError("scripted failure of a compiler")
        gate = self.folder / grammar.text
        if gate.exists():
            end = os.open(gate, os.O_RDONLY)
            os.read(end, 1)
            os.close(end)

    def submit(self, plan: StepPlan) -> Done:
        for request_id in plan.dropped:
            self.states.pop(request_id, None)
        for admission in plan.admitted:
            tokens = [*admission.request.prompt_ids, *admission.output_ids]
            self.states[admission.request.id] = State(admission, tokens)
        if plan.items and self.gate is not None:
            os.read(self.gate, 1)
        prompts = [self.states[item.request_id].admission.request.prompt_ids for item in plan.items]
        if any(FAIL_SUBMIT in prompt for prompt in prompts):
            raise RuntimeError("scripted failure of submit")
        output = StepOutput(plan.step, tuple(self._one(item) for item in plan.items))
        failed = any(FAIL_RESULT in prompt for prompt in prompts)
        return Done(output, RuntimeError("scripted failure of result") if failed else None)

    def num_states(self) -> int:
        return len(self.states)

    def close(self) -> None:
        if self.gate is not None:
            os.close(self.gate)

    def _one(self, item: ScheduledSeq) -> SeqResult:
        state = self.states[item.request_id]
        request = state.admission.request
        start = state.computed if item.pending else item.start
        end = len(state.tokens) if item.pending else start + len(item.tokens)
        assert item.pending or list(item.tokens) == state.tokens[start:end]
        assert end <= len(item.block_ids) * self.script.block_size
        state.computed = end
        if FAIL_REQUEST in request.prompt_ids:
            return SeqResult(item.request_id, (), end, error="scripted failure of one request")
        scored = None
        if request.sampling.prompt_logprobs is not None and start < len(request.prompt_ids) - 1:
            following = request.prompt_ids[start + 1 : end + 1]
            scored = tuple(TokenLogprob(token, -0.5, 1) for token in following)
        if end < len(state.tokens):
            return SeqResult(item.request_id, (), end, prompt_logprobs=scored)
        drafted = item.lookahead
        new = [letter(end + i) for i in range(drafted + 1)]
        if EARLY_EOS in request.prompt_ids and end >= len(request.prompt_ids) + 2:
            new = [EOS]
        state.tokens += new
        state.computed = len(state.tokens) - 1
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = tuple(TokenLogprob(token, -0.25, 1) for token in new)
        relaxed = request.speculation.bias_bound > 0
        bias = (*(0.25,) * drafted, 0.0)[: len(new)] if relaxed else ()
        return SeqResult(item.request_id, tuple(new), state.computed, logprobs, scored, drafted, drafted, bias=bias)
