"""What a request that reads is checked for: the part of `validate` that is about `Request.reading`."""

from __future__ import annotations

from dataclasses import replace

from engine.diffusion import DiffusionParams
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.reading import MAX_PROBED_IDS, MAX_PROBES, POOLINGS, Probe, Reading
from engine.types import ModelInfo, Request, SamplingParams, SpeculationParams

NOTHING = SamplingParams(max_tokens=0, temperature=0.0)


def settle_reading(request: Request, info: ModelInfo, param: str) -> Request:
    """The request as it can be run; nothing is drawn, drafted or denoised for it.

    `param` is the client's name of the prompt, whose ids are checked already. Raises InvalidRequest, and
    ContextLengthExceeded for a prompt that does not fit the context, or one step of a model that reads whole prompts.
    """
    reading, length = request.reading, len(request.prompt_ids)
    assert reading is not None
    step = 0 if info.diffusion is None else max(0, info.diffusion.max_canvas - info.diffusion.surplus)
    most = min(info.max_model_len, step or info.max_model_len)
    if length > most:
        raise ContextLengthExceeded(most, length, 0, param)
    if reading.pooling not in ("", *POOLINGS):
        raise InvalidRequest(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
    if not (reading.pooling or reading.probes):
        raise InvalidRequest("reading asks for nothing", param="reading")
    if len(reading.probes) > MAX_PROBES:
        raise InvalidRequest(f"reading may have at most {MAX_PROBES} probes", param="reading")
    for probe in reading.probes:
        _check_probe(probe, request, info)
    _check_masks(reading, request, info, param)
    return replace(request, sampling=NOTHING, speculation=SpeculationParams(enabled=False), diffusion=DiffusionParams())


def _check_probe(probe: Probe, request: Request, info: ModelInfo) -> None:
    ids, length = probe.token_ids, len(request.prompt_ids)
    if not 0 < len(ids) <= MAX_PROBED_IDS or not all(type(i) is int and 0 <= i < info.vocab_size for i in ids):
        raise InvalidRequest(f"a probe must have 1 to {MAX_PROBED_IDS} ids of the vocabulary", param="reading")
    last = length if info.diffusion is None else length - 1
    first = 1 if info.diffusion is None or info.diffusion.spec.shift else 0
    if type(probe.position) is not int or not first <= probe.position <= last:
        raise InvalidRequest(f"a probe must be at a position from {first} to {last}", param="reading")
    if info.diffusion is not None and request.prompt_ids[probe.position] != info.diffusion.spec.mask_id:
        raise InvalidRequest(f"a probe is at position {probe.position}, where there is no mask", param="reading")


def _check_masks(reading: Reading, request: Request, info: ModelInfo, param: str) -> None:
    """Text that is pooled can't hold what stands for no text."""
    if info.diffusion is None or not reading.pooling:
        return
    mask_id = info.diffusion.spec.mask_id
    if mask_id in request.prompt_ids:
        where = request.prompt_ids.index(mask_id)
        message = f"{param} holds the token {mask_id} at index {where}, the mask of what is not written yet"
        raise InvalidRequest(message, param=param)
