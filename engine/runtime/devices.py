"""Where a model runs and in which numbers: the one place that decides. The rest takes what it is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from engine.config import EngineConfig, ModelConfig, ParallelConfig
from engine.errors import ConfigError, DeviceOutOfMemory, EngineDead, SlipstreamError
from engine.kernels.fp8 import CAPABILITY, E4M3
from engine.kernels.library import library
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
ROUNDED = ("int8", "int4")  # weight formats beside which rounded keys and values do not show


@dataclass(frozen=True, slots=True)
class Placement:
    """`quant` is "none", or the format of packed CPU linears. `detail` says what was chosen and why, for the user."""

    device: torch.device
    dtype: torch.dtype  # of weights and activations; logits and sampling are fp32 everywhere
    pool: torch.dtype  # of the KV pool
    quant: str
    detail: str
    native: bool = False  # linear layers are packed for our own kernels

    @property
    def name(self) -> str:
        """The kind of device: "cpu", or a GPU's model."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def weights_name(self) -> str:
        """The format of the weights, and fbgemm where its kernels serve instead of ours."""
        return self.quant if self.native or self.quant == "none" else f"{self.quant} by fbgemm"

    @property
    def pool_name(self) -> str:
        """What a KV pool in another dtype than the model's adds to the name of its numerics."""
        return "" if self.pool is self.dtype else f"{str(self.pool).removeprefix('torch.')} KV, "


def place(model: ModelConfig, stored: torch.dtype | None, kv: str = "auto") -> Placement:
    """Decide for a checkpoint whose weights are `stored` as that type (None: it does not say); `kv` is kv.dtype.

    Raises ConfigError for a device that is not there, for packed linears with 16-bit activations, and for a pool of
    another dtype than a model's in 16 bits.
    """
    device, why_device = _device(model.device)
    dtype, why_dtype = _dtype(model.dtype, device, stored)
    quant, native, why_quant = _quant(model.quant, device, dtype)
    name = str(dtype).removeprefix("torch.")
    pool = _pool(kv, device, dtype, quant)
    detail = f"{device}{why_device}, {name}{why_dtype}, weights: {quant}{why_quant}"
    detail += "" if pool is dtype else f", KV: {str(pool).removeprefix('torch.')}"
    return Placement(device, dtype, pool, quant, detail, native)


def on_cpu(model: ModelConfig) -> bool:
    """Whether `place` would take a CPU, where the type that weights are stored in decides nothing."""
    return model.device == "cpu" or (model.device == "auto" and not torch.cuda.is_available())


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


def _quant(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, bool, str]:
    """The format of linear layers, whether our kernels serve it, and why. They take fp32 activations on an x86 CPU."""
    if asked == "none":
        return "none", False, ""
    if asked == "fp8":
        _check_fp8("models.quant", device, dtype)
        return "fp8", True, ""
    if device.type == "cpu" and dtype is torch.float32 and packing_available():
        wanted = "fp16" if asked == "auto" else asked
        if library() is not None:
            return wanted, True, ""
        if wanted != "fp16":
            logger.warning("models.quant: %s needs the native kernels, which are missing: packed to fp16", wanted)
        return "fp16", False, " (by fbgemm: no native kernels)"
    if asked != "auto":
        if device.type == "cpu" and dtype is not torch.float32:
            raise ConfigError(
                f"models.quant: {asked} packs linear layers for float32 activations; with models.dtype {dtype}"
                ", set models.quant to none"
            )
        logger.warning("models.quant: %s-packed linears need an x86 CPU; the weights stay exact %s", asked, dtype)
    why = " (packing needs an x86 CPU)" if device.type == "cpu" and dtype is torch.float32 else ""
    return "none", False, why


def _check_fp8(key: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where the device has no fp8, or the model does not run in 16 bits."""
    least = ".".join(map(str, CAPABILITY))
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ConfigError(f"{key}: fp8 needs a CUDA device of compute capability {least} or newer, not {device}")
    if dtype not in _HALVES:
        raise ConfigError(f"{key}: fp8 is for models in bfloat16 or float16, not {dtype}")


def _pool(asked: str, device: torch.device, dtype: torch.dtype, quant: str) -> torch.dtype:
    """Keys and values in fp16 halve what attention reads, and move logits less than packed weights of any kind do."""
    if asked == "fp8_e4m3":
        _check_fp8("kv.dtype", device, dtype)
        return E4M3
    if device.type == "cpu" and dtype is torch.float32:
        rounded = asked == "fp16" or (asked == "auto" and quant in ROUNDED)
        return torch.float16 if rounded else torch.float32
    if asked not in ("auto", {torch.float32: "fp32", torch.float16: "fp16"}.get(dtype)):
        raise ConfigError(
            f"kv.dtype: {asked} is for models in float32 on a CPU; this one keeps {dtype} there, set auto"
        )
    return dtype
