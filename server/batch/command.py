"""`slipstream run-batch IN.jsonl OUT.jsonl`: a file of requests in the Batch API's form, and one of answers."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx

from engine.errors import ConfigError, SlipstreamError
from server.batch.lines import count, read
from server.batch.output import Output
from server.batch.progress import Progress
from server.batch.targets import own_engine, running_server
from server.batch.work import Effort, Unreachable, Work
from server.client import ClientError
from server.launch import set_up_logging
from server.model_flags import add_model_flags, read_config
from server.settings import load_settings

DESCRIPTION = """Answer a file of requests. Each line of IN is one, as in OpenAI's Batch API: {"custom_id": ...,
"method": "POST", "url": "/v1/chat/completions", "body": {...}}. Each line of OUT is an answer. Started again with the
same files, it goes on where it was stopped: good answers stay, failed ones are asked for again."""


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 all answered, 1 some failed or the server has gone, 2 wrong usage."""
    parsed = _parser().parse_intermixed_args(arguments)
    if parsed.concurrency < 1 or parsed.retries < 0:
        raise ConfigError("--concurrency must be at least 1, and --retries at least 0")
    if not parsed.input.is_file():
        raise ConfigError(f"{parsed.input}: there is no such file of requests")
    if parsed.input == parsed.output:
        raise ConfigError(f"{parsed.output}: the answers need another file than the requests")
    try:
        with Output(parsed.output) as output:
            return _run(parsed, output)
    except OSError as error:
        raise SlipstreamError(f"{error.filename or parsed.output}: {error.strerror}") from error
    except (ClientError, Unreachable, httpx.InvalidURL) as error:
        raise SlipstreamError(str(error)) from error


def _run(parsed: argparse.Namespace, output: Output) -> int:
    target = _target(parsed)
    progress = Progress(count(parsed.input), sys.stderr)
    effort = Effort(parsed.concurrency, parsed.retries)

    async def work() -> None:
        async with target as client:
            await Work(client, output, progress, effort).run(read(parsed.input))

    try:
        asyncio.run(work())
    finally:
        sys.stderr.write(f"slipstream: {progress.close()}\n")
    return 1 if progress.bad else 0


def _target(parsed: argparse.Namespace) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    if parsed.url is None:
        if parsed.api_key is not None:
            raise ConfigError("--api-key is for a server that runs already, with --url")
        config = read_config(parsed)
        settings = load_settings(config.server, log_requests=False)
        set_up_logging(settings)
        if settings.log_level == "info":  # the progress is news enough
            logging.getLogger().setLevel(logging.WARNING)
        return own_engine(config, settings)
    engine_flags = argparse.ArgumentParser()
    add_model_flags(engine_flags)
    given = [name for name, value in vars(engine_flags.parse_args([])).items() if getattr(parsed, name) != value]
    if given:
        name = "MODEL" if given[0] == "model" else f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"--url is a server that runs already; {name} is for an engine that is started here")
    api_key = parsed.api_key or next(iter(load_settings().keys), None)
    return running_server(parsed.url, api_key, parsed.concurrency)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slipstream run-batch", description=DESCRIPTION)
    parser.add_argument("input", metavar="IN", type=Path, help="requests, one JSON object a line")
    parser.add_argument("output", metavar="OUT", type=Path, help="answers, in the order in which they come")
    parser.add_argument("--url", help="ask this server in place of starting an engine; unix:PATH is a socket")
    parser.add_argument("--api-key", metavar="KEY", help="its key, where it wants one (default: $SLIPSTREAM_API_KEY)")
    parser.add_argument(
        "--concurrency", metavar="N", type=int, default=64, help="requests at once (default: %(default)s)"
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=int,
        default=8,
        help="further attempts where the server is busy or away, with growing pauses (default: %(default)s)",
    )
    add_model_flags(parser)
    return parser
