"""The fields about thinking. Types are strict, as in `server/schemas.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Budget = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Reasoning(BaseModel):
    """As clients of routers send it. Other keys are an error: they would ask for what is not done."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Effort | None = None
    max_tokens: Budget | None = Field(None, description="As thinking_token_budget.")
    enabled: bool | None = Field(None, description="As enable_thinking.")
    exclude: bool | None = Field(None, description="true: as include_reasoning false.")


class BudgetFields(BaseModel):
    """How long a model may think, in every endpoint that generates."""

    thinking_token_budget: Budget | None = Field(
        None,
        description="Most tokens inside the thinking span; then its end is forced. An error where the model's tokenizer"
        " has no tokens around one.",
    )
    max_thinking_tokens: Budget | None = Field(None, description="Another name of thinking_token_budget.")
    thinking_budget: Budget | None = Field(None, description="Another name of thinking_token_budget.")


class TemplateThinking(BaseModel):
    """What the chat template is told of thinking."""

    chat_template_kwargs: dict[str, object] | None = None
    reasoning_effort: Effort | None = Field(
        None,
        description="How much to think, in the words that the chat template knows. `none` switches thinking off; where"
        " the template has no switch for it, a thinking span is ended at once.",
    )
    reasoning: Reasoning | None = Field(None, description="The same, and more, in one object.")
    enable_thinking: bool | None = Field(None, description="Switches thinking on or off where the chat template can.")


class ThinkingFields(TemplateThinking, BudgetFields):
    """All that a chat request may say of thinking."""

    include_reasoning: bool | None = Field(None, description="false: thoughts are not told. They count all the same.")
    separate_reasoning: bool | None = Field(None, description="false: thoughts stay in the content, marks and all.")
    stream_reasoning: bool | None = Field(None, description="false: a stream tells a thought when it is complete.")
