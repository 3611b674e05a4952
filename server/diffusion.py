"""The `diffusion` extension: how a request wants to be denoised, and what its answer and its model tell of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from engine.diffusion import DiffusionInfo, DiffusionParams, DiffusionReport, RuleCard
from engine.types import ModelInfo, TokenEvent
from server.contract import Tokenizer
from server.errors import ApiError, refused, shorten
from server.schemas import GenerationBody, default
from server.schemas_diffusion import RULE_KNOBS, Diffusion

DIGITS = 3  # of tokens per forward pass


def diffusion_params(asked: Diffusion | None, info: ModelInfo) -> DiffusionParams:
    """What the client asks for, to be checked and completed by the engine (`engine/denoising.py`).

    Raises ApiError 400 for a setting that nobody knows.
    """
    if asked is None:
        return DiffusionParams()
    rules = info.diffusion.rules if info.diffusion is not None else ()
    declared = {*RULE_KNOBS, *(knob.name for card in rules for knob in card.knobs)}
    knobs = {name: value for name in RULE_KNOBS if (value := getattr(asked, name)) is not None}
    for name, value in (asked.model_extra or {}).items():
        if value is None:
            continue
        where = f"diffusion.{shorten(name, 64)}"
        if name not in declared:
            reason = f"there is no such setting here; known: {', '.join(Diffusion.model_fields)}"
            raise refused(where, reason)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ApiError(400, f"Invalid value for '{where}': must be a number.", param=where, code="invalid_type")
        knobs[name] = value
    return DiffusionParams(
        rule=asked.rule or "",
        knobs=tuple(knobs.items()),
        cache=asked.cache or "",
        block_length=asked.block_length or 0,
        canvas=asked.canvas or 0,
        steps=asked.steps or 0,
        drafter_steps=asked.drafter_steps or 0,
        verify=asked.verify or "",
        verify_threshold=default(asked.verify_threshold, -1.0),
        report=bool(asked.report),
        trace=bool(asked.trace),
    )


def answer_length(body: GenerationBody, info: ModelInfo, otherwise: int) -> int:
    """Tokens of an answer whose request does not say `max_tokens`: the canvas it asks for, else `otherwise`."""
    asked = body.diffusion.canvas if body.diffusion is not None and info.diffusion is not None else None
    return default(asked, otherwise)


def check_echo(info: ModelInfo) -> None:
    """Raises ApiError 400 for the log-probabilities of a prompt, which only a model of the next token has."""
    if info.diffusion is not None:
        reason = "with 'echo' it asks for log-probabilities of the prompt, which a diffusion model does not have"
        raise refused("logprobs", reason)


def diffusion_fields(reports: Iterable[DiffusionReport]) -> dict[str, object]:
    """The answer's `diffusion`: sums over its choices, which differ in nothing that is settled."""
    reports = tuple(reports)
    params, tokens = reports[0].params, sum(report.tokens for report in reports)
    sums = {
        name: sum(getattr(report, name) for report in reports)
        for name in ("forwards", "draft_forwards", "verifies", "remasked")
    }
    passes = sums["forwards"] + sums["draft_forwards"]
    return {
        "rule": params.rule,
        "knobs": dict(params.knobs),
        "cache": params.cache,
        "block_length": params.block_length,
        "canvas": params.canvas,
        "steps": params.steps or None,
        "drafter_steps": params.drafter_steps or None,
        "verify": params.verify or None,
        "verify_threshold": params.verify_threshold if params.verify else None,
        **sums,
        "tokens_per_forward": round(tokens / passes, DIGITS) if passes else 0.0,
    }


def canvas_fields(event: TokenEvent, tokenizer: Tokenizer) -> dict[str, object]:
    """A choice's `diffusion`, where the request asked for a trace: what each step filled in and took back.

    Special tokens, such as the one that ends an answer, have no text.
    """

    def spell(token: int) -> str:
        return "" if tokenizer.is_special(token) else tokenizer.token_text(token)

    steps = [
        {
            "step": news.step,
            "block": news.block,
            "filled": [(place, token, spell(token)) for place, token in news.filled],
            "remasked": news.remasked,
            "end": news.end,
        }
        for news in event.canvas
    ]
    return {"room": event.canvas[0].room if event.canvas else None, "steps": steps}


def diffusion_card(info: ModelInfo) -> dict[str, object] | None:
    """What a model's entry in /v1/models says: None where nothing is denoised. The values are the server's own."""
    offer = info.diffusion
    if offer is None:
        return None
    own = offer.defaults
    return {
        "attention": offer.spec.attention,
        "rule": own.rule,
        "knobs": dict(own.knobs),
        "cache": own.cache,
        "block_length": own.block_length,
        "block_lengths": list(offer.block_lengths),
        "canvas": own.canvas,
        "max_canvas": min(offer.max_canvas, info.max_model_len) or None,
        "steps": own.steps or None,
        "drafter": offer.drafter or None,
        "drafter_steps": own.drafter_steps or None,
        "verify": own.verify or None,
        "verify_threshold": own.verify_threshold if own.verify else None,
        "caches": list(offer.caches),
        "verifies": list(offer.verifies),
        "rules": [_rule_card(card, offer) for card in offer.rules],
    }


def _rule_card(card: RuleCard, offer: DiffusionInfo) -> dict[str, object]:
    """`default` is what a request gets that does not say."""
    server = dict(offer.defaults.knobs) if card.name == offer.defaults.rule else {}
    knobs = [
        {name: value for name, value in asdict(knob).items() if name != "neutral"}
        | {"default": server.get(knob.name, knob.default)}
        for knob in card.knobs
    ]
    return {"name": card.name, "text": card.text, "scheduled": card.scheduled, "knobs": knobs}
