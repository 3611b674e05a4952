"""The body of /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas import Body, Int32, PromptInput
from server.schemas_sampling import PromptCut


class EmbeddingBody(PromptCut, Body):
    input: PromptInput
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of little-endian float32. Default: float."
    )
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Refused: the served models were not trained to have their vectors cut."
    )
    user: str | None = Field(None, description="Ignored.")
    pooling: Literal["mean", "last"] | None = Field(
        None, description="Which of the last hidden states: their mean, or that of the last token. Default: mean."
    )
    normalize: bool | None = Field(None, description="Scale the vector to length 1. Default: true.")
    add_special_tokens: bool | None = None
    priority: Int32 | None = Field(None, description="Lower runs first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
