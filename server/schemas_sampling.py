"""Parameters that are more than a number: stop patterns, repetition, and how prompts that are too long are cut."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_INTERVAL = 1024


def _check_patterns(value: object) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise PydanticCustomError("pattern_type", "must be a string or a list of strings")
    return patterns


def _check_alternatives(value: object) -> object:
    if type(value) is int and value == -1:
        message = "-1, the whole vocabulary, is not supported: ask for as many alternatives as you need"
        raise PydanticCustomError("value_error", message)
    return value


Patterns = Annotated[list[str] | None, PlainValidator(_check_patterns, json_schema_input_type=str | list[str] | None)]
# How many of the likeliest tokens to report. The most is in the server's settings.
Alternatives = Annotated[int, Field(ge=0, le=2**31 - 1), BeforeValidator(_check_alternatives)]


class RepetitionDetection(BaseModel):
    """Ends an answer that repeats itself, with the finish_reason `stop` and the stop_reason `repetition_detected`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_pattern_size: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Longest pattern to look for, in tokens; 0 turns it off."
    )
    min_pattern_size: Annotated[int, Field(ge=0, le=256)] = Field(0, description="Shortest one; 0 is 1.")
    min_count: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="So many times in a row; at least 2 where max_pattern_size is not 0."
    )

    def sizes(self) -> tuple[int, int, int] | None:
        """As `SamplingParams.repetition` has it."""
        return (max(1, self.min_pattern_size), self.max_pattern_size, self.min_count) if self.max_pattern_size else None


class PromptCut(BaseModel):
    """What becomes of a prompt that is longer than wanted."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Keep at most so many tokens of a prompt; -1: as many as leave room for the answer."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Where the tokens go that are too many: left keeps the end of the prompt. Default: left."
    )


class StopFields(BaseModel):
    """More ways to say where an answer ends."""

    stop_regex: Patterns = Field(
        None,
        description="Patterns that end the answer where they first match, as stop strings do. At most 4, without"
        " anchors, look-around and back-references; a larger one than can be followed in linear time is an error.",
    )
    no_stop_trim: bool | None = Field(None, description="Another name of include_stop_str_in_output.")
    repetition_detection: RepetitionDetection | None = None
    spaces_between_special_tokens: bool | None = Field(
        None, description="Accepted, and of no effect: no spaces are added."
    )
