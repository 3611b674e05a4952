"""The section `server.limits`: how much each API key may ask for, and names for keys."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator

ANONYMOUS = "anonymous"  # all callers of a server without keys together
UNNAMED = "key-{}"  # a key of api_keys or api_key, by its place from 1
_RESERVED = re.compile(rf"{ANONYMOUS}|key-\d+")

KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
PositiveInt = Annotated[int, Field(gt=0, le=2**53)]


class KeyLimits(BaseModel):
    """Of one key. None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None  # of prompts, and of answers as they end
    concurrent_requests: PositiveInt | None = None  # streams hold their place until they end


class NamedKey(KeyLimits):
    """A key with a name, which logs and metrics may show. What is not said here is as in `limits.default`."""

    api_key: SecretStr

    @field_validator("api_key")
    @classmethod
    def _not_empty(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value():
            raise ValueError("must not be empty")
        return value

    def over(self, default: KeyLimits) -> KeyLimits:
        """These limits, and those of `default` where nothing was said."""
        own = self.model_dump(include=self.model_fields_set - {"api_key"})
        return default.model_copy(update=own)


class Limits(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    default: KeyLimits = KeyLimits()  # of each key without limits of its own; of everybody together without keys
    keys: dict[KeyName, NamedKey] = {}

    @field_validator("keys")
    @classmethod
    def _no_reserved_names(cls, value: dict[str, NamedKey]) -> dict[str, NamedKey]:
        for name in value:
            if _RESERVED.fullmatch(name):
                raise ValueError(f"the name {name} is taken by keys without one")
        return value
