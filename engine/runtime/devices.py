"""Where a model runs and in which numbers: the one place that decides. The rest takes what it is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError, DeviceOutOfMemory, EngineDead, SlipstreamError
from engine.protocols import AttentionBackend
from engine.registry import ATTENTION, resolve
from engine.runtime.cores import threads_of, usable_cores
from engine.runtime.linear import packing_available

logger = logging.getLogger(__name__)

# Kind of device -> what `attention: auto` tries, best first; the last one runs everywhere.
_BACKENDS = {"cuda": ("triton_paged", "sdpa"), "cpu": ("paged_cpu", "sdpa")}
# Backends that stand in for themselves with something slower: whether they would run as what they are.
_USABLE = {"paged_cpu": "engine.attention.paged_cpu:usable"}
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Placement:
    """`quant` is "none", or "fp16" for packed CPU linears. `detail` says what was chosen and why, for the user."""

    device: torch.device
    dtype: torch.dtype  # of weights, activations and KV pool; logits and sampling are fp32 everywhere
    quant: str
    detail: str

    @property
    def name(self) -> str:
        """The kind of device: "cpu", or a GPU's model."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def place(model: ModelConfig, stored: torch.dtype | None) -> Placement:
    """Decide for a checkpoint whose weights are `stored` as that type (None: it does not say).

    Raises ConfigError for a device that is not there, and for packed linears with 16-bit activations.
    """
    device, why_device = _device(model.device)
    dtype, why_dtype = _dtype(model.dtype, device, stored)
    quant, why_quant = _quant(model.quant, device, dtype)
    name = str(dtype).removeprefix("torch.")
    return Placement(device, dtype, quant, f"{device}{why_device}, {name}{why_dtype}, weights: {quant}{why_quant}")


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[AttentionBackend, str]:
    """The backend of a configured name, and what to tell the user. "auto" takes the first that is there and runs.

    Raises ConfigError for an unknown name; what a backend raises that was asked for by name is the caller's to see.
    """
    if name != "auto":
        return _backend(name), name
    refused = []
    *candidates, last = _BACKENDS[device.type]
    for candidate in candidates:
        if candidate not in ATTENTION:
            continue
        try:
            backend = _backend(candidate)
            if candidate not in _USABLE or _usable(candidate)(device, dtype):
                return backend, candidate
            refused.append(f"{candidate}: no native code here for {dtype}")
        except (ImportError, OSError, SlipstreamError) as error:
            refused.append(f"{candidate}: {str(error).strip().splitlines()[0][:120]}")
    return _backend(last), f"{last} ({'; '.join(refused)})" if refused else last


def prepare_engine(config: EngineConfig) -> None:
    """`prepare_torch` for one of the server's engine processes, which divide the cores among them."""
    threads, cores = config.parallel.threads, usable_cores()
    if config.engines > 1 and threads is not None and threads * config.engines > cores:
        # No error: it is fine for models that are rarely asked at the same time.
        text = "parallel.threads: %d engine processes of %d threads each slow each other down on %d cores when all work"
        logger.warning(text, config.engines, threads, cores)
    prepare_torch(config.parallel, config.core_share)


def prepare_torch(parallel: ParallelConfig, share: float = 1.0) -> None:
    """Process-wide settings of torch, before anything is computed. `share`: of the cores, at least one in the end."""
    torch.set_num_threads(parallel.threads or threads_of(usable_cores(), share))
    # Sums of a split product are made in fp32: in 16 bits they would depend on the batch more than rounding does.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def device_failure(error: Exception, device: torch.device) -> SlipstreamError | None:
    """What an error in a step says of the device: DeviceOutOfMemory, EngineDead, or nothing (None).

    After an illegal access or a failed device assertion, every later call on a CUDA device fails too: a new process
    is the only way out. Other errors of the driver concern the call alone.
    """
    first = str(error).strip().split("\n", 1)[0][:200]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: " in first:
        return DeviceOutOfMemory(f"the step does not fit into the memory of {device}: {first}")
    if isinstance(error, torch.AcceleratorError):
        try:
            torch.accelerator.synchronize(device)
        except torch.AcceleratorError:
            return EngineDead(f"{device} has failed: {first}")
    return None


def _backend(name: str) -> AttentionBackend:
    return cast(Callable[[], AttentionBackend], resolve(ATTENTION, name, "attention backend"))()


def _usable(name: str) -> Callable[[torch.device, torch.dtype], bool]:
    return cast(Callable[[torch.device, torch.dtype], bool], resolve(_USABLE, name, "attention backend"))


def _device(asked: str) -> tuple[torch.device, str]:
    """The device, with its index, and why."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu"), "" if asked == "cpu" else " (no CUDA device)"
    if not torch.cuda.is_available():
        raise ConfigError(f"models.device: {asked!r} was asked for, but torch {torch.__version__} finds no CUDA device")
    index = int(asked.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"models.device: {asked!r} was asked for, but there are {torch.cuda.device_count()} devices")
    torch.cuda.set_device(index)  # so that what names no index (kernels, streams) means this device
    return torch.device("cuda", index), f" ({torch.cuda.get_device_name(index)})"


def _dtype(asked: str, device: torch.device, stored: torch.dtype | None) -> tuple[torch.dtype, str]:
    if asked == "auto":
        if device.type == "cpu":
            return torch.float32, ""
        return (stored, " (as stored)") if stored in _HALVES else (torch.bfloat16, f" (stored as {stored})")
    dtype = cast(torch.dtype, getattr(torch, asked))
    if device.type == "cpu" and dtype in _HALVES:
        logger.warning("models.dtype: %s is several times slower than float32 on a CPU", asked)
    return dtype, ""


def _quant(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Packed linears take fp32 activations on an x86 CPU, and nothing else."""
    if asked == "none":
        return "none", ""
    possible = device.type == "cpu" and dtype is torch.float32 and packing_available()
    if possible:
        return "fp16", ""
    if asked == "fp16":
        if device.type == "cpu" and dtype is not torch.float32:
            raise ConfigError(
                f"models.quant: fp16 packs linear layers for float32 activations; with models.dtype {dtype}"
                ", set models.quant to none"
            )
        logger.warning("models.quant: fp16-packed linears need an x86 CPU; the weights stay exact %s", dtype)
    return "none", " (packing needs an x86 CPU)" if device.type == "cpu" and dtype is torch.float32 else ""
