"""What a request's `diffusion` comes to at the model that serves it: rule, knobs, cache, blocks, canvas, steps.

Standard library only, and no rule is loaded: cards say what there is to know (`engine/diffusion.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from engine.config import DiffusionConfig, ModelConfig
from engine.diffusion import (
    BLOCK_LENGTHS,
    MAX_DRAFTER_STEPS,
    VERIFIES,
    DiffusionInfo,
    DiffusionParams,
    DiffusionSpec,
    RuleCard,
)
from engine.errors import ConfigError, InvalidRequest, shown
from engine.types import Capacity, ModelInfo, Request
from engine.verification import knob_names

_UNWEIGHED = ("trust", "exact")  # verifies that have no threshold


# ---- what a server offers --------------------------------------------------------------------------------


def settle_server(model: ModelConfig, capacity: Capacity) -> DiffusionInfo | None:
    """What requests to a model may choose from, and what holds where they do not; None for one that denoises nothing.

    Raises ConfigError that names the key.
    """
    spec, config = capacity.diffusion, model.diffusion
    if spec is None:
        if config is not None:
            raise ConfigError(f"models.diffusion: {model.name} is no diffusion model")
        return None
    config = config or DiffusionConfig()
    # A masked copy stands behind the canvas, where no position before it could predict it.
    offered = tuple(name for name in VERIFIES if not (spec.shift and name == "masked_copy"))
    verifies = offered if model.pipeline == "dual_diffusion" else ()
    info = DiffusionInfo(
        spec=spec,
        defaults=DiffusionParams(),
        rules=capacity.rules,
        verifies=verifies,
        max_canvas=capacity.max_canvas,
        drafter=config.drafter_name,
        caches=("dual",) if verifies else spec.caches,  # drafting is what the cache of one's own is for
        block_lengths=_block_lengths(spec, capacity),
        surplus=capacity.traits.unit - 1 if capacity.traits.canvas else 0,
    )
    rule = _server_rule(config, info)
    defaults = DiffusionParams(
        rule=rule.name,
        knobs=_server_knobs(config, rule),
        cache=_server_choice("cache", config.cache or info.caches[0], info.caches),
        block_length=_server_block(config, info),
        canvas=_server_canvas(model, info),
        steps=config.steps or 0,
        drafter_steps=config.drafter_steps if verifies else 0,
        verify=_server_choice("verify", config.verify, verifies) if verifies else "",
        verify_threshold=config.verify_threshold if verifies else -1.0,
    )
    return replace(info, defaults=defaults)


def _block_lengths(spec: DiffusionSpec, capacity: Capacity) -> tuple[int, int]:
    """A network that was trained for one length has no other; nor has a canvas that such a drafter helps to fill."""
    if capacity.traits.canvas and capacity.traits.unit > 1:
        return capacity.traits.unit, capacity.traits.unit
    return (spec.block_length, spec.block_length) if spec.block_causal else BLOCK_LENGTHS


def _server_rule(config: DiffusionConfig, info: DiffusionInfo) -> RuleCard:
    name = config.rule or info.spec.rule
    _server_choice("rule", name, tuple(card.name for card in info.rules))
    return next(card for card in info.rules if card.name == name)


def _server_knobs(config: DiffusionConfig, rule: RuleCard) -> tuple[tuple[str, float], ...]:
    knobs = {knob.name: knob for knob in rule.knobs}
    for name, value in config.knobs.items():
        if name not in knobs:
            raise ConfigError(
                f"models.diffusion.knobs.{name}: unknown to {rule.name}, which has {knob_names(rule.knobs)}"
            )
        if problem := knobs[name].problem(value):
            raise ConfigError(f"models.diffusion.knobs.{name}: {problem}, got {value!r}")
    return rule.settle(config.knobs)


def _server_choice(key: str, value: str, offered: Sequence[str]) -> str:
    if value not in offered:
        known = ", ".join(offered)
        raise ConfigError(f"models.diffusion.{key}: {value!r} is not offered by this model; it has {known}")
    return value


def _server_block(config: DiffusionConfig, info: DiffusionInfo) -> int:
    low, high = info.block_lengths
    own = low if low == high else info.spec.block_length
    if config.block_length is not None and not low <= config.block_length <= high:
        allowed = f"{low}, as it was trained for" if low == high else f"{low} to {high}"
        raise ConfigError(f"models.diffusion.block_length: {config.block_length}, but this model has {allowed}")
    return config.block_length or own


def _server_canvas(model: ModelConfig, info: DiffusionInfo) -> int:
    """Of requests that do not say `max_tokens`; a server that nobody told of canvases takes what there is room for."""
    canvas = (model.diffusion or DiffusionConfig()).canvas
    most = info.max_canvas - info.surplus - 1  # a prompt has at least one token
    if not info.max_canvas or canvas <= most:
        return canvas
    if model.diffusion is not None or most < 1:
        raise ConfigError(
            f"models.diffusion.canvas: {canvas} tokens and a prompt do not fit into one step of"
            f" {info.max_canvas}; raise scheduler.max_batched_tokens or lower the canvas"
        )
    return most


# ---- what a request comes to -----------------------------------------------------------------------------


def settle(request: Request, info: ModelInfo, param: str = "prompt") -> DiffusionParams:
    """A request's `diffusion` with all that a pipeline goes by; `validate` has checked its sampling and its prompt.

    What is left open is the server's. A model that denoises nothing takes no such settings. Raises InvalidRequest that
    names `diffusion.<field>`, or the sampling parameter that a diffusion model can't have; `param` is the client's name
    of the prompt.
    """
    asked, offer = request.diffusion, info.diffusion
    if offer is None:
        first = next((f.name for f in fields(asked) if getattr(asked, f.name) != f.default), None)
        if first is not None:
            name = shown(asked.knobs[0][0]) if first == "knobs" and asked.knobs else first
            raise _refused(name, "does nothing here: this model is autoregressive", supported=False)
        return asked
    _check_types(asked)
    _check_sampling(request, offer, param)
    rule = _rule(asked.rule or offer.defaults.rule, offer)
    server = dict(offer.defaults.knobs) if rule.name == offer.defaults.rule else {}
    settled = replace(
        _verifying(asked, offer),
        rule=rule.name,
        knobs=rule.settle({**server, **_given(asked, rule, offer)}),
        cache=_choice("cache", asked.cache or offer.defaults.cache, offer.caches),
        block_length=_block(asked, offer),
    )
    canvas = _canvas(request, settled, info, param)
    return replace(settled, canvas=canvas, steps=_steps(asked, rule, canvas, offer.defaults))


def _check_types(asked: DiffusionParams) -> None:
    """The offline caller may not have read the types; the server has checked what it parsed."""
    for name in ("rule", "cache", "verify"):
        if type(getattr(asked, name)) is not str:
            raise _refused(name, "must be a name")
    for name in ("block_length", "canvas", "steps", "drafter_steps"):
        value = getattr(asked, name)
        if type(value) is not int or value < 0:
            raise _refused(name, "must be an integer of at least 1")
    if isinstance(asked.verify_threshold, bool) or not isinstance(asked.verify_threshold, int | float):
        raise _refused("verify_threshold", "must be a number")
    for name in ("report", "trace"):
        if type(getattr(asked, name)) is not bool:
            raise _refused(name, "must be true or false")
    knobs: object = asked.knobs
    if not isinstance(knobs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in knobs):
        raise _refused("knobs", "must be pairs of a name and a number")


def _check_sampling(request: Request, offer: DiffusionInfo, param: str) -> None:
    """Refuse what needs tokens to come one after another, from the left to the right."""
    sampling, order = request.sampling, "this model fills the places of its answer in any order"
    for name, neutral in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
        if getattr(sampling, name) != neutral:
            raise _unsupported(name, f"can't be used here: it counts the tokens before a token, and {order}")
    if any(len(word) > 1 for word in sampling.bad_words):
        reason = f"may hold only words of one token here (with a space before it too): {order}"
        raise _unsupported("bad_words", reason)
    if sampling.prompt_logprobs is not None:
        reason = "can't be told here: a diffusion model has no probability of a token given those before it alone"
        raise _unsupported("prompt_logprobs", reason)
    if request.speculation.max_draft:
        raise _unsupported("speculation.max_draft", "does nothing here: this model denoises, nothing is drafted for it")
    mask_id = offer.spec.mask_id
    if mask_id in request.prompt_ids:
        where = request.prompt_ids.index(mask_id)
        reason = f"holds the token {mask_id} at index {where}, the mask of what is not written yet; it can't be given"
        raise InvalidRequest(f"{param} {reason}", param=param)
    if sampling.allowed_token_ids is not None and set(sampling.allowed_token_ids) <= {mask_id}:
        raise InvalidRequest(f"allowed_token_ids holds nothing but {mask_id}, the mask", param="allowed_token_ids")


def _rule(name: str, offer: DiffusionInfo) -> RuleCard:
    _choice("rule", name, tuple(card.name for card in offer.rules))
    return next(card for card in offer.rules if card.name == name)


def _given(asked: DiffusionParams, rule: RuleCard, offer: DiffusionInfo) -> dict[str, float]:
    """The request's own knobs, all of which the rule has, in their bounds."""
    knobs, given = {knob.name: knob for knob in rule.knobs}, {}
    for name, value in asked.knobs:
        if name not in knobs:
            owners = [other.name for other in offer.rules if any(knob.name == name for knob in other.knobs)]
            hint = f"; it belongs to {' and '.join(owners)}" if owners else ""
            reason = f"is no knob of the rule {rule.name!r}, which has {knob_names(rule.knobs)}{hint}"
            raise _refused(shown(str(name)), reason, supported=False)
        if problem := knobs[name].problem(value):
            raise _refused(name, problem)
        if name in given:
            raise _refused(name, "is given twice")
        given[name] = value
    return given


