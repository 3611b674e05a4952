"""Traces of requests for an OpenTelemetry collector; imported only where the settings name one.

One trace per submission, under the client's `traceparent` where it sent one: a server span, and below it for each
choice queue, prefill and decode. The engine tells a request's times when it has ended, so spans are made then, with
their real times. Names of attributes are those of the GenAI semantic conventions, and begin with `slipstream.` where
these have none. Nothing of what was asked or answered is in them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import Scope

from engine.types import FinishReason, ModelInfo, Request, RequestSummary
from server.errors import REQUEST_ID
from server.flights import prompt_tokens
from server.version import version

Attributes = dict[str, AttributeValue]

SERVICE = "slipstream"
TRACES_PATH = "/v1/traces"  # of OTLP over HTTP, below the address of a collector
EXPORT_SECONDS = 5.0
NANOS = 1_000_000_000
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "generate_content",
}
_CARRIED = (b"traceparent", b"tracestate")


def connect(endpoint: str) -> OtelTracer:
    """A tracer that sends to the collector at `endpoint`, in batches and from a thread of its own.

    The variables OTEL_* count as everywhere: headers, resource attributes, the sampler.
    """
    address = endpoint.rstrip("/")
    address = address if address.endswith(TRACES_PATH) else f"{address}{TRACES_PATH}"
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE, "service.version": version()}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address, timeout=EXPORT_SECONDS)))
    return OtelTracer(provider)


class OtelTracer:
    """A `tracing.Tracer` over any provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE, version())
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope, info: ModelInfo, requests: Sequence[Request]) -> OtelTrace:
        route = str(getattr(scope.get("route"), "path", scope["path"]))
        operation = OPERATIONS.get(route, "chat")
        carried = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        span = self._tracer.start_span(
            f"{operation} {info.id}",
            self._propagator.extract(carried),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "http.request.method": scope["method"],
                "http.route": route,
                "slipstream.request_id": str(scope.get(REQUEST_ID, "")),
                **_asked(info, requests),
            },
        )
        return OtelTrace(self, span, requests)

    def child(self, parent: Span, name: str, began: int, ended: int, attributes: Attributes) -> None:
        """A span that is over; times are in unix nanoseconds."""
        span = self._tracer.start_span(
            name, set_span_in_context(parent), SpanKind.INTERNAL, attributes, start_time=began
        )
        span.end(max(began, ended))

    def close(self) -> None:
        self._provider.shutdown()


class OtelTrace:
    """A `tracing.Trace`."""

    def __init__(self, tracer: OtelTracer, span: Span, requests: Sequence[Request]) -> None:
        self._tracer = tracer
        self._span = span
        self._places = {request.id: place for place, request in enumerate(requests)}
        self._prompt = prompt_tokens(requests)
        self._summaries: dict[int, RequestSummary] = {}

    def note(self, summary: RequestSummary) -> None:
        place = self._places[summary.request_id]
        self._summaries[place] = summary
        if self._span.is_recording():
            self._tell(place, summary)
        if len(self._summaries) == len(self._places):
            self._finish()

    def refused(self, error: Exception) -> None:
        self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.end()

    def _tell(self, place: int, summary: RequestSummary) -> None:
        ended = time.time_ns()
        arrived = ended - int(summary.e2e * NANOS)
        scheduled = arrived + int(summary.queue * NANOS)
        first = ended - int(summary.decode * NANOS)
        choice: Attributes = {"slipstream.choice": place}
        self._tracer.child(self._span, "queue", arrived, scheduled, choice)
        if summary.prefill or summary.first_token is not None:
            cached: Attributes = {"gen_ai.usage.cache_read.input_tokens": summary.usage.cached_tokens}
            self._tracer.child(self._span, "prefill", scheduled, first, {**choice, **cached})
        if summary.first_token is not None:
            self._tracer.child(self._span, "decode", first, ended, {**choice, **_decoded(summary)})

    def _finish(self) -> None:
        summaries = [self._summaries[place] for place in sorted(self._summaries)]
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [summary.finish.value for summary in summaries],
                "gen_ai.usage.input_tokens": self._prompt,
                "gen_ai.usage.output_tokens": sum(summary.usage.completion_tokens for summary in summaries),
                "gen_ai.usage.cache_read.input_tokens": summaries[0].usage.cached_tokens,
                "slipstream.detokenize.seconds": sum(summary.detokenize for summary in summaries),
                "slipstream.preemptions": sum(summary.preemptions for summary in summaries),
            }
        )
        waits = [summary.first_token for summary in summaries if summary.first_token is not None]
        if waits:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", min(waits))
        if any(summary.finish in (FinishReason.ERROR, FinishReason.ABORT) for summary in summaries):
            self._span.set_status(Status(StatusCode.ERROR, "a choice did not end well"))
        self._span.end()


def _asked(info: ModelInfo, requests: Sequence[Request]) -> Attributes:
    first, choices = requests[0], len(requests)
    sampling = first.sampling
    asked: Attributes = {
        "gen_ai.provider.name": SERVICE,
        "gen_ai.request.model": info.id,
        "gen_ai.response.model": info.id,
        "gen_ai.response.id": first.id.rpartition("-")[0],
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.seed": sampling.seed,
    }
    if sampling.top_k:
        asked["gen_ai.request.top_k"] = sampling.top_k
    if choices > 1:
        asked["gen_ai.request.choice.count"] = choices
    return asked


def _decoded(summary: RequestSummary) -> Attributes:
    """How the tokens of one choice came about."""
    drafting, passes = summary.speculation, summary.passes
    told: Attributes = {"gen_ai.usage.output_tokens": summary.usage.completion_tokens}
    if drafting.rounds:
        told |= {
            "slipstream.speculation.verifier": drafting.verifier,
            "slipstream.speculation.rounds": drafting.rounds,
            "slipstream.speculation.drafted": drafting.drafted,
            "slipstream.speculation.accepted": drafting.accepted,
            "slipstream.speculation.histogram": list(drafting.histogram),
            "slipstream.speculation.bias": drafting.bias,
        }
    if passes.forwards:
        told |= {
            "slipstream.diffusion.forwards": passes.forwards,
            "slipstream.diffusion.draft_forwards": passes.draft_forwards,
            "slipstream.diffusion.verifies": passes.verifies,
            "slipstream.diffusion.remasked": passes.remasked,
        }
    return told
