"""The check of attention windows that are wider than the self-check's sequences.

A window of 4096 tokens hides nothing from 29, so a layer that loses its window would pass the self-check and give wrong
text in long requests. Here every window is narrowed to a few tokens, in the configuration (from which the model's own
eager forward makes its masks) and in the modules (which tell the attention function), and the two are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PretrainedConfig, PreTrainedModel

from engine.errors import ModelLoadError
from engine.models import selfcheck
from engine.models.adapter import DecoderAdapter
from engine.models.support import context_length, text_config
from engine.protocols import AttentionBackend
from engine.runtime.kv_cache import LayerShape

NARROW = 5  # tokens


def check_windows(
    adapter: DecoderAdapter,
    shapes: tuple[LayerShape, ...],
    backend: AttentionBackend,
    dtype: torch.dtype,
    tolerance: float,
) -> int:
    """How many windows there were to check; call before anything is replaced. Raises ModelLoadError if one is lost.

    Windows of the whole context or more hide nothing, and those within the self-check's sequences are seen there.
    """
    config = adapter.model.config
    declared = {size for part in (config, text_config(config)) for size in _windows_of(part).values()}
    passed_on = {size for size in adapter.probe_layers().windows.values() if size is not None}
    wide = {size for size in declared | passed_on if max(selfcheck.LENGTHS) <= size < context_length(config)}
    if not wide:
        return 0
    names = ", ".join(str(size) for size in sorted(wide))
    with _narrowed(adapter.model, wide):
        if wide & set(adapter.probe_layers().windows.values()):
            raise ModelLoadError(f"{config.model_type}: its attention window ({names} tokens) can't be checked")
        expected = selfcheck.plain_logits(adapter.model, adapter.vocab_size)
        got = selfcheck.paged_logits(adapter, shapes, backend, dtype)
    try:
        selfcheck.check(expected, got, tolerance, config.model_type)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"{config.model_type}: its attention window ({names} tokens) gets lost: {error}"
        ) from error
    return len(wide)


@contextmanager
def _narrowed(model: PreTrainedModel, wide: set[int]) -> Iterator[None]:
    """Windows of these sizes are NARROW tokens inside."""
    holders: dict[int, PretrainedConfig | torch.nn.Module] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            if isinstance(holder, PretrainedConfig | torch.nn.Module):
                holders[id(holder)] = holder
    changed = [(h, name, size) for h in holders.values() for name, size in _windows_of(h).items() if size in wide]
    try:
        for holder, name, _ in changed:
            setattr(holder, name, NARROW)
        yield
    finally:
        for holder, name, size in changed:
            setattr(holder, name, size)


def _windows_of(holder: PretrainedConfig | torch.nn.Module) -> dict[str, int]:
    """The attributes of a configuration or a module that hold an attention window, in tokens."""
    ints = {name: value for name, value in vars(holder).items() if type(value) is int}
    return {
        name: value for name, value in ints.items() if "window" in name and not name.endswith(("_layers", "_pattern"))
    }
