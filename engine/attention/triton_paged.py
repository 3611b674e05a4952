"""Attention over the paged pool by our own Triton kernels (`triton_kernels.py`): the default on CUDA devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.attention.work import Machine
from engine.errors import ConfigError
from engine.runtime.batch import DeviceBatch

if TYPE_CHECKING:
    from engine.attention.triton_step import TritonStep


class TritonPagedAttention:
    """See `protocols.AttentionBackend`: every mode, page size, head dimension and option. Needs triton 3.6 or newer."""

    def __init__(self, machine: Machine | None = None) -> None:
        """`machine` stands in for the current CUDA device's own numbers. Raises ConfigError where nothing can run."""
        try:
            from engine.attention import triton_step
        except ImportError as error:
            raise ConfigError(f"attention triton_paged needs the package triton: {error}") from error
        if triton_step.COMPILED and not torch.cuda.is_available():
            raise ConfigError(f"attention triton_paged needs a CUDA device, and torch {torch.__version__} finds none")
        self._step = triton_step.TritonStep
        self._machine = machine or triton_step.machine(torch.cuda.current_device())

    def check_block_size(self, block_size: int) -> None:
        """Any will do."""

    def prepare(self, batch: DeviceBatch) -> TritonStep:
        return self._step(batch, self._machine)
