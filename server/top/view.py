"""From two looks at a server to what is shown of each model: levels as they are, everything else by the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server import metric_names as names
from server.top.samples import Look, Sample

Bounds = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of what fell between two looks, in seconds; None where nothing did."""

    half: float | None
    most: float | None  # 95 % are not above it


@dataclass(frozen=True, slots=True)
class VerifierRow:
    name: str
    rounds: float  # a second
    acceptance: float
    tokens: float  # a round
    bias: float  # a token


@dataclass(frozen=True, slots=True)
class Drafting:
    """`positions`: share of the drafts in which the token at this place stood."""

    acceptance: float | None
    tokens: float | None  # a round
    positions: tuple[float, ...]
    verifiers: tuple[VerifierRow, ...]


@dataclass(frozen=True, slots=True)
class Denoising:
    tokens_per_forward: float | None
    tokens_per_step: float | None
    forwards: float  # a second
    positions_per_token: float | None
    remasked: float | None  # share of the committed tokens


@dataclass(frozen=True, slots=True)
class ModelView:
    """Rates are per second; shares from 0 to 1."""

    name: str
    healthy: bool
    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: float
    cached_tokens: float
    generated_tokens: float
    finished: float
    failed: float
    refused: float
    preempted: float
    prefix_hits: float | None
    first_token: Quantiles
    between_tokens: Quantiles
    step: Quantiles
    tokens_per_step: float | None
    drafting: Drafting | None
    denoising: Denoising | None


def views(before: Look, now: Look) -> list[ModelView]:
    """Of every model; one that was not there before is shown from its start on."""
    empty = Sample({}, {}, {})
    seconds = max(now.at - before.at, 1e-6)
    return [_Change(before.models.get(name, empty), sample, seconds).view(name) for name, sample in now.models.items()]


def restarted(before: Look, now: Look) -> bool:
    """Do counters begin anew? Then nothing can be told of the time between."""
    return any(
        name in before.models
        and sample.values.get("vllm:generation_tokens_total", 0.0)
        < before.models[name].values.get("vllm:generation_tokens_total", 0.0)
        for name, sample in now.models.items()
    )


def quantile(share: float, before: Bounds, now: Bounds) -> float | None:
    """As Prometheus' histogram_quantile: linear inside a bucket. None where nothing fell into any."""
    earlier = dict(before)
    counts = [(bound, count - earlier.get(bound, 0.0)) for bound, count in now]
    if not counts or counts[-1][1] <= 0:
        return None
    rank, low, below = share * counts[-1][1], 0.0, 0.0
    for bound, count in counts:
        if count >= rank and count > below:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = (bound, count) if bound != float("inf") else (low, count)
    return low


@dataclass(frozen=True, slots=True)
class _Change:
    before: Sample
    now: Sample
    seconds: float

    def count(self, name: str) -> float:
        return max(0.0, self.now.values.get(name, 0.0) - self.before.values.get(name, 0.0))

    def rate(self, name: str) -> float:
        return self.count(name) / self.seconds

    def by_label(self, name: str) -> dict[str, float]:
        before = self.before.of(name)
        return {label: max(0.0, value - before.get(label, 0.0)) for label, value in self.now.of(name).items()}

    def level(self, name: str) -> float:
        return self.now.values.get(name, 0.0)

    def quantiles(self, name: str) -> Quantiles:
        bounds = self.before.buckets.get(name, ()), self.now.buckets.get(name, ())
        return Quantiles(quantile(0.5, *bounds), quantile(0.95, *bounds))

    def view(self, name: str) -> ModelView:
        ended = self.by_label("vllm:request_success_total")
        return ModelView(
            name=name,
            healthy=self.level(names.HEALTH[0]) > 0,
            running=int(self.level("vllm:num_requests_running")),
            waiting=int(self.level("vllm:num_requests_waiting")),
            kv_usage=self.level("vllm:kv_cache_usage_perc"),
            prompt_tokens=self.rate("vllm:prompt_tokens_total"),
            cached_tokens=self.rate("vllm:prompt_tokens_cached_total"),
            generated_tokens=self.rate("vllm:generation_tokens_total"),
            finished=sum(ended.values()) / self.seconds,
            failed=ended.get("error", 0.0) / self.seconds,
            refused=sum(self.by_label("vllm:admission_rejections_total").values()) / self.seconds,
            preempted=self.rate("vllm:num_preemptions_total"),
            prefix_hits=self._over("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            first_token=self.quantiles("vllm:time_to_first_token_seconds"),
            between_tokens=self.quantiles("vllm:inter_token_latency_seconds"),
            step=self.quantiles("slipstream:engine_step_seconds"),
            tokens_per_step=self._over("vllm:iteration_tokens_total_sum", "vllm:iteration_tokens_total_count"),
            drafting=self._drafting(),
            denoising=self._denoising(),
        )

    def _over(self, part: str, whole: str) -> float | None:
        total = self.count(whole)
        return self.count(part) / total if total else None

    def _drafting(self) -> Drafting | None:
        rounds, drafted, accepted = names.SPECULATION_COUNTERS
        if rounds not in self.now.values:
            return None
        made = self.count(rounds)
        stood = self.by_label(names.ACCEPTED_BY_POSITION[0])
        places = sorted(stood, key=int)
        return Drafting(
            acceptance=self._over(accepted, drafted),
            tokens=1 + self.count(accepted) / made if made else None,
            positions=tuple(stood[place] / made for place in places) if made else (),
            verifiers=self._verifiers(),
        )

    def _verifiers(self) -> tuple[VerifierRow, ...]:
        """Those that had anything to do."""
        counts = {field: self.by_label(name) for field, (name, _) in names.VERIFIER_COUNTERS.items()}
        return tuple(
            VerifierRow(
                verifier,
                made / self.seconds,
                counts["accepted"].get(verifier, 0.0) / max(counts["drafted"].get(verifier, 0.0), 1.0),
                counts["tokens"].get(verifier, 0.0) / made,
                counts["bias"].get(verifier, 0.0) / max(counts["tokens"].get(verifier, 0.0), 1.0),
            )
            for verifier, made in sorted(counts["rounds"].items())
            if made
        )

    def _denoising(self) -> Denoising | None:
        of = {field: name for field, (name, _) in names.DIFFUSION_COUNTERS.items()}
        if of["denoise_steps"] not in self.now.values:
            return None
        tokens = of["denoise_committed"]
        return Denoising(
            tokens_per_forward=self._over(tokens, of["denoised.forwards"]),
            tokens_per_step=self._over(tokens, of["denoise_steps"]),
            forwards=self.rate(of["denoised.forwards"]),
            positions_per_token=self._over(of["denoised.positions"], tokens),
            remasked=self._over(of["denoised.remasked"], tokens),
        )
