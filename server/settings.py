"""Settings of the HTTP side: the `server` section of the configuration file, and the environment.

This is the only module that reads environment variables. What is given later wins: defaults, the file's
`server` section, variables named SLIPSTREAM_<SETTING>, then what the command line passes as overrides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self, TextIO

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict, SettingsError

from engine.errors import ConfigError
from server.limit_settings import Limits

LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Times are in seconds. Unknown keys are errors."""

    model_config = SettingsConfigDict(env_prefix="SLIPSTREAM_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    uds: Path | None = None  # a unix socket in place of host and port
    uds_mode: Annotated[str, Field(pattern="^0?[0-7]{3}$")] = "660"  # of its file, octal
    tls_cert: Path | None = None  # PEM: the certificate, with those in between it and its authority behind it
    tls_key: Path | None = None  # PEM, not encrypted
    tls_client_ca: Path | None = None  # PEM: clients must show a certificate of one of these authorities
    root_path: str = ""  # path prefix that a proxy in front adds
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ()  # addresses and networks whose X-Forwarded-* counts
    api_key: SecretStr | None = None
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()  # in the environment: separated by commas
    admin_key: SecretStr | None = None  # without one there are no control endpoints at all
    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    limits: Limits = Limits()
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()  # none: no CORS headers at all

    max_body_bytes: int = Field(16 << 20, gt=0)
    max_header_bytes: int = Field(64 << 10, ge=1024)  # request line and all headers together
    max_connections: int = Field(4096, gt=0)
    header_timeout: float = Field(30.0, gt=0)  # from the opening of a connection to the end of a request's headers
    body_timeout: float = Field(60.0, gt=0)  # for a whole request body
    idle_timeout: int = Field(75, gt=0)  # a kept-alive connection between two requests

    max_prompts: int = Field(1024, gt=0)  # prompts in one completions request
    max_inputs: int = Field(2048, gt=0)  # of one embeddings request
    max_input_tokens: int = Field(300_000, gt=0)  # of these together
    max_n: int = Field(128, gt=0)
    max_sequences: int = Field(1024, gt=0)  # prompts times n
    max_logprobs: int = Field(20, ge=0)
    max_stop: int = Field(4, gt=0)
    max_chars_per_token: int = Field(128, gt=0)
    """A text longer than this times the context can't fit and is refused before it is tokenized. 128 is the longest
    ordinary token (a run of spaces) of the vocabularies in use; raise it for one with longer tokens."""

    stored_responses: int = Field(1024, ge=0)  # of /v1/responses, in memory; 0 keeps none
    stored_response_bytes: int = Field(64 << 20, ge=0)  # of these together

    keep_alive_seconds: float = Field(15.0, gt=0)  # silence on a stream before an SSE comment is sent
    idempotency_seconds: float = Field(600.0, ge=0)  # how long a whole answer is kept for its Idempotency-Key; 0: not
    drain_timeout: float = Field(30.0, ge=0)  # what requests in flight get to finish after SIGTERM
    playground: bool = True  # the page at /
    profile_dir: Path | None = None  # where /admin/profile writes; without it there is none
    otlp_endpoint: str | None = None  # of a collector of OpenTelemetry traces, as http://127.0.0.1:4318
    log_level: LogLevel = "info"
    log_format: Literal["text", "json"] = "text"
    log_requests: bool = True  # one line per HTTP request; prompts and answers are never logged
    cache_dir: Path = Field(Path("~/.cache/slipstream"), validate_default=True)

    @field_validator("api_keys", "admin_keys", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("uds_mode", mode="before")
    @classmethod
    def _digits(cls, value: object) -> object:
        if isinstance(value, int):  # YAML reads 0660 as 432
            raise ValueError('must be a string, as in "660"')
        return value

    @field_validator("api_key", "admin_key")
    @classmethod
    def _no_empty_key(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is not None and value.get_secret_value() else None

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must start with /")
        return value.rstrip("/")

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must be an http:// or https:// address")
        return value or None

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # A ValueError says what is wrong. Bits of a network behind its prefix are dropped.
        return tuple(part if part == "*" else str(_network(part)) for part in value)

    @field_validator("cache_dir", "uds", "tls_cert", "tls_key", "tls_client_ca", "profile_dir")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key need each other")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.uds is not None and self.tls_cert is not None:
            raise ValueError("uds and tls_cert exclude each other: what passes a unix socket stays on this machine")
        for name, limits in self.limits.keys.items():
            if self.keys.count(limits.api_key.get_secret_value()) > 1:
                raise ValueError(f"limits.keys.{name}: this API key is given twice")
        if set(self.keys) & set(self.admin_secrets):
            raise ValueError("an admin key must not be an API key")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """All accepted API keys, those with a name last; none of them means that the server is open."""
        named = (limits.api_key for limits in self.limits.keys.values())
        keys = (*self.api_keys, *((self.api_key,) if self.api_key else ()), *named)
        return tuple(key.get_secret_value() for key in keys)

    @property
    def admin_secrets(self) -> tuple[str, ...]:
        """All accepted admin keys; none of them means that there are no control endpoints."""
        keys = (*self.admin_keys, *((self.admin_key,) if self.admin_key else ()))
        return tuple(key.get_secret_value() for key in keys)

    @property
    def secure(self) -> bool:
        return self.tls_cert is not None


def _network(text: str) -> object:
    """An address, or a network in CIDR form. Raises ValueError."""
    return ip_network(text, strict=False) if "/" in text else ip_address(text)


def wants_colours(out: TextIO) -> bool:
    """Does who reads `out` like colours? A pipe does not, nor does NO_COLOR (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def load_settings(section: Mapping[str, object] | None = None, **overrides: object) -> Settings:
    """Merge the file's `server` section, the environment and overrides. Raises ConfigError naming the key."""
    try:
        environment = EnvSettingsSource(Settings, env_ignore_empty=True)()  # VAR= in a unit file means "not set"
        return Settings.model_validate({**(section or {}), **environment, **overrides})
    except SettingsError as error:  # a section must be JSON there
        raise ConfigError(f"the environment: {error}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(("server", *(str(part) for part in first["loc"])))
        if first["type"] == "extra_forbidden":
            known = f"; known: {', '.join(Settings.model_fields)}" if len(first["loc"]) == 1 else ""
            raise ConfigError(f"{key}: unknown key{known}") from None
        raise ConfigError(f"{key}: {first['msg']}") from None
