"""The requests of `bench serve`, made before the clock starts: what to send, and how long the answer may be."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import msgspec

from benchmarks import serve_datasets
from benchmarks.prompts import CountTokens, Prompts, licence_text
from benchmarks.serve_datasets import Content, Entry, Messages
from benchmarks.serve_lengths import Lengths
from benchmarks.serve_options import Options
from benchmarks.stream import BenchmarkError

DEFAULT_OUTPUT = Lengths.fixed(128)
# ShareGPT is cut as vLLM's benchmark cuts it, so that figures can be compared: tokens of prompt, reply and both.
SHORTEST, LONGEST_PROMPT, LONGEST_BOTH = 4, 1024, 2048


@dataclass(frozen=True, slots=True)
class Job:
    """One request: the JSON of its body, and how many tokens its prompt has, counted or estimated."""

    number: int
    body: bytes
    prompt_tokens: int


@dataclass
class JobMaker:
    """A deterministic source of jobs: the same options and counter give the same ones. `notes` tells what to know."""

    options: Options
    model: str
    count_tokens: CountTokens
    max_model_len: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.options.seed)
        self._serial = 0
        self._entries: Iterator[Entry] | None = None
        self._available = 0
        self._texts = Prompts(licence_text(), self.count_tokens, self.options.seed)

    async def make(self, count: int) -> list[Job]:
        """`count` jobs that were not made before, as long as the data set has some."""
        return [await self._next() for _ in range(count)]

    async def _next(self) -> Job:
        if self.options.prompts == "synthetic":
            length = self.options.input_length.draw(self._random)
            return self._job(await self._texts.make(length), self._output_length(None), length)
        while True:
            entry = next(self._source())
            tokens = await self._tokens_of(entry.content)
            reply = entry.max_tokens
            if entry.reply is not None and self.options.output_length is None:
                reply = await self.count_tokens(entry.reply)
            wanted = self._output_length(reply)
            if self.options.prompts != "sharegpt" or self._fits(tokens, wanted):
                return self._job(entry.content, wanted, tokens)

    async def _tokens_of(self, content: Content) -> int:
        """Of conversations: what is said in them, without the template."""
        messages = _messages(content)
        if messages is not None:
            content = "\n".join(str(message.get("content", "")) for message in messages)
        return await self.count_tokens(content) if isinstance(content, str) else len(content)

    def _fits(self, prompt: int, output: int) -> bool:
        longest = min(LONGEST_BOTH, self.max_model_len or LONGEST_BOTH)
        return min(prompt, output) >= SHORTEST and prompt <= LONGEST_PROMPT and prompt + output <= longest

    def _source(self) -> Iterator[Entry]:
        """The entries in turn, over and over; ShareGPT in an order that the seed gives."""
        if self._entries is None:
            entries = serve_datasets.read(self.options.prompts)
            if not entries:
                raise BenchmarkError(f"--prompts {self.options.prompts}: it is empty")
            if self.options.prompts == "sharegpt":
                self._random.shuffle(entries)
            self._entries = self._counted(entries)
        return self._entries

    def _counted(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        for number, entry in enumerate(cycle(entries)):
            if number == len(entries):
                self.notes.append(f"{self.options.prompts} has {number} prompts: they were sent again (prefix caches!)")
            yield entry

    def _output_length(self, of_the_data: int | None) -> int:
        if self.options.output_length is None and of_the_data is not None:
            return of_the_data
        return (self.options.output_length or DEFAULT_OUTPUT).draw(self._random)

    def _job(self, content: Content, max_tokens: int, prompt_tokens: int) -> Job:
        self._serial += 1
        body = request_body(self.options, self.model, content, max_tokens, self._serial)
        return Job(self._serial, msgspec.json.encode(body), prompt_tokens)


def request_body(options: Options, model: str, content: Content, max_tokens: int, number: int) -> dict[str, object]:
    """The JSON fields of a request; `--extra-body` has the last word. Raises BenchmarkError."""
    messages = _messages(content)
    if options.endpoint == "completions":
        if messages is not None:
            raise BenchmarkError("--prompts: messages need --endpoint chat")
        what: dict[str, object] = {"prompt": content}
    elif isinstance(content, str):
        what = {"messages": [{"role": "user", "content": content}]}
    elif messages is not None:
        what = {"messages": messages}
    else:
        raise BenchmarkError("--prompts: token ids need --endpoint completions")
    return {
        "model": model,
        **what,
        "max_tokens": max_tokens,
        "temperature": options.temperature,
        **({"seed": options.seed + number} if options.temperature else {}),
        **({"ignore_eos": True} if options.ignore_eos else {}),
        "stream": True,
        **({"stream_options": {"include_usage": True}} if options.usage else {}),
        **options.extra_body,
    }


def _messages(content: Content) -> Messages | None:
    found = [part for part in content if isinstance(part, dict)] if not isinstance(content, str) else []
    return found or None
