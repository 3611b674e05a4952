"""Traces: what is in them, whose children they are, and that nothing of it is there when they are off."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from engine.errors import Overloaded
from engine.types import FinishReason, Request, RequestSummary, SamplingParams, Usage
from server.app import create_app
from server.metrics import Metrics
from server.otel import OtelTracer, connect
from server.settings import Settings
from server.tracing import Tracer
from tests.denoisers import FULL_INFO
from tests.server.fake_engine import FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION_URL, Connection, started, stream

pytestmark = pytest.mark.asyncio
ROOMY = replace(FULL_INFO, max_canvas=256)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@asynccontextmanager
async def traced(engine: FakeEngine, tracer: Tracer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app({engine.info.id: engine}, Settings(), Metrics(), tracer=tracer)
    async with started(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client


class Memory:
    """A tracer whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OtelTracer(provider)

    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def trace(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The one server span and its children, in order."""
        (root,) = (span for span in self.spans() if span.kind is SpanKind.SERVER)
        assert root.context is not None
        children = [span for span in self.spans() if span is not root]
        for child in children:
            assert child.parent is not None and child.parent.span_id == root.context.span_id
            assert child.context is not None and child.context.trace_id == root.context.trace_id
        return root, children


async def test_a_request_is_one_trace() -> None:
    memory, engine = Memory(), FakeEngine()
    async with traced(engine, memory.tracer) as client:
        body = {**CHAT, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 5}
        response = await client.post(CHAT_URL, json=body, headers={"traceparent": PARENT, "x-request-id": "q"})
    root, children = memory.trace()
    assert root.name == "chat tiny" and root.parent is not None
    assert f"{root.parent.trace_id:032x}-{root.parent.span_id:016x}" == PARENT[3:52]
    assert root.status.status_code is StatusCode.UNSET
    told = dict(root.attributes or {})
    assert told.pop("slipstream.detokenize.seconds") > 0  # type: ignore[operator]
    assert told.pop("gen_ai.response.time_to_first_chunk") == 0.0  # the fake engine's clock stands still
    usage = response.json()["usage"]
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "slipstream",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": response.json()["id"],
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "http.request.method": "POST",
        "http.route": CHAT_URL,
        "slipstream.preemptions": 0,
        "slipstream.request_id": "q",
    }
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    times = [time for child in children for time in (child.start_time or 0, child.end_time or 0)]
    assert times == sorted(times)


async def test_spans_have_the_times_that_the_engine_tells() -> None:
    memory = Memory()
    request = Request("chatcmpl-a-0", (1, 2), SamplingParams(max_tokens=4))
    scope = {"headers": [], "path": CHAT_URL, "method": "POST"}
    trace = memory.tracer.begin(scope, FakeEngine().info, [request])
    usage = Usage(2, 4, 0)
    summary = RequestSummary(usage, FinishReason.STOP, 4, 1, 10.0, 2.0, 3.0, 5.0, 5.0, 1, request.id, detokenize=0.25)
    trace.note(summary)
    root, (queue, prefill, decode) = memory.trace()
    seconds = [round(((span.end_time or 0) - (span.start_time or 0)) / 1e9, 6) for span in (queue, prefill, decode)]
    assert seconds == [2.0, 3.0, 5.0]
    assert queue.end_time == prefill.start_time and prefill.end_time == decode.start_time
    told = root.attributes or {}
    assert (told["slipstream.detokenize.seconds"], told["gen_ai.response.time_to_first_chunk"]) == (0.25, 5.0)


async def test_names_are_those_of_the_conventions() -> None:
    memory = Memory()
    async with traced(FakeEngine(stands=(4, 1)), memory.tracer) as client:
        await client.post(CHAT_URL, json={**CHAT, "n": 2, "top_k": 1})
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    used = {name for span in memory.spans() for name in span.attributes or {} if name.startswith("gen_ai.")}
    assert len(used) > 15 and used <= known
    operations = {value.value for value in gen_ai_attributes.GenAiOperationNameValues}
    assert {"chat", "text_completion", "embeddings", "generate_content"} <= operations


async def test_drafting_and_denoising_are_told() -> None:
    memory = Memory()
    async with traced(FakeEngine(stands=(4, 1)), memory.tracer) as client:
        await client.post(CHAT_URL, json={**CHAT, "max_tokens": 9})
    told = dict(memory.trace()[1][-1].attributes or {})
    assert told["slipstream.speculation.rounds"] == 3 and told["slipstream.speculation.verifier"] == "strict"
    assert told["slipstream.speculation.drafted"] == 12
    assert told["slipstream.speculation.histogram"] == (0, 2, 0, 0, 1)
    memory = Memory()
    async with traced(FakeEngine(diffusion=ROOMY), memory.tracer) as client:
        await client.post(CHAT_URL, json={**CHAT, "max_tokens": 6})
    told = dict(memory.trace()[1][-1].attributes or {})
    assert told["slipstream.diffusion.forwards"] == 4 and "slipstream.speculation.rounds" not in told


async def test_choices_and_prompts_share_a_trace() -> None:
    memory = Memory()
    async with traced(FakeEngine(), memory.tracer) as client:
        events = await stream(client, COMPLETION_URL, {"prompt": ["aa", "bbb"], "n": 2, "max_tokens": 3})
    assert events
    root, children = memory.trace()
    told = dict(root.attributes or {})
    assert told["gen_ai.operation.name"] == "text_completion" and told["gen_ai.request.choice.count"] == 4
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (5, 12)
    assert told["gen_ai.response.finish_reasons"] == ("length",) * 4
    assert {(child.attributes or {})["slipstream.choice"] for child in children if child.name == "decode"} == {
        0,
        1,
        2,
        3,
    }


async def test_ends_that_are_no_answers() -> None:
    memory, engine = Memory(), FakeEngine()
    app = create_app({"tiny": engine}, Settings(), Metrics(), tracer=memory.tracer)
    async with started(app):
        engine.flowing.clear()
        gone = Connection(app, CHAT_URL, {**CHAT, "stream": True})
        await gone.next()
        await gone.leave()
        engine.refusal = Overloaded("full", "max_num_queued_reqs")
        refused = Connection(app, CHAT_URL, CHAT)
        assert (await refused.next())["status"] == 503
        await refused.rest()
        engine.refusal = None
        broken = Connection(app, CHAT_URL, {**CHAT, "logit_bias": {"99999": 1}})
        assert (await broken.next())["status"] == 400
        await broken.rest()
    roots = [span for span in memory.spans() if span.kind is SpanKind.SERVER]
    assert [span.status.status_code for span in roots] == [StatusCode.ERROR] * 3
    assert (roots[0].attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)
    assert [(span.attributes or {}).get("error.type") for span in roots[1:]] == ["Overloaded", "InvalidRequest"]
    assert not app.state.service.flights._live


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 500, PARENT * 50])
async def test_a_traceparent_that_is_none(header: str) -> None:
    memory = Memory()
    async with traced(FakeEngine(), memory.tracer) as client:
        headers = [(b"traceparent", header.encode()), (b"traceparent", b"again")]
        assert (await client.post(CHAT_URL, json=CHAT, headers=headers)).status_code == 200
    assert memory.trace()[0].parent is None


async def test_what_is_sampled_out_is_no_work() -> None:
    memory = Memory()
    async with traced(FakeEngine(), memory.tracer) as client:
        await client.post(CHAT_URL, json=CHAT, headers={"traceparent": PARENT[:-1] + "0"})
    assert memory.spans() == []


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.got: list[tuple[str, ExportTraceServiceRequest]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.got.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


async def test_spans_reach_a_collector() -> None:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        tracer = connect(f"{collector.url}/")
        async with traced(FakeEngine(), tracer) as client:
            await client.post(CHAT_URL, json=CHAT)
        tracer.close()
        collector.shutdown()
        thread.join()
    ((path, request),) = collector.got
    assert path == "/v1/traces"
    resource = {item.key: item.value.string_value for item in request.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "slipstream" and resource["service.version"]
    spans = request.resource_spans[0].scope_spans[0].spans
    assert {span.name for span in spans} == {"chat tiny", "queue", "prefill", "decode"}
    assert "hi" not in {item.value.string_value for span in spans for item in span.attributes}


async def test_nothing_is_imported_while_they_are_off() -> None:
    code = (
        "import sys, server.app, server.launch, server.serving\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')], sys.modules\n"
        "assert 'server.otel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
