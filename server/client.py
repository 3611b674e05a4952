"""`slipstream chat` and `slipstream complete`: small HTTP clients that work with any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import httpx
import msgspec

from server.connect import UNIX, open_client
from server.draft_view import DraftView, Report, Trace, legend
from server.pass_view import Passes, describe
from server.settings import load_settings, wants_colours

_HELP = "/clear forgets the conversation, /exit leaves (as does Ctrl-D); Ctrl-C stops an answer."


class ClientError(Exception):
    """The server can't be reached or said no; the message is for the user."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Delta = msgspec.field(default_factory=_Delta)
    speculation: Trace | None = None


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    """One event of a stream, or the body of an error: only the fields that are read here."""

    choices: list[_Choice] = msgspec.field(default_factory=list)
    speculation: Report | None = None
    diffusion: Passes | None = None
    error: _Error | None = None


class Piece(NamedTuple):
    """What one chunk says of the answer."""

    text: str
    trace: Trace | None = None
    report: Report | None = None
    passes: Passes | None = None


class Shown(NamedTuple):
    """What is shown of an answer beside its text."""

    drafts: bool = False
    passes: bool = False


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


class Client:
    """One server, one model. Raises ClientError for everything that can go wrong on the way."""

    def __init__(self, url: str, api_key: str | None, model: str | None, options: Mapping[str, object]) -> None:
        self._http = open_client(url, api_key, "/v1", httpx.Timeout(10, read=None))  # a long queue is no error
        self._url = url if url.startswith(UNIX) else self._http.base_url
        self._options = options
        self.model = model or ""

    def find_model(self) -> None:
        """Take the first model that the server has, unless one was named."""
        if self.model:
            return
        with self._friendly():
            response = self._http.get("models")
            _raise_for_error(response)
            models = msgspec.json.decode(response.content, type=_ModelList).data
        if not models:
            raise ClientError(f"the server at {self._url} serves no model")
        self.model = models[0].id

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Generator[Piece, None, None]:
        """The pieces of the answer, as they come."""
        for chunk in self._stream("chat/completions", {"messages": list(messages)}):
            for choice in chunk.choices or [_Choice()]:
                yield Piece(choice.delta.content or "", choice.speculation, chunk.speculation, chunk.diffusion)

    def complete(self, prompt: str) -> Generator[Piece, None, None]:
        """The pieces of the continuation, as they come."""
        for chunk in self._stream("completions", {"prompt": prompt}):
            for choice in chunk.choices or [_Choice()]:
                yield Piece(choice.text, choice.speculation, chunk.speculation, chunk.diffusion)

    def close(self) -> None:
        self._http.close()

    def _stream(self, path: str, body: Mapping[str, object]) -> Generator[_Chunk, None, None]:
        body = {"model": self.model, "stream": True, **self._options, **body}
        with self._friendly(), self._http.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
            _raise_for_error(response)
            for line in response.iter_lines():
                field, _, data = line.partition(":")
                if field != "data":
                    continue  # comments keep the connection alive
                if data.strip() == "[DONE]":
                    return
                chunk = msgspec.json.decode(data, type=_Chunk)
                if chunk.error is not None:
                    raise ClientError(chunk.error.message)
                yield chunk
            raise ClientError("the answer ended before it was complete")

    @contextlib.contextmanager
    def _friendly(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            hint = "start one with `slipstream serve`"
            raise ClientError(f"no server answers at {self._url}; {hint}") from error
        except httpx.HTTPError as error:
            raise ClientError(f"the connection to {self._url} failed: {error}") from error
        except msgspec.DecodeError as error:
            raise ClientError(f"{self._url} answers, but not like an OpenAI API: {error}") from error


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    reason = f"HTTP {response.status_code} {response.reason_phrase}"
    with contextlib.suppress(msgspec.DecodeError):
        error = msgspec.json.decode(response.content, type=_Chunk).error
        reason = error.message if error is not None else reason
    raise ClientError(reason)


# ---- the commands ----------------------------------------------------------------------------------------


def chat(arguments: Sequence[str]) -> int:
    """Talk to a served model until the user leaves."""
    parser = _parser("chat", f"Talk to a served model. {_HELP}")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parsed = parser.parse_args(arguments)
    system = [{"role": "system", "content": parsed.system}] if parsed.system else []
    return _with_client(parsed, lambda client, shown: _converse(client, system, shown))


def complete(arguments: Sequence[str]) -> int:
    """Print the continuation of a text."""
    parser = _parser("complete", "Print how a served model continues a text.")
    parser.add_argument("text", help="the text to continue; - reads it from standard input")
    parsed = parser.parse_args(arguments)
    text = sys.stdin.read() if parsed.text == "-" else parsed.text
    return _with_client(parsed, lambda client, shown: _print_pieces(client.complete(text), shown))


def _with_client(parsed: argparse.Namespace, use: Callable[[Client, Shown], object]) -> int:
    names = ("max_tokens", "temperature", "top_p", "seed")
    options: dict[str, object] = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    if parsed.show_drafts:
        options["speculation"] = {"report": True, "trace": True}
    if parsed.show_passes:
        options["diffusion"] = {"report": True}
    api_key = parsed.api_key or next(iter(load_settings().keys), None)
    try:
        with contextlib.closing(Client(parsed.url, api_key, parsed.model, options)) as client:
            client.find_model()
            if parsed.show_drafts:
                print(legend(wants_colours(sys.stdout)))
            use(client, Shown(parsed.show_drafts, parsed.show_passes))
    except (ClientError, httpx.InvalidURL) as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return 1
    return 0


def _converse(client: Client, system: list[dict[str, str]], shown: Shown) -> None:
    history = list(system)
    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # importing it gives input() line editing and history
        print(f"{client.model}. {_HELP}")
        prompt = "> "
    while True:
        try:
            text = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            history = list(system)
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            history.append({"role": "user", "content": text})
            try:
                answer = _print_pieces(client.chat(history), shown)
            except ClientError as error:
                print(f"slipstream: {error}", file=sys.stderr)
                history.pop()  # so that the next message does not fail for the same reason
            else:
                history.append({"role": "assistant", "content": answer})


def _print_pieces(pieces: Generator[Piece, None, None], shown: Shown) -> str:
    """Print a stream as it comes and return the whole of it; Ctrl-C ends it, and closing it tells the server."""
    view = DraftView(wants_colours(sys.stdout)) if shown.drafts else None
    whole, report, passes = [], None, None
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):
        for text, trace, told, taken in pieces:
            report, passes = told or report, taken or passes
            whole.append(text)
            print(text if view is None else view.show(text, trace), end="", flush=True)
    print("" if view is None else view.close(report))
    if shown.passes:
        print(describe(passes))
    return "".join(whole)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"slipstream {command}", description=description)
    where = "where the server is; unix:PATH is a socket (default: %(default)s)"
    parser.add_argument("--url", default="http://127.0.0.1:8000", help=where)
    parser.add_argument("--model", metavar="ID", help="which model to ask (default: the first one it serves)")
    parser.add_argument("--api-key", metavar="KEY", help="the key, where one is wanted (default: $SLIPSTREAM_API_KEY)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="at most this many tokens (default: the server's)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this joint mass")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--show-drafts", action="store_true", help="mark each token by where it came from")
    parser.add_argument(
        "--show-passes", action="store_true", help="tell in how many forward passes a diffusion model denoised it"
    )
    return parser
