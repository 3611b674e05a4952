"""`slipstream serve` and `slipstream print-config`: from the command line and a YAML file to a running server."""

from __future__ import annotations

import argparse
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

from engine.config import UNTRAINED_DRAFTERS, Config, load
from engine.errors import ConfigError, SlipstreamError
from server.settings import Settings, load_settings
from server.startup import StartupTable, base_url


def serve(arguments: Sequence[str]) -> int:
    """Start the engines and the server; returns when it was told to stop. Raises SlipstreamError."""
    config, settings = _read("serve", "Serve a model over the OpenAI API.", arguments)
    set_up_logging(settings)
    sockets = listen(settings.host, settings.port)
    port = sockets[0].getsockname()[1]
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
    table = StartupTable(base_url(settings.host, port), list(engines), needs_key=bool(settings.keys))
    app = create_app(engines, settings, Metrics(config.kv), on_phase=table.add, on_ready=table.finish)
    run(app, settings, sockets)
    return 0


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
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face folder, a GGUF file, a hub id, or `demo` (the default); replaces the first in the file",
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file; configs/ has examples")
    parser.add_argument("--host", metavar="H", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", metavar="P", type=int, help="default: 8000")
    _add_decoding_flags(parser)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one value of the configuration, as in models.0.quant=none; may be given again",
    )
    parsed = parser.parse_args(arguments)
    overrides = list(parsed.set)
    if parsed.model is not None:  # another model, so not the name that the file gives to its own
        overrides = [f"models.0.path={json.dumps(parsed.model)}", 'models.0.id=""', *overrides]
    config = load(parsed.config, (*_decoding_overrides(parsed), *overrides))
    flags = {name: value for name in ("host", "port") if (value := getattr(parsed, name)) is not None}
    return config, load_settings(config.server, **flags)


def _add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Shortcuts for keys of the first model; `_decoding_overrides` knows which."""
    parser.add_argument(
        "--quant",
        metavar="FORMAT",
        help="of weights: none (exact), fp16 (the default on a CPU), int8 or int4; fp8 on a GPU",
    )
    parser.add_argument(
        "--draft", metavar="DRAFT", help="draft with `ngram`, or with a draft checkpoint: its folder or hub id"
    )
    parser.add_argument("--max-draft", metavar="N", type=int, help="most tokens of one draft")
    parser.add_argument("--draft-tree", metavar="N", type=int, help="draft trees of up to N tokens where they pay")
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="which drafted tokens stand: strict (the default), rejection and block, which keep the model's law; or"
        " ensemble, diversed, bounded, lenient, typical and top_k_gap, which leave it, measured",
    )
    parser.add_argument("--verifier-head", metavar="FOLDER", help="the trained head that the verifier diversed needs")
    parser.add_argument(
        "--max-bias",
        metavar="X",
        type=float,
        help="most that a request's verifier may move a token's law, from 0 (lossless ones alone) to 1 (the default)",
    )
    parser.add_argument(
        "--rule",
        metavar="NAME",
        help="of diffusion models: which masked positions a step commits: threshold (of most the default), frechet,"
        " factor, factor_compat, quota, margin, entropy, random or dynamic",
    )
    parser.add_argument(
        "--cache",
        metavar="NAME",
        help="of diffusion models: what a step does not compute anew: none (exact, the default), prefix or dual; block"
        " (exact, the default) or dual for block-causal ones",
    )
    parser.add_argument(
        "--canvas", metavar="N", type=int, help="tokens of an answer whose request has no max_tokens (default: 256)"
    )
    parser.add_argument(
        "--diffusion-drafter",
        metavar="MODEL",
        help="draft with this diffusion model, and verify with the one that is served: its folder or hub id",
    )


def _decoding_overrides(parsed: argparse.Namespace) -> list[str]:
    """What the flags that are about drafts and denoising change in the first model."""
    overrides = []
    if parsed.draft is not None:
        if not parsed.draft:
            raise ConfigError("--draft: expected `ngram`, or the folder or hub id of a draft checkpoint")
        plain = parsed.draft in UNTRAINED_DRAFTERS
        drafter, path = (parsed.draft, "") if plain else ("auto", parsed.draft)
        overrides += ["pipeline=speculative", f"draft.path={json.dumps(path)}", f"draft.drafter={drafter}"]
    if parsed.diffusion_drafter is not None:
        overrides += ["pipeline=dual_diffusion"]
    flags = {
        "quant": parsed.quant,
        "draft.max_draft": parsed.max_draft,
        "draft.tree": parsed.draft_tree,
        "verifier.name": parsed.verifier,
        "verifier.head": parsed.verifier_head,
        "verifier.max_bias": parsed.max_bias,
        "diffusion.rule": parsed.rule,
        "diffusion.cache": parsed.cache,
        "diffusion.canvas": parsed.canvas,
        "diffusion.drafter": parsed.diffusion_drafter,
    }
    overrides += [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return [f"models.0.{override}" for override in overrides]


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
