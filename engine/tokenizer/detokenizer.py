"""A request's output text as it grows: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.tokenizer.decoding import IncrementalDecoder
from engine.tokenizer.repetition import STOP_REASON, RepetitionDetector
from engine.tokenizer.stop_strings import StopMatcher
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Piece:
    """What one push brought.

    `text` continues the text of the pushes before and may lag behind the tokens. `offsets`: for each kept token,
    the index in the whole output text where its text starts. `stop`: the stop string that matched. `num_tokens`:
    how many of the pushed tokens belong to the output; those after a stop do not.
    """

    text: str = ""
    offsets: tuple[int, ...] = ()
    stop: str | None = None
    num_tokens: int = 0


class Detokenizer:
    """Turns the token ids of one request into text.

    The texts of all pushes add up to the decoded output, cut at the first stop string (after it, if the request
    includes stops). Stops are looked for from the token after `min_tokens` on. `prompt_ids`: see IncrementalDecoder.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._params = params
        self._decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens, prompt_ids, params.shown_token_ids)
        self._matcher = StopMatcher(params.stop, params.stop_regex)
        self._repetition = None if params.repetition is None else RepetitionDetector(*params.repetition)
        self._stop: str | None = None
        self._num_tokens = 0
        self._length = 0  # characters decoded so far
        self._held = ""  # decoded, but not given out yet: it may be the beginning of a stop

    def push(self, token_ids: Sequence[int], *, final: bool = False, stop_token: bool = False) -> Piece:
        """Take the next tokens. `final`: no more will come, so that nothing is held back any longer.

        `stop_token`: the last of these tokens is what ended the request (end-of-sequence or a stop id); it counts
        as a token, but its text is left out unless the request includes stops. After a stop string has matched,
        pushes bring nothing.
        """
        offsets: list[int] = []
        if self._stop is not None:
            return Piece(stop=self._stop)
        for i, token_id in enumerate(token_ids):
            offsets.append(self._length)
            self._num_tokens += 1
            silent = stop_token and i == len(token_ids) - 1 and not self._params.include_stop_str_in_output
            if silent:
                continue
            if self._read(self._decoder.push(token_id)) or (self._repetition is not None and self._repeats(token_id)):
                break
        if final and self._stop is None:
            self._read(self._decoder.finish())
        return Piece(self._release(final), tuple(offsets), self._stop, len(offsets))

    def _repeats(self, token_id: int) -> bool:
        """Has the answer begun to repeat itself? All of it stays, and nothing comes after it."""
        found = self._repetition is not None and self._repetition.push(token_id)
        if not found or self._num_tokens <= self._params.min_tokens:
            return False
        self._read(self._decoder.finish())
        self._stop = self._stop or STOP_REASON
        return True

    def _read(self, text: str) -> bool:
        """Add decoded text; true when a stop string ends in it, behind which nothing is kept."""
        match = self._matcher.feed(text, listening=self._num_tokens > self._params.min_tokens)
        self._length += len(text)
        self._held += text
        if match is None:
            return False
        self._stop = match.stop
        end = len(self._held) - len(text) + match.end
        kept = end if self._params.include_stop_str_in_output else end - match.length
        self._held = self._held[:kept]
        return True

    def _release(self, final: bool) -> str:
        """The text that no stop can claim any more."""
        everything = final or self._stop is not None or self._params.include_stop_str_in_output
        held = 0 if everything else self._matcher.held
        cut = len(self._held) - held
        text, self._held = self._held[:cut], self._held[cut:]
        return text
