"""What an operator asks of an engine, remembered and not done."""

from __future__ import annotations

from pathlib import Path


class FakeOperator:
    """Remembers what it was asked; `refusal` is its answer where there is one."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refusal: Exception | None = None

    async def reset_prefix_cache(self) -> int:
        return self._note("reset_prefix_cache")

    async def start_profile(self, folder: Path, seconds: float, steps: int) -> None:
        self._note("start_profile", folder, seconds, steps)

    async def stop_profile(self) -> int:
        return self._note("stop_profile")

    def _note(self, *call: object) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append(call)
        return len(self.calls)