def _choice(field: str, name: str, offered: Sequence[str]) -> str:
    if name not in offered:
        raise _refused(field, f"{shown(name)!r} is not offered by this model; it has {', '.join(offered)}")
    return name


def _block(asked: DiffusionParams, offer: DiffusionInfo) -> int:
    low, high = offer.block_lengths
    block = asked.block_length or offer.defaults.block_length
    if not low <= block <= high:
        allowed = f"must be {low} here: this model has no other" if low == high else f"must be between {low} and {high}"
        raise _refused("block_length", allowed)
    return block


def _canvas(request: Request, settled: DiffusionParams, info: ModelInfo, param: str) -> int:
    """What the request asks for, or what `max_tokens` needs; rounded up to a block as far as there is room.

    Only `max_tokens` may be more than the context holds: there, every answer ends.
    """
    offer, asked, tokens = info.diffusion, request.diffusion.canvas, request.sampling.max_tokens
    assert offer is not None
    copy = settled.block_length if settled.verify == "masked_copy" else 0  # of a block, behind the canvas
    prompt, taken = len(request.prompt_ids), len(request.prompt_ids) + offer.surplus + copy
    # Blocks that are counted from position 0 are run whole, the last one that the context holds too.
    whole = info.max_model_len % settled.block_length if offer.spec.block_causal else 0
    context = info.max_model_len - whole - taken
    step = offer.max_canvas - taken if offer.max_canvas else context
    if min(context, step) < 1:
        held = "context holds" if context <= step else "steps take"
        reason = f"this server's {held} {min(context, step) + taken} tokens"
        message = f"{param} has {prompt} tokens, which leaves no room for an answer: {reason}"
        raise InvalidRequest(message, param=param, code="context_length_exceeded")
    if asked and asked < tokens:
        raise _refused("canvas", f"must be at least max_tokens, which is {tokens}")
    if asked > context:
        reason = f"the context of {context + taken} tokens holds the prompt's {prompt} too"
        raise _refused("canvas", f"must be at most {context}: {reason}")
    wanted = asked or min(tokens, context)
    if wanted > step:
        name = "diffusion.canvas" if asked else "max_tokens"
        reason = f"a canvas of {wanted} tokens behind the prompt's {prompt} is more than the {offer.max_canvas}"
        raise InvalidRequest(f"{name} must be at most {step}: {reason} that one step of this server takes", param=name)
    return min(-(-wanted // settled.block_length) * settled.block_length, context, step)


def _steps(asked: DiffusionParams, rule: RuleCard, canvas: int, server: DiffusionParams) -> int:
    """The server's own are of its canvas: a shorter one has as many in proportion. 0 is one token a step."""
    if asked.steps and not rule.scheduled:
        raise _refused("steps", f"does nothing with the rule {rule.name!r}, which has no schedule", supported=False)
    if asked.steps > canvas:
        raise _refused("steps", f"must be at most {canvas}, the tokens of the canvas")
    if asked.steps or not (rule.scheduled and server.steps):
        return asked.steps
    return min(canvas, max(1, round(server.steps * canvas / server.canvas)))


def _verifying(asked: DiffusionParams, offer: DiffusionInfo) -> DiffusionParams:
    """`asked` with its part about drafting and verifying settled."""
    if not offer.verifies:
        given = {"drafter_steps": asked.drafter_steps, "verify": asked.verify}
        first = next((name for name, wish in given.items() if wish), None)
        if first is not None or asked.verify_threshold >= 0:
            reason = "does nothing here: this model's answers are not drafted and verified"
            raise _refused(first or "verify_threshold", reason, supported=False)
        return asked
    steps = asked.drafter_steps or offer.defaults.drafter_steps
    if steps > MAX_DRAFTER_STEPS:
        raise _refused("drafter_steps", f"must be at most {MAX_DRAFTER_STEPS}")
    verify = _choice("verify", asked.verify or offer.defaults.verify, offer.verifies)
    threshold = asked.verify_threshold
    if threshold >= 0 and verify in _UNWEIGHED:
        raise _refused("verify_threshold", f"does nothing where `verify` is {verify!r}", supported=False)
    if not threshold <= 1:
        raise _refused("verify_threshold", "must be between 0 and 1")
    threshold = float(threshold) if threshold >= 0 else offer.defaults.verify_threshold
    return replace(asked, drafter_steps=steps, verify=verify, verify_threshold=threshold)


def _refused(field: str, reason: str, *, supported: bool = True) -> InvalidRequest:
    return _refusal(f"diffusion.{field}", reason, supported)


def _unsupported(name: str, reason: str) -> InvalidRequest:
    return _refusal(name, reason, supported=False)


def _refusal(name: str, reason: str, supported: bool) -> InvalidRequest:
    return InvalidRequest(f"{name} {reason}", param=name, code=None if supported else "unsupported_parameter")
