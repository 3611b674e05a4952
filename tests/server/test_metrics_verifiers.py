"""The counters by verifier: there from the start, one series for each that requests may choose, and no others."""

from __future__ import annotations

from dataclasses import replace

from engine.types import EngineStats, VerifierStats
from engine.verification import VerifierCard
from server.metrics import Metrics
from tests.server.test_metrics import DRAFTED, INFO, Samples, samples

CARDS = (VerifierCard("strict", True, "exact"), VerifierCard("ensemble", False, "a mixture"))
OFFERED = replace(DRAFTED, verifiers=CARDS)


def by_verifier(page: Samples, name: str, model: str = "m") -> dict[str, float]:
    """The values of a counter of that name, by verifier; its labels are checked."""
    found = {labels: v for (key, labels), v in page.items() if key == f"slipstream:spec_decode_{name}_total"}
    of_model = {labels: v for labels, v in found.items() if ("model_name", model) in labels}
    assert all(set(dict(labels)) == {"model_name", "engine", "verifier"} for labels in of_model)
    return {dict(labels)["verifier"]: v for labels, v in of_model.items()}


FIELDS = {
    "rounds": "rounds",
    "drafted": "drafted_tokens",
    "accepted": "accepted_tokens",
    "tokens": "tokens",
    "bias": "bias",
}


def test_verifiers_are_exposed_from_the_start_and_only_with_a_drafter() -> None:
    metrics = Metrics()
    metrics.observer("m", OFFERED)
    metrics.observer("plain", INFO).on_step(
        EngineStats(steps=1, spec_rounds=1, verifiers=(VerifierStats("strict", 1),))
    )
    page = samples(metrics)
    for name in FIELDS.values():
        assert by_verifier(page, name) == {"strict": 0, "ensemble": 0}
        assert by_verifier(page, name, "plain") == {}


def test_verifiers_count_what_is_new_and_survive_a_restart() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", OFFERED)
    strict, mixed = VerifierStats("strict", 2, 6, 4, 6), VerifierStats("ensemble", 1, 3, 3, 4, 0.5)
    observer.on_step(EngineStats(steps=5, spec_rounds=2, verifiers=(strict,)))
    observer.on_step(EngineStats(steps=6, spec_rounds=3, verifiers=(strict, mixed)))
    observer.on_step(EngineStats(steps=7, spec_rounds=4, verifiers=(strict, replace(mixed, rounds=2, bias=0.75))))
    observer.on_step(EngineStats(steps=1, spec_rounds=1, verifiers=(mixed,)))  # a new process
    page = samples(metrics)
    found = {field: by_verifier(page, name) for field, name in FIELDS.items()}
    assert {field: values["strict"] for field, values in found.items()} == {
        field: getattr(strict, field) for field in FIELDS
    }
    expected = {"rounds": 3, "drafted": 6, "accepted": 6, "tokens": 8, "bias": 1.25}
    assert {field: values["ensemble"] for field, values in found.items()} == expected


def test_a_verifier_that_was_never_offered_grows_no_series() -> None:
    metrics = Metrics()
    metrics.observer("m", OFFERED).on_step(EngineStats(steps=1, spec_rounds=1, verifiers=(VerifierStats("new", 1),)))
    assert by_verifier(samples(metrics), "rounds") == {"strict": 0, "ensemble": 0}
