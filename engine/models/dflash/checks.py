"""Mismatches between a draft and its target that would not crash but make every draft wrong, found at load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.errors import ModelLoadError
from engine.models.dflash.decoder import ACTIVATIONS
from engine.models.dflash.spec import DFlashSpec
from engine.models.dflash.weights import tensor_shapes
from engine.models.draft_files import TargetFacts, check_finite

logger = logging.getLogger(__name__)
MASK_EMBEDDING = "mask_embedding"  # our own, optional: what stands at masked slots instead of the mask token's row
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_BLOCK = 256  # slots of one pass; published drafts have 7 to 16


def check_target(spec: DFlashSpec, target: TargetFacts, num_target_layers: int | None, where: str) -> None:
    """What the draft says of its target, against the target. Raises ModelLoadError that names the key."""
    if spec.hidden_size != target.hidden_size:
        raise ModelLoadError(
            f"{where}: hidden_size is {spec.hidden_size}, the target's is {target.hidden_size}; this draft belongs to "
            "another model"
        )
    if spec.vocab_size != target.vocab_size:
        raise ModelLoadError(
            f"{where}: vocab_size is {spec.vocab_size}, the target's is {target.vocab_size}; this draft belongs to "
            "another model"
        )
    if num_target_layers is not None and num_target_layers != target.num_layers:
        hint = "it belongs to another model"
        if num_target_layers == target.num_layers + 1:
            hint = "it seems to count the embedding as a layer, so the taps may be off by one"
        raise ModelLoadError(
            f"{where}: num_target_layers is {num_target_layers}, the target has {target.num_layers} layers; {hint}"
        )
    if not 0 <= spec.mask_token_id < target.vocab_size:
        raise ModelLoadError(
            f"{where}: mask_token_id is {spec.mask_token_id}, but the target's embedding table has "
            f"{target.vocab_size} rows"
        )


def check_taps(taps: tuple[int, ...], target: TargetFacts, key: str, shift: int, where: str) -> None:
    """`taps` are 0-based (-1: the embedding's output); `key` named them, each `shift` more.

    Raises ModelLoadError for a layer that the target does not have.
    """
    last = target.num_layers - 1
    written = [tap + shift for tap in taps]
    if min(taps) < -1 or max(taps) > last:
        hint = ""
        if max(taps) == target.num_layers:
            hint = "; they seem to be counted from 1, so all of them may be off by one"
        raise ModelLoadError(
            f"{where}: {key} {written} must lie between {shift} and {last + shift} (or be {shift - 1}, the "
            f"embedding), as the target has {target.num_layers} layers{hint}"
        )
    if len(set(taps)) < len(taps):
        raise ModelLoadError(f"{where}: {key} {written} names a layer twice")
    if last in taps:
        logger.warning(
            "%s: %s names the target's last layer; it is read before the final norm, while some trainers read it after",
            where,
            key,
        )


def check_shape(spec: DFlashSpec, where: str) -> None:
    """The draft's own numbers against each other. Raises ModelLoadError that names the keys."""
    least = 1 if spec.anchor_predicts else 2
    rules = (
        (least <= spec.block_size <= MAX_BLOCK, f"block_size is {spec.block_size}; it must be {least} to {MAX_BLOCK}"),
        (
            min(spec.num_heads, spec.num_kv_heads) > 0 and spec.num_heads % max(spec.num_kv_heads, 1) == 0,
            f"num_attention_heads {spec.num_heads} is no multiple of num_key_value_heads {spec.num_kv_heads}",
        ),
        (spec.head_dim > 0 and spec.head_dim % 2 == 0, f"head_dim is {spec.head_dim}; it must be even"),
        (spec.intermediate_size > 0, f"intermediate_size is {spec.intermediate_size}; it must be above 0"),
        (spec.rms_norm_eps > 0, f"rms_norm_eps is {spec.rms_norm_eps}; it must be above 0"),
        (spec.hidden_act in ACTIVATIONS, f"hidden_act is {spec.hidden_act!r}; known are {', '.join(ACTIVATIONS)}"),
        (
            0 < spec.draft_vocab_size <= spec.vocab_size,
            f"draft_vocab_size is {spec.draft_vocab_size}; the target's vocabulary has {spec.vocab_size}",
        ),
        (spec.embedding_scale > 0, f"input_embedding_scale is {spec.embedding_scale}; it must be above 0"),
        (spec.logit_scale > 0, f"output_multiplier is {spec.logit_scale}; it must be above 0"),
        ((spec.logit_softcap or 1.0) > 0, f"final_logit_softcapping is {spec.logit_softcap}; it must be above 0"),
        (spec.markov_rank >= 0, f"markov_rank is {spec.markov_rank}; it must be 0 or more"),
        (
            spec.markov_rank > 0 or not (spec.confidence_head and spec.confidence_with_markov),
            "confidence_head_with_markov is true, but markov_rank is 0",
        ),
    )
    for holds, problem in (*rules, *_successor_rules(spec)):
        if not holds:
            raise ModelLoadError(f"{where}: {problem}")


def _successor_rules(spec: DFlashSpec) -> tuple[tuple[bool, str], ...]:
    """Of DFlash2, whose tables are indexed by target ids and whose block begins with the anchor."""
    group, kernel, rank, top = spec.conv_group, spec.conv_kernel, spec.selector_rank, spec.selector_top_k
    whole = spec.draft_vocab_size == spec.vocab_size and not spec.anchor_predicts and not spec.markov_rank
    return (
        (kernel >= 0, f"conv_kernel_size is {kernel}; it must be 0 or more"),
        (
            not kernel or (group > 0 and spec.hidden_size % group == 0),
            f"conv_group_size {group} does not divide hidden_size {spec.hidden_size}",
        ),
        (
            (rank > 0 and 0 < top <= spec.vocab_size) or rank == top == 0,
            f"selector_rank {rank} and selector_top_k {top} must both be given, and be no more than the vocabulary",
        ),
        (
            whole or not (rank or kernel),
            "a DFlash2 selector or convolution can't be combined with draft_vocab_size, sample_from_anchor or a "
            "Markov head",
        ),
    )


def check_tensors(spec: DFlashSpec, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Every tensor there, none besides, each of its shape, all finite. Raises ModelLoadError that names the tensor."""
    shapes = tensor_shapes(spec)
    if MASK_EMBEDDING in tensors:
        shapes[MASK_EMBEDDING] = (spec.hidden_size,)
    unknown, missing = sorted(tensors.keys() - shapes.keys()), sorted(shapes.keys() - tensors.keys())
    if missing:
        raise ModelLoadError(f"{where}: missing tensors: {_few(missing)}")
    if unknown:
        raise ModelLoadError(
            f"{where}: tensors unknown here: {_few(unknown)}; without them the draft would compute something else"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if name == "fc.weight" and tensor.dim() == 2 and tensor.shape[1] != shape[1]:
            raise ModelLoadError(
                f"{where}: fc.weight is {tensor.shape[1]} wide, but {len(spec.taps)} taps of hidden size "
                f"{spec.hidden_size} need {shape[1]}"
            )
        if tuple(tensor.shape) != shape:
            heads = f"{spec.num_heads} heads, {spec.num_kv_heads} of keys, {spec.head_dim} wide"
            raise ModelLoadError(
                f"{where}: {name} has the shape {list(tensor.shape)}; config.json asks for {list(shape)}"
                + (f" ({heads})" if "self_attn" in name else "")
            )
        if name != "d2t" and tensor.dtype not in FLOATS:
            raise ModelLoadError(f"{where}: {name} is of type {tensor.dtype}; it must be a float type of 16 or 32 bits")
    check_finite(tensors, where)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def find_mask(text: str | None, number: int | None, target: TargetFacts, where: str) -> int:
    """The mask's id from `mask_token_id`, or from the text `mask_token` by the target's tokenizer.

    Warns when the tokenizer knows the id as an ordinary token: then a prompt may hold it. Raises ModelLoadError when
    there is no way to know the id, or the two disagree.
    """
    tokenizer = _tokenizer(target.folder)
    by_text = None
    if text is not None or number is None:
        by_text = tokenizer.token_to_id(text or "<|MASK|>") if tokenizer is not None else None
    if number is None and by_text is None:
        named = f"mask_token is {text!r}" if text is not None else "mask_token_id is missing"
        raise ModelLoadError(f"{where}: {named}, and the target's tokenizer.json does not name it; give mask_token_id")
    if number is not None and by_text is not None and number != by_text:
        raise ModelLoadError(
            f"{where}: mask_token_id is {number}, but mask_token {text!r} is {by_text} in the tokenizer"
        )
    mask = number if number is not None else by_text
    assert mask is not None
    if tokenizer is not None and (token := tokenizer.id_to_token(mask) if mask >= 0 else None) is not None:
        added = tokenizer.get_added_tokens_decoder().get(mask)
        if added is None or not added.special:
            logger.warning("%s: mask_token_id %d is the ordinary token %r, which text can hold", where, mask, token)
    return mask


def _tokenizer(folder: Path | None) -> Tokenizer | None:
    """The target's; None if there is none that can be read (which its own loader reports)."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower
        return None
