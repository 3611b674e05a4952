"""`slipstream serve` and `slipstream print-config`: from the command line and a YAML file to a running server."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import yaml

from engine.config import Config
from engine.errors import ConfigError, SlipstreamError
from server.connect import UNIX
from server.model_flags import add_model_flags, read_config
from server.settings import Settings, load_settings
from server.startup import StartupTable, base_url
from server.tracing import Tracer
from server.unix_socket import listening_at


def serve(arguments: Sequence[str]) -> int:
    """Start the engines and the server; returns when it was told to stop. Raises SlipstreamError."""
    config, settings = _read("serve", "Serve a model over the OpenAI API.", arguments)
    set_up_logging(settings)
    with contextlib.ExitStack() as stack:
        if settings.uds is not None:
            sockets = [stack.enter_context(listening_at(settings.uds, int(settings.uds_mode, 8)))]
            url = f"{UNIX}{settings.uds.absolute()}"
        else:
            sockets = listen(settings.host, settings.port)
            url = base_url(settings.host, sockets[0].getsockname()[1], settings.secure)
        # These cost a second of imports, which `--help` and a wrong configuration need not wait for.
        from engine.async_engine import AsyncEngine
        from server.app import create_app
        from server.metrics import Metrics
        from server.serving import run

        created = int(time.time())
        engines = {
            engine.model.name: AsyncEngine(engine, cache_dir=settings.cache_dir, created=created)
            for engine in config.engines()
        }
        table = StartupTable(url, list(engines), needs_key=bool(settings.keys))
        tracer = _tracer(settings, stack)
        app = create_app(
            engines, settings, Metrics(config.kv), on_phase=table.add, on_ready=table.finish, tracer=tracer
        )
        run(app, settings, sockets)
    return 0


def _tracer(settings: Settings, stack: contextlib.ExitStack) -> Tracer | None:
    """What writes traces, where they are wanted; closed with `stack`. Raises ConfigError."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from server.otel import connect
    except ImportError as error:
        extra = "pip install 'slipstream[otel]'"
        raise ConfigError(f"server.otlp_endpoint: traces need OpenTelemetry's packages: {extra} ({error})") from error
    tracer = connect(settings.otlp_endpoint)
    stack.callback(tracer.close)
    return tracer


def print_config(arguments: Sequence[str]) -> int:
    """Print what `serve` with the same arguments would use, as YAML; keys and other secrets are masked."""
    config, settings = _read("print-config", "Print the configuration that `serve` would use.", arguments)
    shown = {**asdict(config), "server": settings.model_dump(mode="json")}
    shown["models"] = [asdict(model) for model in config.models]
    yaml.safe_dump(shown, sys.stdout, sort_keys=False, allow_unicode=True)
    return 0


def _read(command: str, description: str, arguments: Sequence[str]) -> tuple[Config, Settings]:
    """Arguments, file and environment as checked configuration. Raises ConfigError; exits by itself for --help."""
    parser = argparse.ArgumentParser(prog=f"slipstream {command}", description=description)
    add_model_flags(parser)
    parser.add_argument("--host", metavar="H", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", metavar="P", type=int, help="default: 8000")
    _add_server_flags(parser)
    parsed = parser.parse_args(arguments)
    config = read_config(parsed)
    flags = {name: value for name in _SERVER_FLAGS if (value := getattr(parsed, name)) is not None}
    if "uds" in flags and flags.keys() & {"host", "port"}:
        raise ConfigError("--uds takes the place of --host and --port: give one or the other")
    return config, load_settings(config.server, **flags)


_SERVER_FLAGS = (
    *("host", "port", "uds", "tls_cert", "tls_key", "tls_client_ca"),
    *("root_path", "cors_origins", "keep_alive_seconds", "otlp_endpoint"),
)


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Shortcuts for keys of the section `server`, of the same names."""
    parser.add_argument("--uds", metavar="PATH", help="listen on a unix socket in place of host and port")
    parser.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate chain (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key (PEM); both are read anew when they change")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="ask clients for a certificate of this authority")
    parser.add_argument("--root-path", metavar="PREFIX", help="path prefix that a proxy in front adds")
    parser.add_argument(
        "--cors-origins", metavar="LIST", help="origins whose pages may call the server, separated by commas; * is all"
    )
    parser.add_argument(
        "--keep-alive",
        dest="keep_alive_seconds",
        metavar="SECONDS",
        type=float,
        help="silence on a stream before a comment is sent for the sake of proxies (default: 15)",
    )
    parser.add_argument(
        "--otlp-endpoint", metavar="URL", help="send a trace of each request to this OpenTelemetry collector"
    )


def listen(host: str, port: int) -> list[socket.socket]:
    """Take the port before minutes are spent on loading. One socket for each address of `host` that this machine has.

    Raises SlipstreamError when the port is taken or not allowed, or the host is not ours.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            try:
                bound = socket.create_server((str(address[0]), port, *address[2:]), family=family)
            except OSError as error:  # localhost often has an IPv6 address on machines without IPv6
                if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:
                    continue
                raise
            sockets.append(bound)
            port = bound.getsockname()[1]  # a free one, where 0 was asked for
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError as error:
        for bound in sockets:
            bound.close()
        reason = f"cannot listen on {host} port {port}: {error.strerror}"
        raise SlipstreamError(f"{reason}; --host and --port change it") from error
    return sockets


def set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonFormatter()
        if settings.log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    if settings.log_level != "debug":  # the table says what uvicorn would, in four lines
        logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, for log collectors."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
