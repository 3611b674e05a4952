"""Settings: where they come from, who wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from server.settings import load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "API_KEYS", "PORT", "HOST", "CORS_ORIGINS"):
        monkeypatch.delenv(f"SLIPSTREAM_{name}", raising=False)


def test_defaults_are_safe() -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.keys == () and settings.cors_origins == ()
    assert settings.cache_dir == Path.home() / ".cache" / "slipstream"


def test_the_later_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    section: dict[str, object] = {"port": 1, "host": "a", "max_n": 5}
    assert load_settings(section).port == 1
    monkeypatch.setenv("SLIPSTREAM_PORT", "2")
    monkeypatch.setenv("SLIPSTREAM_HOST", "b")
    assert (load_settings(section).port, load_settings(section).host, load_settings(section).max_n) == (2, "b", 5)
    assert (load_settings(section, port=3).port, load_settings(section, port=3).host) == (3, "b")


def test_keys_and_origins_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEYS", "a, b,")
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "third")
    monkeypatch.setenv("SLIPSTREAM_CORS_ORIGINS", "https://x,https://y")
    settings = load_settings()
    assert settings.keys == ("a", "b", "third") and settings.cors_origins == ("https://x", "https://y")
    assert "third" not in repr(settings.api_key)


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "")
    monkeypatch.setenv("SLIPSTREAM_API_KEYS", ",")
    assert load_settings().keys == ()


@pytest.mark.parametrize(
    "section, message",
    [
        ({"prot": 1}, r"server\.prot: unknown key"),
        ({"port": "x"}, r"server\.port"),
        ({"port": 70_000}, r"server\.port"),
        ({"max_body_bytes": 0}, r"server\.max_body_bytes"),
        ({"log_level": "loud"}, r"server\.log_level"),
        ({"root_path": "x"}, r"server\.root_path"),
        ({"tls_cert": "x"}, "tls_cert and tls_key need each other"),
        ({"tls_client_ca": "x"}, "tls_client_ca needs tls_cert"),
        ({"tls_cert": "x", "tls_key": "y", "uds": "z"}, "uds and tls_cert exclude each other"),
        ({"uds_mode": 660}, r'server\.uds_mode: .*must be a string, as in "660"'),
        ({"uds_mode": "999"}, r"server\.uds_mode: "),
        ({"trusted_proxies": "proxy.example"}, r"server\.trusted_proxies: .*'proxy\.example'"),
        ({"trusted_proxies": ["10.0.0.0/40"]}, r"server\.trusted_proxies: "),
        ({"otlp_endpoint": "collector:4318"}, r"server\.otlp_endpoint: .*http://"),
        ({"api_key": "a", "admin_key": "a"}, "an admin key must not be an API key"),
        ({"limits": {"default": {"requests": 1}}}, r"server\.limits\.default\.requests: unknown key$"),
        ({"limits": {"default": {"tokens_per_minute": 0}}}, r"server\.limits\.default\.tokens_per_minute: "),
        ({"limits": {"keys": {"a": {}}}}, r"server\.limits\.keys\.a\.api_key: Field required"),
        ({"limits": {"keys": {"a": {"api_key": ""}}}}, r"server\.limits\.keys\.a\.api_key: .*must not be empty"),
        ({"limits": {"keys": {"a b": {"api_key": "x"}}}}, r"server\.limits\.keys\.a b"),
        ({"limits": {"keys": {"key-1": {"api_key": "x"}}}}, "the name key-1 is taken"),
        (
            {"api_key": "x", "limits": {"keys": {"a": {"api_key": "x"}}}},
            r"limits\.keys\.a: this API key is given twice",
        ),
    ],
)
def test_wrong_values_name_the_key(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(section)


def test_sections_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_LIMITS", '{"default": {"requests_per_minute": 3}}')
    monkeypatch.setenv("SLIPSTREAM_ADMIN_KEY", "root")
    settings = load_settings()
    assert settings.limits.default.requests_per_minute == 3 and settings.admin_secrets == ("root",)
    monkeypatch.setenv("SLIPSTREAM_LIMITS", "nonsense")
    with pytest.raises(ConfigError, match=r"(?i)limits"):
        load_settings()


def test_secrets_are_masked() -> None:
    section: dict[str, object] = {"limits": {"keys": {"a": {"api_key": "s3cret"}}}, "admin_key": "s3cret2"}
    settings = load_settings(section)
    assert "s3cret" not in repr(settings) + str(settings.model_dump(mode="json"))
    assert settings.keys == ("s3cret",)


def test_networks_are_normal() -> None:
    found = load_settings({"trusted_proxies": "10.1.2.3/8,127.0.0.1,::1"}).trusted_proxies
    assert found == ("10.0.0.0/8", "127.0.0.1", "::1")


def test_lists_in_the_file() -> None:
    settings = load_settings({"api_keys": ["a", "b"], "cors_origins": ["*"]})
    assert settings.keys == ("a", "b") and settings.cors_origins == ("*",)
