"""Settings of the HTTP side: the `server` section of the configuration file, and the environment.

This is the only module that reads environment variables. What is given later wins: defaults, the file's
`server` section, variables named SLIPSTREAM_<SETTING>, then what the command line passes as overrides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TextIO

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from engine.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Times are in seconds. Unknown keys are errors."""

    model_config = SettingsConfigDict(env_prefix="SLIPSTREAM_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    root_path: str = ""  # path prefix that a proxy in front adds
    api_key: SecretStr | None = None
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()  # in the environment: separated by commas
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()  # none: no CORS headers at all

    max_body_bytes: int = Field(16 << 20, gt=0)
    max_header_bytes: int = Field(64 << 10, ge=1024)  # request line and all headers together
    max_connections: int = Field(4096, gt=0)
    header_timeout: float = Field(30.0, gt=0)  # from the opening of a connection to the end of a request's headers
    body_timeout: float = Field(60.0, gt=0)  # for a whole request body
    idle_timeout: int = Field(75, gt=0)  # a kept-alive connection between two requests

    max_prompts: int = Field(1024, gt=0)  # prompts in one completions request
    max_n: int = Field(128, gt=0)
    max_sequences: int = Field(1024, gt=0)  # prompts times n
    max_logprobs: int = Field(20, ge=0)
    max_stop: int = Field(4, gt=0)
    max_chars_per_token: int = Field(128, gt=0)
    """A text longer than this times the context can't fit and is refused before it is tokenized. 128 is the longest
    ordinary token (a run of spaces) of the vocabularies in use; raise it for one with longer tokens."""

    keep_alive_seconds: float = Field(15.0, gt=0)  # silence on a stream before an SSE comment is sent
    drain_timeout: float = Field(30.0, ge=0)  # what requests in flight get to finish after SIGTERM
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    log_requests: bool = True  # one line per HTTP request; prompts and answers are never logged
    cache_dir: Path = Field(Path("~/.cache/slipstream"), validate_default=True)

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _no_empty_key(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is not None and value.get_secret_value() else None

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must start with /")
        return value.rstrip("/")

    @field_validator("cache_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

    @property
    def keys(self) -> tuple[str, ...]:
        """All accepted API keys; none of them means that the server is open."""
        keys = (*self.api_keys, *((self.api_key,) if self.api_key else ()))
        return tuple(key.get_secret_value() for key in keys)


def wants_colours(out: TextIO) -> bool:
    """Does who reads `out` like colours? A pipe does not, nor does NO_COLOR (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def load_settings(section: Mapping[str, object] | None = None, **overrides: object) -> Settings:
    """Merge the file's `server` section, the environment and overrides. Raises ConfigError naming the key."""
    environment = EnvSettingsSource(Settings, env_ignore_empty=True)()  # VAR= in a unit file means "not set"
    try:
        return Settings.model_validate({**(section or {}), **environment, **overrides})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"server.{key}: unknown key; known: {', '.join(Settings.model_fields)}") from None
        raise ConfigError(f"server.{key}: {first['msg']}") from None
