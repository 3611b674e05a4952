"""A trace of torch's operations, as Chrome's and Perfetto's viewers read it (torch.profiler)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class TorchTrace:
    """Records what the calling thread and those it uses do, and the GPU's kernels where there is one."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        self._profile.start()

    def stop(self, path: Path) -> None:
        """Must be called from the thread that called `start`. Raises OSError where `path` can't be written."""
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))
