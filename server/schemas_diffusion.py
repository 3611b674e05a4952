"""The `diffusion` extension of a request, for models that denoise. What is wrong in it is told by `diffusion.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


def _bounds(low: float, high: float) -> FieldInfo:
    """Bounds to be read. The engine checks them, and to which rule a knob belongs, by the rules themselves."""
    found: FieldInfo = Field(json_schema_extra={"minimum": low, "maximum": high})
    return found


Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
RULE_KNOBS = ("threshold", "factor", "delta")  # the knobs of the rules, by their names in `Diffusion`


class Diffusion(BaseModel):
    """How to denoise the answer to this request. A model that does not denoise takes none of it."""

    # What else is sent is refused by `diffusion_params`, which knows what to say of it; null stays "not given".
    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )

    rule: Name | None = Field(
        None,
        description="Which masked positions a step commits: a name that the model's entry in /v1/models lists, with its"
        " knobs. Default: the server's.",
    )
    threshold: Annotated[float, _bounds(0, 2)] | None = Field(
        None, description="Of `threshold` and `dynamic`: how likely a token must be to be committed. Above 1 none is."
    )
    factor: Annotated[float, _bounds(0, 64)] | None = Field(
        None,
        description="Of `factor` and `factor_compat`: n tokens are committed together while (n + 1) times the doubt of"
        " the least likely one is at most this.",
    )
    delta: Annotated[float, _bounds(-8, 8)] | None = Field(
        None,
        description="Of `frechet`: how far the bound on all committed tokens being right together must stay above that"
        " on any other choice. 0 is the bound itself, more is safer and slower.",
    )
    cache: Name | None = Field(
        None,
        description="What a step does not compute anew: none, prefix or dual for full attention, block or dual for"
        " block-causal models. The first of the model's entry in /v1/models is exact. Default: the server's.",
    )
    block_length: Positive | None = Field(
        None, description="Tokens that are filled before the next ones are begun. Block-causal models have their own."
    )
    canvas: Positive | None = Field(
        None,
        description="Tokens of room for the answer, fixed before it begins, and rounded up to a block; at least"
        " `max_tokens`, and its value where that is not given. Default: `max_tokens`.",
    )
    steps: Positive | None = Field(
        None,
        description="Denoise steps of the whole canvas, for rules with a schedule. Default: the server's, in"
        " proportion to the canvas; else one token a step.",
    )
    drafter_steps: Positive | None = Field(
        None, description="Of models that draft and verify: most denoise steps between two verify steps."
    )
    verify: Name | None = Field(
        None, description="Of models that draft and verify: what a verify step may take back, as listed in /v1/models."
    )
    verify_threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Of models that draft and verify: how likely a drafted token must be to stand."
    )
    report: bool | None = Field(
        None,
        description="Put an object `diffusion` into the answer: how it was denoised, and in how many forward passes.",
    )
    trace: bool | None = Field(
        None,
        description="Put an object `diffusion` into each choice: what every step filled in, and took back. In a stream"
        " it comes with the steps, also where none of their text can be sent yet.",
    )
