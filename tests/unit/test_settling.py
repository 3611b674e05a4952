"""What a request's verifier and knobs come to, and every way in which they can be wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import DraftConfig, EngineConfig, ModelConfig, VerifierConfig
from engine.core import model_info
from engine.errors import ConfigError, InvalidRequest
from engine.speculation import settle, settle_server
from engine.types import Capacity, DecodeTraits, ModelInfo, Request, SamplingParams, SpeculationParams
from engine.validate import validate
from engine.verification import Knob, VerifierCard

STRICT = VerifierCard("strict", True, "exact", exact=True)
RATIO = VerifierCard("rejection", True, "a ratio", drawn=True)
MIXED = VerifierCard("ensemble", False, "", (Knob("target_weight", 0.7, 0.0, 1.0, "", neutral=1.0),), drawn=True)
BOUNDED = VerifierCard("bounded", False, "", (Knob("epsilon", 0.1, 0.0, 1.0, "", neutral=0.0),), drawn=True)
TYPICAL = VerifierCard(
    "typical",
    False,
    "",
    (Knob("posterior_threshold", 0.3, 0.0, 1.0, ""), Knob("posterior_alpha", 0.09, 0.0, 100.0, "")),
)
GAP = VerifierCard(
    "top_k_gap", False, "", (Knob("relaxed_topk", 8, 1, 1000, "", whole=True), Knob("relaxed_delta", 0.5, 0, 100, ""))
)
CARDS = (STRICT, RATIO, MIXED, BOUNDED, TYPICAL, GAP)
PLAIN = ModelInfo("m", "m", 64, 100, (99,), 4, 32, 0, "none", "autoregressive")
INFO = replace(PLAIN, drafter="dflash", max_draft=4, verifier="strict", verifiers=CARDS, thinking=(7, 8))
LAW = "this server lets a verifier move a token's law"
LOOSE = replace(INFO, verifier="ensemble", verifier_knobs=(("target_weight", 0.9),))


def ask(verifier: str = "", sample: bool | None = None, thinking_only: bool = False, **knobs: Any) -> SpeculationParams:
    return SpeculationParams(verifier=verifier, knobs=tuple(knobs.items()), sample=sample, thinking_only=thinking_only)


def refusal(asked: SpeculationParams, info: ModelInfo = INFO) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        settle(asked, info)
    assert refused.value.message.startswith(f"{refused.value.param} ")
    return refused.value


@pytest.mark.parametrize(
    ("info", "asked", "name", "knobs", "bound"),
    [
        (INFO, ask(), "strict", {}, 0.0),
        (INFO, ask("rejection", sample=True), "rejection", {}, 0.0),
        (INFO, ask("ensemble"), "ensemble", {"target_weight": 0.7}, 0.3),
        (INFO, ask("ensemble", target_weight=1), "ensemble", {"target_weight": 1.0}, 0.0),
        (INFO, ask("ensemble", target_weight=0), "ensemble", {"target_weight": 0.0}, 1.0),
        (INFO, ask("bounded", epsilon=0.02), "bounded", {"epsilon": 0.02}, 0.02),
        (INFO, ask("typical"), "typical", {"posterior_threshold": 0.3, "posterior_alpha": 0.09}, 1.0),
        (INFO, ask("top_k_gap", relaxed_topk=3), "top_k_gap", {"relaxed_topk": 3, "relaxed_delta": 0.5}, 1.0),
        (LOOSE, ask(), "ensemble", {"target_weight": 0.9}, 0.1),
        (LOOSE, ask("ensemble"), "ensemble", {"target_weight": 0.9}, 0.1),
        (LOOSE, ask(target_weight=0.8), "ensemble", {"target_weight": 0.8}, 0.2),
        (LOOSE, ask("bounded"), "bounded", {"epsilon": 0.1}, 0.1),
        (LOOSE, ask("strict"), "strict", {}, 0.0),
    ],
)  # fmt: skip
def test_what_is_left_open_is_the_servers_or_the_default(
    info: ModelInfo, asked: SpeculationParams, name: str, knobs: dict[str, float], bound: float
) -> None:
    settled = settle(asked, info)
    assert (settled.verifier, dict(settled.knobs), settled.bias_bound) == (name, knobs, bound)
    assert [type(value) for value in dict(settled.knobs).values()] == [
        int if key == "relaxed_topk" else float for key in knobs
    ]
    assert settled.report == (bound > 0)
    assert settled.sample is asked.sample and settled.thinking is None
    assert settle(settled, info) == settled


def test_a_namesakes_knob_is_another_one() -> None:
    other = replace(MIXED, name="other", knobs=(replace(MIXED.knobs[0], default=0.4),))
    info = replace(LOOSE, verifiers=(*CARDS, other))
    assert settle(ask("other"), info).knobs == (("target_weight", 0.4),)


def test_validate_settles() -> None:
    request = Request("r", (1,), SamplingParams(max_tokens=8), speculation=ask("ensemble"))
    assert validate(request, INFO).speculation == settle(ask("ensemble"), INFO)


@pytest.mark.parametrize("off", [{"enabled": False}, {"max_draft": 0}])
def test_an_answer_without_drafts_is_not_lossy(off: dict[str, Any]) -> None:
    settled = settle(replace(ask("ensemble"), **off), INFO)
    assert (settled.verifier, settled.bias_bound, settled.report) == ("ensemble", 0.0, False)
    assert refusal(replace(ask("ensemble", target_weight=2), **off)).param == "speculation.target_weight"


def test_what_a_caller_fills_in_himself_does_not_count() -> None:
    forged = replace(ask("ensemble"), bias_bound=0.0, thinking=(1, 2))
    assert settle(forged, INFO) == settle(ask("ensemble"), INFO)
    assert settle(replace(ask(), bias_bound=0.5), PLAIN) == ask()


def test_thinking_tokens_are_the_models() -> None:
    assert settle(ask("ensemble", thinking_only=True), INFO).thinking == (7, 8)
    error = refusal(ask("ensemble", thinking_only=True), replace(INFO, thinking=None))
    assert error.param == "speculation.thinking_only"
    assert "no tokens around its thinking" in error.message


@pytest.mark.parametrize(
    ("verifier", "knob", "value"),
    [
        *(("ensemble", "target_weight", value) for value in (-0.01, 1.01, math.nan, math.inf, 10**400)),
        *(("ensemble", "target_weight", value) for value in ("0.5", True, None)),
        *(("typical", "posterior_alpha", value) for value in (-1, 100.5, "1")),
        *(("top_k_gap", "relaxed_topk", value) for value in (0, 1001, 8.0, 0.5, True, math.nan)),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_with_the_bounds(verifier: str, knob: str, value: Any) -> None:
    error = refusal(ask(verifier, **{knob: value}))
    low, high = {"target_weight": (0, 1), "posterior_alpha": (0, 100), "relaxed_topk": (1, 1000)}[knob]
    kind = "an integer" if knob == "relaxed_topk" else "a number"
    assert error.message == f"speculation.{knob} must be {kind} between {low} and {high}"
    assert (error.param, error.code) == (f"speculation.{knob}", None)


@pytest.mark.parametrize(
    ("info", "asked", "param", "text"),
    [
        (INFO, ask("ensemble", epsilon=0.1), "epsilon",
         "is no knob of the verifier 'ensemble', which has target_weight; it belongs to bounded"),
        (INFO, ask(target_weight=0.5), "target_weight",
         "is no knob of the verifier 'strict', which has none; it belongs to ensemble"),
        (LOOSE, ask("typical", target_weight=0.5), "target_weight",
         "is no knob of the verifier 'typical', which has posterior_threshold, posterior_alpha;"
         " it belongs to ensemble"),
        (INFO, ask("ensemble", nonsense=1), "nonsense",
         "is no knob of the verifier 'ensemble', which has target_weight"),
        (INFO, ask("strict", sample=True), "sample",
         "can't be true with the verifier 'strict', whose drafts are chosen; drawn ones are for"
         " rejection, ensemble, bounded"),
        (replace(INFO, drafter="ngram"), ask("rejection", sample=True), "sample",
         "can't be true: the drafter 'ngram' has no law to draw from"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_verifier_is_refused(
    info: ModelInfo, asked: SpeculationParams, param: str, text: str
) -> None:
    error = refusal(asked, info)
    assert error.message == f"speculation.{param} {text}"
    assert (error.param, error.code) == (f"speculation.{param}", "unsupported_parameter")


@pytest.mark.parametrize("name", ["diversed", "Strict", " strict", "x" * 500, "\ud800"])
def test_an_unknown_verifier_hears_of_the_known_ones(name: str) -> None:
    error = refusal(ask(name))
    assert error.param == "speculation.verifier"
    assert error.message.endswith(
        "is not offered by this model; it has strict, rejection, ensemble, bounded, typical, top_k_gap"
    )
    assert len(error.message) < 200 and error.message.encode()


@pytest.mark.parametrize(
    ("ceiling", "asked", "param", "text"),
    [
        (0.1, ask("ensemble"), "target_weight",
         f"must be at least 0.9: {LAW} by 0.1 at most, and 0.7 may move it by 0.3"),
        (0.1, ask("bounded", epsilon=0.2), "epsilon",
         f"must be at most 0.1: {LAW} by 0.1 at most, and 0.2 may move it by 0.2"),
        (0.0, ask("ensemble", target_weight=0.999), "target_weight",
         f"must be at least 1: {LAW} by 0 at most, and 0.999 may move it by 0.001"),
        (0.9, ask("typical", posterior_threshold=1), "verifier",
         f"'typical' sets no bound to its bias, and {LAW} by 0.9 at most"),
    ],
)  # fmt: skip
def test_the_ceiling_names_the_knob_and_what_would_be_allowed(
    ceiling: float, asked: SpeculationParams, param: str, text: str
) -> None:
    error = refusal(asked, replace(INFO, max_bias=ceiling))
    assert (error.param, error.message) == (f"speculation.{param}", f"speculation.{param} {text}")


@given(st.integers(0, 1000))
def test_a_knob_on_the_ceiling_passes(thousandths: int) -> None:
    """Whatever the last digits of 1 - w are."""
    for ceiling in (thousandths / 1000, 1 - thousandths / 1000):
        info = replace(INFO, max_bias=ceiling)
        assert settle(ask("ensemble", target_weight=1 - ceiling), info).bias_bound == pytest.approx(ceiling)
        assert settle(ask("bounded", epsilon=ceiling), info).bias_bound == pytest.approx(ceiling)
        if ceiling < 1:
            assert "at least" in refusal(ask("ensemble", target_weight=max(0.0, 1 - ceiling - 1e-6)), info).message
            assert refusal(ask("typical"), info).param == "speculation.verifier"
    assert settle(ask("rejection"), replace(INFO, max_bias=0.0)).bias_bound == 0


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (ask("strict"), "verifier"),
        (ask("ensemble", target_weight=1), "verifier"),
        (ask(target_weight=1), "target_weight"),
        (ask("x" * 500), "verifier"),
        (SpeculationParams(knobs=(("y" * 500, 1),)), "y" * 63 + "…"),
        (ask(sample=True), "sample"),
        (ask(thinking_only=True), "thinking_only"),
    ],
)
def test_a_model_without_a_drafter_verifies_nothing(asked: SpeculationParams, param: str) -> None:
    error = refusal(asked, PLAIN)
    assert (error.param, error.code) == (f"speculation.{param}", "unsupported_parameter")
    assert error.message == f"speculation.{param} does nothing here: this model is served without a drafter"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sample": 1}, "sample"),
        ({"thinking_only": "yes"}, "thinking_only"),
        ({"verifier": None}, "verifier"),
        ({"knobs": {"target_weight": 1}}, "knobs"),
        ({"knobs": (("target_weight", 1, 2),)}, "knobs"),
        ({"knobs": ((3, 1),)}, "knobs"),
        ({"verifier": "ensemble", "knobs": (("target_weight", 1), ("target_weight", 0.5))}, "target_weight"),
    ],
)
def test_what_is_of_another_type_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal(SpeculationParams(**fields)).param == f"speculation.{param}"


# ---- the server's own ------------------------------------------------------------------------------------


def test_the_servers_knobs_are_completed() -> None:
    assert settle_server(VerifierConfig(), CARDS) == ()
    assert settle_server(VerifierConfig("ensemble"), CARDS) == (("target_weight", 0.7),)
    config = VerifierConfig("top_k_gap", {"relaxed_delta": 1})
    assert settle_server(config, CARDS) == (("relaxed_topk", 8), ("relaxed_delta", 1.0))
    assert settle_server(VerifierConfig("ensemble", {"target_weight": 0.7}, max_bias=0.3), CARDS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VerifierConfig("lenient"), "models.verifier.name: 'lenient' is not offered with this draft; known: strict,"),
        (VerifierConfig("diversed"), r"'diversed' is not offered .* needs a trained head \(models.verifier.head\)"),
        (VerifierConfig("ensemble", {"epsilon": 0.1}), "knobs.epsilon: unknown to ensemble, which has target_weight"),
        (VerifierConfig(knobs={"epsilon": 0.1}), "knobs.epsilon: unknown to strict, which has none"),
        (VerifierConfig("ensemble", {"target_weight": 1.5}), "knobs.target_weight: must be a number between 0 and 1"),
        (VerifierConfig("top_k_gap", {"relaxed_topk": 2.5}), "knobs.relaxed_topk: must be an integer"),
        (VerifierConfig("ensemble", max_bias=0.2), r"ensemble as it is set may move .* by 0.3, .* own max_bias of 0.2"),
        (VerifierConfig("typical", max_bias=0.2), "typical as it is set may move a token's law by 1"),
    ],
)  # fmt: skip
def test_a_server_that_breaks_its_own_rules_does_not_start(config: VerifierConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle_server(config, CARDS)


def test_a_front_process_knows_what_requests_may_choose() -> None:
    capacity = Capacity(8, 4, 64, 100, DecodeTraits(lookahead=4, drafts=True), verifiers=CARDS)
    verifier = VerifierConfig("ensemble", {"target_weight": 0.9}, head="heads/one/", max_bias=0.5)
    draft = DraftConfig("dflash", "drafts/d", sample=True)
    config = EngineConfig(ModelConfig("m", pipeline="speculative", draft=draft, verifier=verifier))
    info = model_info(config, capacity, (99,), 0, lambda _: ("think", (7, 8)))
    assert (info.verifier, info.verifier_knobs, info.max_bias) == ("ensemble", (("target_weight", 0.9),), 0.5)
    assert (info.verifiers, info.verifier_head, info.sample, info.thinking) == (CARDS, "one", True, (7, 8))
    with pytest.raises(ConfigError, match=r"models\.verifier\.name: 'ensemble' is not offered"):
        model_info(config, replace(capacity, verifiers=(STRICT,)), (99,), 0)
    plain = model_info(EngineConfig(), replace(capacity, traits=DecodeTraits(), verifiers=()), (99,), 0)
    assert (plain.verifier, plain.verifier_knobs, plain.verifiers, plain.thinking) == ("", (), (), None)
