"""The command line of `slipstream bench serve`, checked: every complaint names its flag."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks.serve_lengths import Lengths, parse_lengths

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
SOURCES = ("synthetic", "sharegpt", "humaneval", "gsm8k", "mtbench")
OBJECTIVES = ("ttft", "tpot", "e2e")
DEFAULT_REQUESTS = 64
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """One measured point: so many clients at once, or so many requests per second."""

    clients: int | None = None
    rate: float | None = None
    burstiness: float = 1.0

    @property
    def title(self) -> str:
        return f"{self.clients} at once" if self.clients is not None else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds, goodput objectives in milliseconds."""

    url: str
    model: str
    endpoint: str
    api_key: str | None
    loads: tuple[Load, ...]
    requests: int | None
    seconds: float | None
    warm_up: int
    prompts: str
    input_length: Lengths
    output_length: Lengths | None
    ignore_eos: bool
    temperature: float
    seed: int
    extra_body: Mapping[str, object]
    goodput: Mapping[str, float]
    timeout: float
    usage: bool
    details: bool
    output: Path | None
    plot: Path | None


def parse(arguments: Sequence[str]) -> Options:
    """The options of a run. Leaves through SystemExit, as argparse does, when something is wrong."""
    made = _parser()
    p = made.parse_args(arguments)
    if p.concurrency and p.request_rate:
        made.error("argument --request-rate: not allowed with --concurrency")
    if p.burstiness is not None and not p.request_rate:
        made.error("argument --burstiness: needs --request-rate")
    if p.num_requests is None and p.duration is not None and math.inf in (p.request_rate or ()):
        made.error("argument --request-rate: inf needs --num-requests")
    if p.prompts not in SOURCES and not Path(p.prompts).is_file():
        made.error(f"argument --prompts: {p.prompts!r} is neither a file nor one of {', '.join(SOURCES)}")
    rates = [Load(rate=rate, burstiness=p.burstiness or 1.0) for rate in p.request_rate or ()]
    clients = [Load(clients=clients) for clients in p.concurrency or (() if rates else (8,))]
    return Options(
        url=p.url if "://" in p.url else f"http://{p.url}",
        model=p.model,
        endpoint=p.endpoint,
        api_key=p.api_key,
        loads=(*rates, *clients),
        requests=p.num_requests or (DEFAULT_REQUESTS if p.duration is None else None),
        seconds=p.duration,
        warm_up=p.warmup,
        prompts=p.prompts,
        input_length=p.input_len,
        output_length=p.output_len,
        ignore_eos=p.ignore_eos,
        temperature=p.temperature,
        seed=int(time.time()) % 1_000_000 if p.seed is None else p.seed,
        extra_body=p.extra_body,
        goodput=p.goodput,
        timeout=p.timeout,
        usage=not p.no_usage,
        details=p.details,
        output=p.output,
        plot=p.plot,
    )


def redacted(arguments: Sequence[str]) -> list[str]:
    """The command line without its key, for the record."""
    shown, hide = [], False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        shown.append("***" if hide else "--api-key=***" if separator and name == "--api-key" else argument)
        hide = argument == "--api-key"
    return shown


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="slipstream bench serve",
        description="Load any OpenAI-compatible server with streamed requests and measure what its users would see.",
        allow_abbrev=False,
    )
    _add_server(made.add_argument_group("server"))
    _add_load(made.add_argument_group("load"))
    _add_requests(made.add_argument_group("requests"))
    _add_results(made.add_argument_group("results"))
    return made


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://127.0.0.1:8000", type=_url, help="with or without /v1 (%(default)s)")
    group.add_argument("--model", default="", metavar="ID", help="default: the first one of /v1/models")
    group.add_argument("--endpoint", choices=sorted(ENDPOINTS), default="completions", help="default: %(default)s")
    group.add_argument("--api-key", metavar="KEY", help="default: $SLIPSTREAM_API_KEY")
    group.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="per request (%(default)s s)")
    group.add_argument("--no-usage", action="store_true", help="do not ask for usage: tokens are counted as chunks")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--concurrency", type=_several(_count), metavar="N[,N...]", help="clients, each with one request (8)"
    )
    group.add_argument(
        "--request-rate", type=_several(_rate), metavar="R[,R...]", help="requests per second that arrive; inf for all"
    )
    group.add_argument("--burstiness", type=_positive, metavar="B", help="1: Poisson arrivals; below 1: in bursts (1)")
    group.add_argument("--num-requests", type=_count, metavar="N", help=f"of each point ({DEFAULT_REQUESTS})")
    group.add_argument("--duration", type=_positive, metavar="S", help="no request is sent after so many seconds")
    group.add_argument("--warmup", type=_natural, default=2, metavar="N", help="requests before, not counted (2)")
    group.add_argument("--seed", type=int, help="of prompts, lengths, arrivals and sampling (default: from the clock)")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompts", default="synthetic", metavar="WHAT", help=f"{', '.join(SOURCES)} or FILE.jsonl")
    lengths = "N, LOW-HIGH, normal:MEAN:SD or lognormal:MEDIAN:SIGMA tokens"
    group.add_argument("--input-len", type=_lengths, default=Lengths.fixed(128), metavar="L", help=f"{lengths} (128)")
    group.add_argument("--output-len", type=_lengths, metavar="L", help="the same for max_tokens (the data's, or 128)")
    group.add_argument("--ignore-eos", action="store_true", help="go on to max_tokens, where the server can")
    group.add_argument("--temperature", type=_not_negative, default=0.0, metavar="T", help="default: %(default)s")
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of each request"
    )


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput", type=_goodput, default={}, metavar="SLO", help="such as ttft:500,tpot:50 (ms; also e2e)"
    )
    group.add_argument("--output", type=_new_file, metavar="FILE.json", help="every request and every figure")
    group.add_argument("--details", action="store_true", help="with every single inter-token latency in it")
    group.add_argument("--plot", type=_new_file, metavar="FILE.png", help="a picture (needs matplotlib)")


# ---- values ----------------------------------------------------------------------------------------------


def _several(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [one(part.strip()) for part in text.split(",")]


def _url(text: str) -> str:
    if "://" in text and not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// or https:// address")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _natural(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _rate(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def _positive(text: str) -> float:
    value = _rate(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not finite")
    return value


def _not_negative(text: str) -> float:
    return 0.0 if _number(text) == 0 else _positive(text)


def _lengths(text: str) -> Lengths:
    try:
        return parse_lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _json_object(text: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: {error}") from None


def _goodput(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, limit = part.strip().partition(":")
        if name not in OBJECTIVES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(OBJECTIVES)} (as in ttft:500,tpot:50)")
        found[name] = _positive(limit)
    return found


def _new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path
