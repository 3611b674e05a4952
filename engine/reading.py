"""Requests that read a model and write nothing: a pooled vector of the prompt, or laws at chosen places of it.

Standard library only. Such a request ends when its prompt is computed; it has no tokens, and its last update carries a
`Readout`. A prompt of a model that denoises may hold masks, and its laws are those of the masked places.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.records import record

MEAN, LAST = "mean", "last"
POOLINGS = (MEAN, LAST)
MAX_PROBES = 512  # of one request
MAX_PROBED_IDS = 1024  # of one probe


@dataclass(frozen=True, slots=True)
class Probe:
    """The law of the token at `position`, counted from 0: of which of its tokens the log-probabilities are wanted.

    Of an autoregressive model it is the law of what follows the prompt's first `position` tokens: 1 to the prompt's
    length. A model that denoises has a mask there.
    """

    position: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read. `pooling`: of the hidden states that the output head reads, their mean over the prompt or the last
    one; empty: neither. A `normalize`d vector has length 1."""

    pooling: str = ""
    normalize: bool = True
    probes: tuple[Probe, ...] = ()

    def first_needed(self, length: int) -> int:
        """The first position of a prompt of so many tokens that must be computed: cached KV serves for those before."""
        if self.pooling == MEAN:
            return 0
        ends = [probe.position for probe in self.probes]  # a law that is not shifted stands one position further
        return max(0, min((*ends, length)) - 1)


@record
class Law:
    """What a probe found: log-probabilities of its tokens, in their order, and the token that is most likely of all."""

    logprobs: tuple[float, ...]
    best: int


@record
class Readout:
    """`vector`: float32, little-endian, as wide as the model; empty where no pooling was asked for."""

    vector: bytes = b""
    laws: tuple[Law, ...] = ()  # of the probes, in their order
