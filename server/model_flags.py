"""The command-line flags that say which model is served and how it decodes, for all commands that start an engine."""

from __future__ import annotations

import argparse
import json

from engine.config import UNTRAINED_DRAFTERS, Config, load
from engine.errors import ConfigError


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face folder, a GGUF file, a hub id, or `demo` (the default); replaces the first in the file",
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file; configs/ has examples")
    _add_decoding_flags(parser)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one value of the configuration, as in models.0.quant=none; may be given again",
    )


def read_config(parsed: argparse.Namespace) -> Config:
    """File, flags and --set as checked configuration. Raises ConfigError."""
    overrides = list(parsed.set)
    if parsed.model is not None:  # another model, so not the name that the file gives to its own
        overrides = [f"models.0.path={json.dumps(parsed.model)}", 'models.0.id=""', *overrides]
    return load(parsed.config, (*_decoding_overrides(parsed), *overrides))


def _add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Shortcuts for keys of the first model; `_decoding_overrides` knows which."""
    parser.add_argument(
        "--quant",
        metavar="FORMAT",
        help="of weights: none (exact), fp16 (the default on a CPU), int8 or int4; fp8 on a GPU",
    )
    parser.add_argument(
        "--draft", metavar="DRAFT", help="draft with `ngram`, or with a draft checkpoint: its folder or hub id"
    )
    parser.add_argument("--max-draft", metavar="N", type=int, help="most tokens of one draft")
    parser.add_argument("--draft-tree", metavar="N", type=int, help="draft trees of up to N tokens where they pay")
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="which drafted tokens stand: strict (the default), rejection and block, which keep the model's law; or"
        " ensemble, diversed, bounded, lenient, typical and top_k_gap, which leave it, measured",
    )
    parser.add_argument("--verifier-head", metavar="FOLDER", help="the trained head that the verifier diversed needs")
    parser.add_argument(
        "--max-bias",
        metavar="X",
        type=float,
        help="most that a request's verifier may move a token's law, from 0 (lossless ones alone) to 1 (the default)",
    )
    parser.add_argument(
        "--rule",
        metavar="NAME",
        help="of diffusion models: which masked positions a step commits: threshold (of most the default), frechet,"
        " factor, factor_compat, quota, margin, entropy, random or dynamic",
    )
    parser.add_argument(
        "--cache",
        metavar="NAME",
        help="of diffusion models: what a step does not compute anew: none (exact, the default), prefix or dual; block"
        " (exact, the default) or dual for block-causal ones",
    )
    parser.add_argument(
        "--canvas", metavar="N", type=int, help="tokens of an answer whose request has no max_tokens (default: 256)"
    )
    parser.add_argument(
        "--diffusion-drafter",
        metavar="MODEL",
        help="draft with this diffusion model, and verify with the one that is served: its folder or hub id",
    )


def _decoding_overrides(parsed: argparse.Namespace) -> list[str]:
    """What the flags that are about drafts and denoising change in the first model."""
    overrides = []
    if parsed.draft is not None:
        if not parsed.draft:
            raise ConfigError("--draft: expected `ngram`, or the folder or hub id of a draft checkpoint")
        plain = parsed.draft in UNTRAINED_DRAFTERS
        drafter, path = (parsed.draft, "") if plain else ("auto", parsed.draft)
        overrides += ["pipeline=speculative", f"draft.path={json.dumps(path)}", f"draft.drafter={drafter}"]
    if parsed.diffusion_drafter is not None:
        overrides += ["pipeline=dual_diffusion"]
    flags = {
        "quant": parsed.quant,
        "draft.max_draft": parsed.max_draft,
        "draft.tree": parsed.draft_tree,
        "verifier.name": parsed.verifier,
        "verifier.head": parsed.verifier_head,
        "verifier.max_bias": parsed.max_bias,
        "diffusion.rule": parsed.rule,
        "diffusion.cache": parsed.cache,
        "diffusion.canvas": parsed.canvas,
        "diffusion.drafter": parsed.diffusion_drafter,
    }
    overrides += [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return [f"models.0.{override}" for override in overrides]
