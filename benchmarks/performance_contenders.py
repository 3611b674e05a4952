"""Who is measured by `benchmarks.performance`: our formats with and without drafts, and the peers. Data, no code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from benchmarks import report
from benchmarks.peers.catalog import PEERS

Kind = Literal["ours", "server", "library"]
SINGLE, QUESTIONS, EIGHT, MANY, PREFIX = "single", "questions", "8 clients", "32 clients", "prefix"
ALL = (SINGLE, QUESTIONS, PREFIX, EIGHT, MANY)
FORMATS = ("int8", "int4", "fp16")
_PLAIN, _DRAFTING = "ar.yaml", "demo.yaml"  # of configs/


@dataclass(frozen=True, slots=True)
class Contender:
    """`quant` and `drafts` are of ours; a peer has its name in `peers.catalog`. `scenarios`: what it is asked."""

    name: str
    title: str
    kind: Kind
    quant: str = ""
    drafts: bool = False
    scenarios: tuple[str, ...] = ALL

    def command(self) -> tuple[str, ...]:
        """Ours alone; {port} stays open."""
        config = report.ROOT / "configs" / (_DRAFTING if self.drafts else _PLAIN)
        changes = ("--set", f"models.0.quant={self.quant}")
        return (sys.executable, "-m", "server", "serve", "--config", str(config), *changes, "--port", "{port}")


def ours(quant: str, drafts: bool) -> str:
    """The name of one of ours."""
    return f"{quant}-dflash" if drafts else quant


def _ours(quant: str, drafts: bool) -> Contender:
    return Contender(ours(quant, drafts), f"{quant}{', DFlash' if drafts else ''}", "ours", quant, drafts)


def _peer(name: str, kind: Kind, scenarios: tuple[str, ...] = ALL) -> Contender:
    return Contender(name, PEERS[name].title, kind, scenarios=scenarios)


# In the order they start: the last ones are left out first where memory is short. Who is not asked everything is slower
# there than another of its kind, and would take minutes of a round.
CONTENDERS = (
    _ours("int8", False),
    _ours("int8", True),
    _peer("llamacpp-q8_0", "server"),
    _peer("llamacpp-gguf", "server", (SINGLE, QUESTIONS, PREFIX, EIGHT)),
    _peer("openvino-int8", "library"),
    _peer("openvino-int4", "library"),
    _peer("vllm", "server"),
    _ours("int4", False),
    _ours("int4", True),
    _ours("fp16", False),
    _ours("fp16", True),
    _peer("openvino-fp32", "library"),
    _peer("llamacpp-f16", "server", (SINGLE, QUESTIONS, PREFIX)),
    _peer("transformers", "server", (SINGLE, PREFIX)),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
