"""OpenVINO GenAI's continuous batching behind the least HTTP that the scenarios need; run by the peer's own Python.

Nothing of this project is imported here: that venv has openvino-genai and tokenizers alone. The library has no server,
so this one does as little as it can: the library's steps run in a thread that hands over what each one made, prompts
go in as ids, and each token leaves as one chunk. A model.gguf is turned into the library's own files when it is first
read.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import openvino  # type: ignore[import-not-found]  # in the peer's venv only
import openvino_genai  # type: ignore[import-not-found]
from tokenizers import Tokenizer

STEP_TOKENS = 512  # fed in one step at most, as ours
Body = dict[str, Any]


class Asked(NamedTuple):
    """A request on its way to the library; `deliver` gets the new ids of each step."""

    ids: Sequence[int]
    max_tokens: int
    deliver: Callable[[list[int]], object]


@dataclass
class Running:
    """A request that the library works on; `left` tokens are still to come."""

    handle: Any
    deliver: Callable[[list[int]], object]
    left: int


class Engine:
    """The library's pipeline in a thread. Requests come in through a queue."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.max_num_seqs = arguments.slots
        scheduler.max_num_batched_tokens = STEP_TOKENS
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": arguments.threads}
        if arguments.precision:
            properties["INFERENCE_PRECISION_HINT"] = arguments.precision
        folder = str(converted(arguments.model))
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._asked: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, asked: Asked) -> None:
        self._asked.put(asked)

    def _run(self) -> None:
        numbers, running = itertools.count(), list[Running]()
        while True:
            while not running or not self._asked.empty():  # waits only where there is nothing else to do
                running.append(self._add(next(numbers), self._asked.get()))
            self._pipeline.step()
            for request in running:
                while request.handle.can_read():
                    for output in request.handle.read().values():
                        request.left -= len(output.generated_ids)
                        request.deliver(list(output.generated_ids))
            running = [request for request in running if request.left > 0]

    def _add(self, number: int, asked: Asked) -> Running:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = asked.max_tokens, True, False
        ids = openvino.Tensor(numpy.array([asked.ids], dtype=numpy.int64))
        return Running(self._pipeline.add_request(number, ids, config), asked.deliver, asked.max_tokens)


def converted(model: Path) -> Path:
    """The folder of a GGUF file, with the library's own files in it."""
    if not (model.parent / "openvino_model.xml").exists():
        openvino_genai.LLMPipeline(str(model), "CPU", enable_save_ov_model=True)
    return model.parent


class Server:
    """/health, /v1/models and streamed /v1/completions, one request per turn of a kept connection."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                content = await reader.readexactly(int(lengths[0])) if lengths else b""
                if head.startswith(b"POST /v1/completions "):
                    await self._stream(writer, json.loads(content))
                else:
                    known = head.startswith((b"GET /health ", b"GET /v1/models "))
                    plain = json.dumps({"object": "list", "data": [{"id": self._name}]} if known else {}).encode()
                    status = "200 OK" if known else "404 Not Found"
                    writer.write(_head("application/json", f"Content-Length: {len(plain)}", status) + plain)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, body: Body) -> None:
        writer.write(_head("text/event-stream", "Transfer-Encoding: chunked"))
        ids, limit, count = self._tokenizer.encode(body["prompt"]).ids, body["max_tokens"], 0
        async for token in self._tokens(ids, limit):
            count += 1
            choice = {"index": 0, "text": self._tokenizer.decode([token], skip_special_tokens=False)}
            writer.write(_event({"choices": [{**choice, "finish_reason": "length" if count == limit else None}]}))
        usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
        writer.write(_event({"choices": [], "usage": usage}) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async def _tokens(self, ids: Sequence[int], limit: int) -> AsyncIterator[int]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[list[int]]()
        self._engine.ask(Asked(ids, limit, lambda new: loop.call_soon_threadsafe(arrived.put_nowait, new)))
        while limit > 0:
            new = await arrived.get()
            limit -= len(new)
            for token in new:
                yield token


def _head(kind: str, length: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{length}\r\n\r\n".encode()


def _event(fields: Body) -> bytes:
    return _chunk(b"data: " + json.dumps({"object": "text_completion", **fields}).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(arguments: argparse.Namespace) -> None:
    """Until somebody ends it."""
    served = Server(Engine(arguments), Tokenizer.from_file(str(arguments.tokenizer)), arguments.alias)
    async with await asyncio.start_server(served.connected, "127.0.0.1", arguments.port) as listening:
        await listening.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--precision", default="", help="of the arithmetic; the library's own choice by default")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
