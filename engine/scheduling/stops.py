"""Where a sequence ends: the stops that are token ids and counts. Stop strings are the front process's."""

from __future__ import annotations

from typing import NamedTuple

from engine.scheduling.spans import canvas_end, canvas_span
from engine.types import Capacity, FinishReason, Request, Sequence


class Cut(NamedTuple):
    """The sequence ends with the first `kept` of a step's new tokens."""

    kept: int
    finish: FinishReason
    stop_token_id: int | None = None


def cut(seq: Sequence, new_tokens: tuple[int, ...]) -> Cut | None:
    """The end in the tokens that a sampling step drew, or None. A stop token itself counts; what follows it does not.

    The first `min_tokens` tokens can't stop a sequence, unless its grammar is complete: where it allows anything else,
    the pipeline has not drawn an end. An id that is end-of-sequence as well as the client's
    stop id counts as end-of-sequence. A stop on the very last token that fits is a stop, not a length.
    """
    if seq.request.reading is not None:
        return Cut(0, FinishReason.STOP)
    room = seq.limit - seq.num_tokens
    if not seq.stop_ids.isdisjoint(new_tokens):
        protected = seq.request.sampling.min_tokens - len(seq.output_ids)
        for index, token in enumerate(new_tokens[:room]):
            ends = token in seq.request.eos_ids
            if token in seq.stop_ids and (index >= protected or (ends and seq.request.sampling.grammar is not None)):
                return Cut(index + 1, FinishReason.STOP, None if ends else token)
    if len(new_tokens) >= room:
        return Cut(room, FinishReason.LENGTH)
    return None


def limit(request: Request, capacity: Capacity) -> int:
    """The most tokens, prompt included, that a request may have.

    The size of the pool is one of the bounds, as a guard (max_model_len should already fit it): a sequence that
    fills the whole pool by itself ends with LENGTH, as at the end of the context. Where whole blocks are denoised,
    the last one fits as a whole. A canvas is a bound as well.
    """
    most = min(capacity.max_model_len, capacity.num_blocks * capacity.block_size)
    if capacity.traits.canvas:
        most = min(most, canvas_end(request))
    elif capacity.traits.denoises:
        most -= most % capacity.traits.unit
    return min(len(request.prompt_ids) + max(0, request.sampling.max_tokens), most)


def never_fits(request: Request, capacity: Capacity, budget: int) -> str | None:
    """Why a request can never run, or None. The front checks first; this guard keeps the queue from hanging.

    `budget`: most tokens that one step may feed.
    """
    prompt = request.prompt_ids
    if not prompt:
        return "the prompt is empty"
    if min(prompt) < 0 or max(prompt) >= capacity.vocab_size:
        return f"the prompt holds token ids outside the vocabulary of {capacity.vocab_size}"
    needed = len(prompt) + (1 if request.sampling.max_tokens > 0 else 0)
    if needed > capacity.max_model_len:
        return f"the prompt of {len(prompt)} tokens leaves no room in the context of {capacity.max_model_len}"
    held = capacity.num_blocks * capacity.block_size
    if needed > held:
        return f"the prompt of {len(prompt)} tokens leaves no room in the KV cache, which holds {held} tokens"
    if capacity.traits.canvas:
        return _canvas_never_fits(request, capacity, budget)
    if limit(request, capacity) < needed:
        return f"the prompt of {len(prompt)} tokens leaves no room for a block of {capacity.traits.unit} tokens"
    return None


def _canvas_never_fits(request: Request, capacity: Capacity, budget: int) -> str | None:
    canvas, prompt = request.diffusion.canvas, len(request.prompt_ids)
    if request.sampling.max_tokens > 0 and min(canvas, request.diffusion.block_length) < 1:
        return "the request has no canvas"
    whole = canvas_span(request, capacity.traits)
    for needed, most, where in (
        (canvas_end(request), capacity.max_model_len, "the context"),
        (whole, capacity.num_blocks * capacity.block_size, "the KV cache"),
        (whole, budget, "a step, which runs them whole,"),
    ):
        if needed > most:
            return f"the prompt of {prompt} tokens and its canvas of {canvas} need {needed}, but {where} holds {most}"
    return None
