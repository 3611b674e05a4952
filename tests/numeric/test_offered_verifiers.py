"""Which verifiers a worker offers, with which drafts and heads; what it refuses; hidden states as heads see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import DraftConfig, VerifierConfig
from engine.errors import ConfigError, ModelLoadError
from engine.models.fingerprint import fingerprint
from engine.models.verifier_head import HeadSpec, save_head
from engine.protocols import DraftProposal, TargetRows, Verdict
from engine.registry import VERIFIERS
from engine.runtime.worker import LocalWorker
from engine.types import SpeculationParams
from engine.verifiers.diversed import DiversedVerifier
from tests.contract import neural
from tests.contract.ladder import Ladder, load_worker, request
from tests.tiny import save_tiny, tiny_config, tiny_model

NO_SCORES = {"ensemble", "diversed", "bounded"}  # what can't be had of a drafter that has no opinion


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a target, of its draft and of a head for both."""
    folder = tmp_path_factory.mktemp("pair")
    target, draft = save_tiny("llama", folder / "target"), neural.save_dflash(tiny_config("llama"), folder / "draft")
    save_head(folder / "head", HeadSpec(64, 64, 4, fingerprint(target), fingerprint(draft)), weights())
    return target, draft, folder / "head"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"{name}.weight": 0.1 * torch.randn(64, generator=generator) for name in ("draft", "target")} | {
        "bias": torch.linspace(1.0, -1.0, 4)
    }


def worker(target: Path, draft: DraftConfig | None, verifier: VerifierConfig, **options: Any) -> LocalWorker:
    return load_worker(target, memory="3MiB", threads=1, draft=draft, verifier=verifier, **options)  # type: ignore[arg-type]


def names(loaded: LocalWorker) -> list[str]:
    return [card.name for card in loaded.capacity().verifiers]


def test_all_are_offered_that_the_draft_and_the_head_can_serve(pair: tuple[Path, Path, Path]) -> None:
    target, draft, head = pair
    dflash, ngram = DraftConfig("dflash", str(draft)), DraftConfig("ngram")
    assert names(worker(target, None, VerifierConfig())) == []
    assert names(worker(target, ngram, VerifierConfig())) == [name for name in VERIFIERS if name not in NO_SCORES]
    assert names(worker(target, dflash, VerifierConfig())) == [name for name in VERIFIERS if name != "diversed"]
    bounded = names(worker(target, dflash, VerifierConfig("bounded")))
    assert bounded[0] == "bounded" and set(bounded) == set(VERIFIERS) - {"diversed"}
    for quant in ("none", "fp16"):
        headed = worker(target, dflash, VerifierConfig("diversed", head=str(head)), quant=quant)
        assert names(headed)[0] == "diversed" and set(names(headed)) == set(VERIFIERS)


