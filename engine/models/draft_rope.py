"""The rotary embedding that a draft's config.json asks for, old style and new, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError

if TYPE_CHECKING:
    from engine.models.draft_files import Settings

Rope = tuple[tuple[str, object], ...]

# rope_type -> (parameters it needs, parameters it may have), as in transformers.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
            *("mscale_all_dim", "truncate"),
        ),
    ),
}
# All three axes of an image model's positions are the same for text.
_TEXT_ONLY = ("mrope_section", "mrope_interleaved")


def freeze_rope(values: Mapping[str, object]) -> Rope:
    """Rope parameters as sorted pairs, lists as tuples, so that they can be compared and hashed."""
    pairs = ((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items())
    return tuple(sorted((name, freeze_rope(value) if isinstance(value, dict) else value) for name, value in pairs))


def read_rope(config: Settings) -> Rope:
    """`rope_parameters`, or `rope_theta` and `rope_scaling`: always with rope_type and rope_theta.

    Raises ModelLoadError for a missing theta (readers of these formats assume different ones), for halves that are
    interleaved, a part of a head that is rotated, or a scaling that depends on the length of a whole batch.
    """
    given = config.section("rope_parameters")
    scaling = config.section("rope_scaling")
    chosen = given if given.values else scaling
    thetas = {float(part.number("rope_theta")) for part in (config, given) if part.raw("rope_theta") is not None}
    if len(thetas) != 1:
        found = "is missing" if not thetas else f"is given twice, as {sorted(thetas)}"
        raise ModelLoadError(f"{config.where}: rope_theta {found}; it must be the one that the draft was trained with")
    for part in (config, chosen):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            raise part.wrong("partial_rotary_factor", "1: drafts of this format rotate whole heads")
        for key, wanted in (("is_neox_style", True), ("rope_interleaved", False), ("rope_interleave", False)):
            if part.flag(key, wanted) is not wanted:
                raise part.wrong(key, f"{str(wanted).lower()}: drafts of this format rotate halves, not pairs")
    kind = chosen.text("rope_type", chosen.text("type", "default"))
    kind = "default" if kind == "mrope" else kind
    if kind not in _KINDS:
        raise chosen.wrong("rope_type", f"one of {', '.join(_KINDS)}")
    needed, allowed = _KINDS[kind]
    if min(thetas) <= 0:
        raise ModelLoadError(f"{config.where}: rope_theta is {min(thetas)}; it must be above 0")
    for key in ("factor", *needed):
        if chosen.number(key, 1.0) <= 0:
            raise chosen.wrong(key, "above 0")
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": thetas.pop()}
    rope |= {name: chosen.number(name) for name in needed}
    rope |= {name: _plain(chosen, name) for name in allowed if chosen.raw(name) is not None}
    if "original_max_position_embeddings" in allowed:
        rope.setdefault("original_max_position_embeddings", config.integer("max_position_embeddings"))
    chosen.refuse_unread(_TEXT_ONLY)
    return freeze_rope(rope)


def _plain(part: Settings, name: str) -> object:
    """An optional parameter: a flag, a length in tokens or a number."""
    if name == "truncate":
        return part.flag(name)
    return part.integer(name) if name == "original_max_position_embeddings" else part.number(name)
