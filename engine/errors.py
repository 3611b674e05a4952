"""Typed errors of the engine. `server/errors.py` maps them to HTTP; nothing else does.

Every class says whose fault it is: `InvalidRequest` and its children are the caller's (4xx, never worth a
retry); `Overloaded` and `EngineDead` are ours (503, worth a retry); `StepFailed` ends one request alone (500).
"""

from __future__ import annotations

MAX_SHOWN = 64  # characters of a client's word that an error repeats


class SlipstreamError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SlipstreamError):
    """A configuration key or value is wrong; the message names the key."""


class ModelLoadError(SlipstreamError):
    """A checkpoint can't be served; the message says why and, where there is one, what would help."""


class InsufficientMemory(ModelLoadError):
    """The KV pool does not fit; the message says how much is missing and which setting would fit."""


class InvalidRequest(SlipstreamError):
    """A request that can never succeed as it is. `param` is the client's name of the field at fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextLengthExceeded(InvalidRequest):
    """Prompt (plus requested completion) does not fit the model's context."""

    def __init__(self, limit: int, prompt_tokens: int, max_tokens: int, param: str = "prompt") -> None:
        total = prompt_tokens + max_tokens
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested {total} tokens "
            f"({prompt_tokens} in the {param}, {max_tokens} in the completion). "
            f"Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )


class DuplicateRequest(InvalidRequest):
    """A request with the same id is running; the id is free again when that one has ended."""


class Overloaded(SlipstreamError):
    """The queue is full or the server is draining; the same request may succeed later."""

    def __init__(self, message: str, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class EngineDead(SlipstreamError):
    """The engine process is gone or makes no progress; the request may be retried elsewhere."""


class Cancelled(SlipstreamError):
    """An operator has ended this request; a retry would only bring it back."""


class ControlRefused(SlipstreamError):
    """An engine could not do what an operator asked for; the message says why."""


class StepFailed(SlipstreamError):
    """This one request failed inside the engine (for example NaN logits); others go on."""


class DeviceOutOfMemory(SlipstreamError):
    """A step needed more memory than its device had; its requests failed, the engine can go on."""


class IntegrityError(SlipstreamError, AssertionError):
    """The engine's own books don't add up (a block freed twice, a step out of order): a bug, never a client's fault."""


def shown(word: str) -> str:
    """A client's word as an error may repeat it: short, and of a kind that every encoding can carry."""
    word = word if len(word) <= MAX_SHOWN else f"{word[: MAX_SHOWN - 1]}…"
    return word.encode("utf-8", "replace").decode()
