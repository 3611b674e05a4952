"""What an operator asks of a running engine, from the front process's side."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from engine.cluster.client import EngineClient
from engine.cluster.messages import ResetPrefixCache, StartProfile, StopProfile


class Operator:
    """Each call waits for the step under way. Raises ControlRefused, and EngineDead where nobody answers."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def reset_prefix_cache(self) -> int:
        """Let no request find what was computed for others until now; returns the blocks that could be found.

        What running requests hold stays theirs. The engine recounts all its blocks afterwards.
        """
        return await self._client.control(ResetPrefixCache)

    async def start_profile(self, folder: Path, seconds: float, steps: int) -> None:
        """Record steps into `folder`, which is made, until `stop_profile` or one of the bounds is reached."""
        await self._client.control(partial(StartProfile, folder=str(folder), seconds=seconds, steps=steps))

    async def stop_profile(self) -> int:
        """Write what was recorded; returns the number of steps."""
        return await self._client.control(StopProfile)