@pytest.mark.parametrize(
    ("verifier", "problem"),
    [
        (VerifierConfig("strct"), r"models\.verifier\.name.*'strct'"),
        (VerifierConfig("ensemble"), r"models\.verifier\.name: 'ensemble' is not offered"),
        (VerifierConfig("diversed"), r"models\.verifier\.name: 'diversed' .*models\.verifier\.head"),
        (VerifierConfig("strict", head="somewhere"), r"models\.verifier\.head: .*here is none"),
        (VerifierConfig("lenient", {"lenient": 0.5}), r"models\.verifier\.knobs\.lenient: unknown"),
        (VerifierConfig("lenient", {"lenience": 1.5}), r"models\.verifier\.knobs\.lenience: must be"),
        (VerifierConfig("lenient", {"lenience": 0.5}, max_bias=0.25), r"models\.verifier.*max_bias of 0\.25"),
        (VerifierConfig("typical", max_bias=0.5), r"models\.verifier.*max_bias of 0\.5"),
    ],
)
def test_a_wrong_verifier_of_the_servers_own_is_refused_at_load(
    pair: tuple[Path, Path, Path], verifier: VerifierConfig, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        worker(pair[0], DraftConfig("ngram"), verifier)


def test_drafts_that_the_servers_verifier_has_no_use_for_are_refused(pair: tuple[Path, Path, Path]) -> None:
    target, draft, _ = pair
    for drafts, verifier, key in (
        (DraftConfig("dflash", str(draft), tree=8), VerifierConfig("bounded"), "tree"),
        (DraftConfig("dflash", str(draft), sample=True), VerifierConfig(), "sample"),
    ):
        with pytest.raises(ConfigError, match=rf"models\.draft\.{key}: .*models\.verifier\.name"):
            worker(target, drafts, verifier)


def test_a_head_is_for_one_pair(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, draft, head = pair
    other = neural.save_dflash(tiny_config("llama"), tmp_path / "draft", taps=(0, 2))
    narrow = tmp_path / "narrow"
    spec = HeadSpec(64, 32, 4, fingerprint(target), fingerprint(draft))
    save_head(narrow, spec, weights() | {"draft.weight": torch.zeros(32)})
    for drafts, given, problem in (
        (other, head, "draft_fingerprint"),
        (draft, narrow, "draft_width is 32, but .* 64"),
        (draft, draft, "architectures"),
    ):
        with pytest.raises(ModelLoadError, match=problem):
            worker(target, DraftConfig("dflash", str(drafts)), VerifierConfig("diversed", head=str(given)))


class Ear:
    """See `protocols.Verifier`: another one, listened to."""

    def __init__(self, inner: DiversedVerifier) -> None:
        self._inner, self.card, self.trees = inner, inner.card, inner.trees
        self.needs_laws = self.needs_marginal = self.needs_states = True
        self.heard: list[tuple[DraftProposal, TargetRows]] = []

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        self.heard.append((proposal, target))
        return self._inner.verify(proposal, target)


@torch.no_grad()
@pytest.mark.parametrize("drafter", ["dflash", "eagle3"])
def test_the_head_sees_both_networks_at_the_drafted_positions(
    pair: tuple[Path, Path, Path], tmp_path: Path, drafter: str
) -> None:
    """The target's last hidden state where the token is predicted, and the draft's where it drafts it."""
    target, draft, _ = pair
    if drafter == "eagle3":
        draft = neural.save_eagle3(tiny_config("llama"), tmp_path / "draft")
    save_head(tmp_path / "head", HeadSpec(64, 64, 4, fingerprint(target), fingerprint(draft)), weights())
    verifier = VerifierConfig("diversed", {"min_weight": 0.0}, str(tmp_path / "head"))
    loaded = worker(target, DraftConfig(drafter, str(draft), max_draft=3), verifier)
    menu = loaded._pipeline._menu  # type: ignore[attr-defined]
    menu._default = menu._table["diversed"] = ear = Ear(menu._default)
    prompt = list(range(40, 60))
    asked = [
        request("a", prompt, 12, temperature=0.8, seed=4),
        request("b", prompt[:5], 12, temperature=0.0, speculation=SpeculationParams(verifier="strict")),
    ]
    ladder = Ladder(loaded)
    answer = ladder.run(asked)["a"].tokens
    told = {each.name: each for each in ladder.stats.verifiers}
    assert told["diversed"].rounds == len(ear.heard) > 2 and told["diversed"].bias > 0 and told["strict"].bias == 0
    text, model = [*prompt, *answer], tiny_model("llama")
    for proposal, rows in ear.heard:
        drafted = proposal.tokens[0].tolist()
        assert rows.states is not None and proposal.hidden is not None
        assert proposal.hidden.shape == (1, len(drafted), 64)
        if drafter == "dflash":  # whose logits are those of the target's own head
            assert model.get_output_embeddings()(proposal.hidden[0].clone()).argmax(-1).tolist() == drafted
        distances = []
        for end in range(len(prompt) + 1, len(text) + 1):  # which round it was
            ids = torch.tensor([[*text[:end], *drafted]])
            states = model(ids, output_hidden_states=True).hidden_states[-1][0, end - 1 :]
            distances.append(float((states - rows.states[0]).abs().max()))
        assert min(distances) < 1e-3
