"""What a client is shown of a canvas while it is filled in."""

from __future__ import annotations

from engine.diffusion import CanvasNews, CanvasStep
from engine.types import FinishReason, Request


class CanvasTrace:
    """Turns the steps of a request into news: each is the difference between two views of the canvas.

    The view ends where the answer would, as things stand: behind the first stop token that stands anywhere, behind
    `max_tokens`, and at last where the answer was cut. An end that is taken back brings what stood behind it into view.
    Steps that come a second time, after a preemption, are known by their numbers and bring nothing.
    """

    def __init__(self, request: Request) -> None:
        self._prompt = len(request.prompt_ids)
        self._room = min(request.sampling.max_tokens, request.diffusion.canvas)
        self._least = request.sampling.min_tokens
        self._stops = frozenset(request.eos_ids + request.sampling.stop_token_ids)
        self._canvas: dict[int, int] = {}  # the tokens that stand, by place
        self._told: dict[int, int] = {}  # what the client sees
        self._known = (-1, 0)  # block and turn of the latest step
        self._block = (0, 0)
        self._end: int | None = None
        self._steps = 0

    def take(self, step: CanvasStep | None, finish: FinishReason | None, num_tokens: int) -> tuple[CanvasNews, ...]:
        """The news of an update: one or none. `num_tokens`: of the answer, which is over with `finish`."""
        if step is not None and (step.start, step.turn) > self._known:
            self._known = step.start, step.turn
            self._canvas.update((position - self._prompt, token) for position, token in step.filled)
            for position in step.remasked:
                self._canvas.pop(position - self._prompt, None)
            self._block = self._place(step.start), self._place(step.stop)
        end = self._end_now() if finish is None else num_tokens
        limit = self._room if end is None else end
        view = {place: token for place, token in self._canvas.items() if place < limit}
        filled = tuple(sorted((place, token) for place, token in view.items() if self._told.get(place) != token))
        gone = tuple(sorted(place for place in self._told if place < limit and place not in view))
        if not (filled or gone or end != self._end):
            return ()
        self._told, self._end = view, end
        self._steps += 1
        return (CanvasNews(self._steps, self._room, self._block, filled, gone, end),)

    def _place(self, position: int) -> int:
        return min(max(position - self._prompt, 0), self._room)

    def _end_now(self) -> int | None:
        ends = [place for place, token in self._canvas.items() if token in self._stops and place >= self._least]
        return min(ends) + 1 if ends and min(ends) < self._room else None
