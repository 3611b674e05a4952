"""From a checkpoint folder to a finished model: safetensors only, never a pickle, never remote code."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from engine.errors import ModelLoadError
from engine.models.families.table import find_family
from engine.models.support import check_supported

logger = logging.getLogger(__name__)
# What a network of another kind, or a broken folder, raises while it is built.
_LOAD_FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,  # a configuration's field of the wrong type
    TypeError,
    ValueError,
)


def load_config(folder: Path) -> PretrainedConfig:
    """The checkpoint's configuration. Raises ModelLoadError if it is broken, unknown, or can't be served."""
    try:
        raw = _read_config(folder)
        if "auto_map" in raw:
            logger.warning("config.json names code of its own (auto_map); it is ignored, only built-in model code runs")
        family = find_family(raw)
        if family is None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        else:
            config = family.config(raw)
    except _LOAD_FAILURES as error:
        raise ModelLoadError(f"{folder.name}: no usable config.json: {_first_line(error)}") from error
    check_supported(config)
    return config


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The type that a checkpoint says its weights are stored in; None if it does not say."""
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    dtype = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
    return dtype if isinstance(dtype, torch.dtype) else None


def load_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, load_format: str = "safetensors"
) -> PreTrainedModel:
    """The finished model in `dtype` on `device`, from safetensors or ("dummy") from the configuration alone."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if load_format == "dummy":
        logger.warning("%s: random weights (load_format: dummy); the text will be noise", folder.name)
        model = dummy_model(config, dtype, device)
    else:
        model = _stored_model(folder, config, dtype)
        model.to(device)  # type: ignore[arg-type]  # its stub wants the decorated class
    model.eval()
    model.requires_grad_(False)
    return model


@torch.no_grad()
def dummy_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Random weights, made on the device in their final type: to measure a shape without its checkpoint.

    Matrices are drawn from N(0, initializer_range) by a generator seeded with the parameter's name: a parameter is
    the same whatever else the model holds. Norms, biases and sinks get what their family gives a new model.
    """
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    scale = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)
    generator = torch.Generator(device)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, scale, generator=generator.manual_seed(zlib.crc32(name.encode())))
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # init_weights leaves these alone
    model.init_weights()
    return model


def _stored_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Weights from safetensors, mapped rather than copied. Raises ModelLoadError when any is missing.

    In a family's checkpoint none may be left over either: its own code might have used it.
    """
    problems = ["missing_keys", "mismatched_keys", "error_msgs"]
    try:
        family = find_family(_read_config(folder))
        loaded: tuple[PreTrainedModel, dict[str, list[str]]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            key_mapping=dict(family.names) if family is not None and family.names else None,
        )
    except (*_LOAD_FAILURES, SafetensorError) as error:
        raise ModelLoadError(f"{folder.name}: the weights can't be loaded: {_first_line(error)}") from error
    model, info = loaded
    problems += [] if family is None else ["unexpected_keys"]
    for problem in problems:
        if info.get(problem):
            names = ", ".join(sorted(str(name) for name in info[problem])[:3])
            raise ModelLoadError(f"{folder.name}: {problem.replace('_', ' ')} in the weights: {names}")
    return model


def _read_config(folder: Path) -> dict[str, object]:
    raw: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return raw


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
