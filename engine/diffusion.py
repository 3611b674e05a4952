"""What a masked-diffusion model is, and what a request may choose of how it is decoded. Standard library only.

Positions are in tokens. Full-attention models (LLaDA, Dream) denoise a canvas of fixed length behind the prompt, block
by block, their blocks counted from the end of the prompt; block-causal ones (Fast-dLLM v2, SDAR) grow by blocks that
are counted from position 0, so that a block's KV is exact and final once its last token is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.verification import Knob, settle_knobs

FULL, BLOCK_CAUSAL = "full", "block_causal"
CACHES = {FULL: ("none", "prefix", "dual"), BLOCK_CAUSAL: ("block", "dual")}  # the first is exact
VERIFIES = ("trust", "exact", "confidence", "both", "masked_copy")  # what a verify step may take back
BLOCK_LENGTHS = (1, 1024)  # that requests may choose from, for full attention
MAX_DRAFTER_STEPS = 1024


@dataclass(frozen=True, slots=True)
class DiffusionSpec:
    """Of a checkpoint: what its network was trained for. `attention` is FULL or BLOCK_CAUSAL."""

    attention: str
    mask_id: int
    block_length: int = 32  # block-causal: as trained, and fixed; else where requests do not say
    sub_block: int = 0  # part of a block that is filled before the next (Fast-dLLM v2); 0: the whole block
    shift: bool = False  # the logits of a position predict the next one's token
    stop_ids: tuple[int, ...] = ()  # that end an answer, beside the tokenizer's own
    tempered: bool = False  # confidence is measured after temperature and truncation (Dream, v2), not before (LLaDA)
    dream_schedule: bool = False  # quotas of `steps` follow Dream's times, not equal shares
    rule: str = "threshold"  # where nobody says otherwise
    family: str = ""  # in words, for messages

    @property
    def block_causal(self) -> bool:
        return self.attention == BLOCK_CAUSAL

    @property
    def caches(self) -> tuple[str, ...]:
        return CACHES[self.attention]


@dataclass(frozen=True, slots=True)
class RuleCard:
    """A rule that says which masked positions are committed in a step. `measure` is what it ranks them by."""

    name: str
    text: str
    knobs: tuple[Knob, ...] = ()
    measure: str = "probability"  # of the chosen token; or margin (best two), entropy (negative), random
    scheduled: bool = False  # commits as many as `steps` asks for

    def settle(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """All knobs with their values, in declared order; `given` holds only names that are declared."""
        return settle_knobs(self.knobs, given)


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """How a request wants to be denoised. Empty and 0 are the server's; `validate` fills all of them in."""

    rule: str = ""
    knobs: tuple[tuple[str, float], ...] = ()  # of the rule, by their names
    cache: str = ""
    block_length: int = 0  # tokens
    canvas: int = 0  # tokens: room for the answer that is fixed before the start; full attention only
    steps: int = 0  # denoise steps of the whole canvas, for rules that are scheduled; 0: one token a step
    drafter_steps: int = 0  # `dual_diffusion`: denoise steps between two verify steps, at most
    verify: str = ""  # `dual_diffusion`: one of VERIFIES
    verify_threshold: float = -1.0  # `confidence` and `both`: what a token must have to stand; negative: the server's
    report: bool = False  # put a DiffusionReport into the answer
    trace: bool = False  # tell of each step what it did to the canvas (TokenEvent.canvas)


@dataclass(frozen=True, slots=True)
class DiffusionInfo:
    """What the front process knows of a served diffusion model."""

    spec: DiffusionSpec
    defaults: DiffusionParams  # the server's own, with nothing left open but `steps`
    rules: tuple[RuleCard, ...]
    verifies: tuple[str, ...] = ()  # what requests may choose from; empty where nothing is verified
    max_canvas: int = 0  # full attention: most tokens of prompt and canvas together, what one step may feed
    drafter: str = ""  # name of the drafter's checkpoint, where that is a model of its own
    caches: tuple[str, ...] = ()  # what requests may choose from
    block_lengths: tuple[int, int] = BLOCK_LENGTHS  # least and most that requests may ask for; equal where it is fixed
    surplus: int = 0  # positions past a canvas that steps may need


@dataclass(frozen=True, slots=True)
class CanvasStep:
    """What one step did to a request's open block, by absolute positions that rise.

    `turn` counts the steps that changed the block, from 1. A request that starts again repeats those of its open block
    under the same numbers, so whoever reads them in order can tell which ones it knows already.
    """

    start: int  # the block's first position, and the one behind its last
    stop: int
    turn: int
    filled: tuple[tuple[int, int], ...]  # (position, token); a token that gives way to another one is among these
    remasked: tuple[int, ...] = ()  # positions that have no token any more


@dataclass(frozen=True, slots=True)
class CanvasNews:
    """The same for a client: places count from the end of the prompt, and none lies behind the answer's end."""

    step: int  # of the request, from 1: those that changed what can be seen
    room: int  # places of the answer, if it does not end before
    block: tuple[int, int]  # the open block's first place, and the one behind its last
    filled: tuple[tuple[int, int], ...]  # (place, token)
    remasked: tuple[int, ...]
    end: int | None = (
        None  # the answer ends here as things stand, with a stop token or cut; places from here on are void
    )


@dataclass(frozen=True, slots=True)
class DiffusionReport:
    """What denoising one request took."""

    params: DiffusionParams  # as settled
    forwards: int = 0  # passes of the served model
    draft_forwards: int = 0  # passes of a drafter that is a model of its own
    verifies: int = 0  # passes that verified, of `forwards`
    remasked: int = 0  # tokens that verifying took back
    tokens: int = 0  # of the answer
