"""What one look at a server has found: `/metrics` as numbers by model, `/load` and `/health`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from server import metric_names as names

MODEL = "model_name"
# name of a family -> (its further label, its short name here): what is kept besides plain numbers
_LABELLED = {
    "vllm:request_success_total": "finished_reason",
    "vllm:admission_rejections_total": "reason",
    names.ACCEPTED_BY_POSITION[0]: "position",
    **{name: "verifier" for name, _ in names.VERIFIER_COUNTERS.values()},
}
HISTOGRAMS = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "slipstream:engine_step_seconds",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One model at one time. Counters are totals since its engine's start."""

    values: Mapping[str, float]
    labelled: Mapping[tuple[str, str], float]  # (name, value of its label)
    buckets: Mapping[str, tuple[tuple[float, float], ...]]  # (upper bound, how many are not above it), by histogram

    def of(self, name: str) -> dict[str, float]:
        """Values of a labelled family by label."""
        return {label: value for (family, label), value in self.labelled.items() if family == name}


@dataclass(frozen=True, slots=True)
class Look:
    """A server at one time (in monotonic seconds)."""

    at: float
    status: str  # ok, degraded, unhealthy
    reason: str
    ready: bool
    server_load: int
    draining: bool
    limited: float  # requests refused with 429, in total
    models: Mapping[str, Sample]


@dataclass(slots=True)
class _Collected:
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    labelled: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def sample(self) -> Sample:
        buckets = {name: tuple(sorted(bounds.items())) for name, bounds in self.buckets.items()}
        return Sample(dict(self.values), dict(self.labelled), buckets)


def read_metrics(page: str) -> tuple[dict[str, Sample], float]:
    """The models of a page of metrics, engines of one model added up, and the 429s. Raises ValueError for no page."""
    found: dict[str, _Collected] = defaultdict(_Collected)
    limited = 0.0
    for family in text_string_to_metric_families(page):
        for name, labels, value, *_ in family.samples:
            if name == names.RATE_LIMITED[0]:
                limited += value
            model = labels.get(MODEL)
            if model is not None:
                _take(found[model], name, labels, value)
    return {model: collected.sample() for model, collected in found.items()}, limited


def _take(into: _Collected, name: str, labels: Mapping[str, str], value: float) -> None:
    if name.endswith("_bucket") and name.removesuffix("_bucket") in HISTOGRAMS:
        into.buckets[name.removesuffix("_bucket")][float(labels["le"])] += value
    elif name in _LABELLED:
        into.labelled[name, labels.get(_LABELLED[name], "")] += value
    elif name == "vllm:kv_cache_usage_perc":
        into.values[name] = max(into.values[name], value)
    else:
        into.values[name] += value


def counted(samples: Iterable[Sample], name: str) -> float:
    return sum(sample.values.get(name, 0.0) for sample in samples)
