"""Which layers of a draft attend through a window, and which are causal inside the block."""

from __future__ import annotations

from engine.errors import ModelLoadError
from engine.models.dflash.spec import DraftLayer
from engine.models.draft_files import Settings

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_layers(network: Settings, own: Settings, sliding_causal: bool | None) -> tuple[DraftLayer, ...]:
    """One entry per layer, from layer_types, windows and causality as the formats' own runtimes resolve them.

    Windows: `use_swa` makes every layer slide unless layer_types say which; else layer_types; else, as transformers
    does, `use_sliding_window` from layer `max_window_layers` on. Causality inside the block: `is_causal` for all
    layers, else `causal`, else the sliding layers of layer_types only. `sliding_causal` is what a format says of
    its sliding layers in its own way. Raises ModelLoadError that names the key.
    """
    count = network.integer("num_hidden_layers")
    if not 0 < count <= 512:
        raise network.wrong("num_hidden_layers", "from 1 to 512")
    network.seen |= {"use_sliding_window", "max_window_layers"}  # said again by layer_types where there are any
    listed, forced = network.texts("layer_types"), own.flag("use_swa")
    if listed and (len(listed) != count or not set(listed) <= {_FULL, _SLIDING}):
        raise network.wrong("layer_types", f"{count} times {_FULL} or {_SLIDING}, one for each of num_hidden_layers")
    slides = [kind == _SLIDING for kind in listed] or _slides_by_depth(network, count)
    if forced and not any(slides):
        slides = [True] * count
    own_window, window = own.raw("swa_window_size"), network.raw("sliding_window")
    enabled = network.raw("use_sliding_window")
    if any(slides) and own_window is None:
        if window is None:
            raise network.wrong("sliding_window", "the window of the sliding layers")
        if enabled is False and not forced:
            raise ModelLoadError(
                f"{network.where}: layer_types has {_SLIDING}, but use_sliding_window is false; one of them is wrong"
            )
    key, place = ("sliding_window", network) if own_window is None else ("swa_window_size", own)
    size = place.integer(key, 0) if any(slides) else 0
    if any(slides) and size < 1:
        raise place.wrong(key, "a window of at least 1 token")
    return tuple(
        DraftLayer(size, causal) if slide else DraftLayer(None, causal)
        for slide, causal in zip(slides, _causal(network, own, listed, slides, sliding_causal), strict=True)
    )


def _slides_by_depth(network: Settings, count: int) -> list[bool]:
    first = network.integer("max_window_layers", 28)
    return [network.flag("use_sliding_window") and index >= first for index in range(count)]


def _causal(
    network: Settings, own: Settings, listed: tuple[str, ...], slides: list[bool], sliding_causal: bool | None
) -> list[bool]:
    if sliding_causal is not None:
        return [slide and sliding_causal for slide in slides]
    for place, key in ((network, "is_causal"), (own, "causal")):
        if place.raw(key) is not None:
            return [place.flag(key)] * len(slides)
    return [kind == _SLIDING for kind in listed] or [False] * len(slides)
