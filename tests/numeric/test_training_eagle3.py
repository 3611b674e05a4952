"""Training of EAGLE-3 drafts: the pass over many anchors is the served chain, it learns, it is saved whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from engine.config import DraftConfig
from engine.errors import ConfigError
from engine.models.draft_files import TargetFacts
from engine.models.eagle3.formats import load
from engine.protocols import DraftAsk
from engine.runtime.batch import SeqInput
from tests.contract.ladder import Ladder, assert_same, load_worker, request
from tests.tiny import save_tiny, tiny_config, tiny_model
from training.batches import Corpus
from training.data import shards
from training.data.states import TargetStates
from training.drafts import DRAFTS
from training.eagle3 import Eagle3Network, Eagle3Task
from training.eagle3_draft import Eagle3Draft
from training.shapes import Shape
from training.trainer import Schedule, Trainer

CPU = torch.device("cpu")
TAPS, LAST = (0, 1, 2), 3
SHAPE = Shape(taps=TAPS, block_size=5, draft_vocab=100)


@dataclass
class World:
    """A tiny target and answers that count up and down, so that there is something to learn."""

    folder: Path
    data: Path

    def draft(self, shape: Shape = SHAPE) -> Eagle3Draft:
        torch.manual_seed(3)
        return Eagle3Draft(self.folder, self.corpus(), shape, CPU)

    def corpus(self) -> Corpus:
        return Corpus(self.data, taps=(*TAPS, LAST))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("training")
    save_tiny("llama", root / "target")
    source = TargetStates(root / "target", (*TAPS, LAST), CPU)
    samples = []
    for number in range(24):
        tokens = [(number * 5 + step * (1 + number % 2)) % 90 + 20 for step in range(26 + number % 5)]
        samples.append(shards.Sample(str(number), tokens, 4 + number % 3, source(torch.tensor(tokens))[:-1]))
    (root / "data").mkdir()
    shards.write(root / "data" / "shard-00000.safetensors", samples, (*TAPS, LAST))
    return World(root / "target", root / "data")


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Eagle3Draft, Trainer, Path]:
    """A draft that has learned a little, and its checkpoint."""
    draft, folder = world.draft(), tmp_path_factory.mktemp("trained")
    schedule = Schedule(steps=60, sequences=6, anchors=12, lr=4e-3, evaluate_every=15, save_every=60)
    trainer = Trainer(draft.task, world.corpus(), schedule, folder / "training")
    trainer.run(lambda *_: None, lambda _: None)
    draft.save(folder / "draft")
    return draft, trainer, folder / "draft"


def states_of(tokens: list[int]) -> torch.Tensor:
    """[T, taps * width] float32 of the target's layers."""
    model, found = tiny_model("llama"), {}
    for tap in TAPS:
        model.model.layers[tap].register_forward_hook(
            lambda _, __, out, tap=tap: found.update({tap: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return torch.cat([found[tap].view(len(tokens), -1) for tap in TAPS], dim=1)


def test_it_learns(trained: tuple[Eagle3Draft, Trainer, Path]) -> None:
    _, trainer, _ = trained
    losses = [point.loss for point in trainer.points]
    assert losses[-1] < losses[0] - 0.7  # half of it is the target's own law, which no draft takes below its entropy
    assert trainer.points[-1].acceptance_length > trainer.points[0].acceptance_length + 0.3
    assert len(trainer.points[-1].survival) == 4


@pytest.mark.parametrize("variant", [(True, True), (False, False)])
def test_the_training_pass_is_the_served_chain(
    world: World, trained: tuple[Eagle3Draft, Trainer, Path], variant: tuple[bool, bool], tmp_path: Path
) -> None:
    """The same hidden states at every anchor and step, for the same tokens; so the same drafts."""
    folder = tmp_path / "draft"
    _, _, saved = trained
    folder.mkdir()
    settings = json.loads((saved / "config.json").read_text())
    settings |= {"norm_before_residual": variant[0], "norm_output": variant[1]}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    spec, tensors, _ = load(folder, TargetFacts.of(tiny_config("llama")))
    network = Eagle3Network(spec)
    names = {name.replace("layers.0.", "midlayer."): tensor.float() for name, tensor in tensors.items()}
    network.load_state_dict(names, strict=False)
    tokens, anchors, steps = [(7 * i * i) % 90 + 20 for i in range(30)], [1, 2, 15, 16, 17, 25], 4
    with torch.no_grad():
        embedded = tiny_model("llama").get_input_embeddings()(torch.tensor([tokens]))
        expected = network(states_of(tokens)[None], embedded, torch.tensor([anchors]), steps)[0]
    worker = load_worker(world.folder, memory="8MiB", threads=1, draft=DraftConfig("eagle3", str(folder)))
    pipeline = worker._pipeline
    model, table = pipeline._drafter._model, (3, 1)  # type: ignore[attr-defined]
    for row, anchor in enumerate(anchors):
        # What later positions hold must not matter: the whole sequence, then the anchor's chain over it.
        pipeline._runner.forward([SeqInput(tokens, 0, table, len(tokens))], [0])  # type: ignore[attr-defined]
        chain = model.start([DraftAsk("x", steps, anchor, 1, table)])
        got = torch.cat([chain.advance(torch.tensor([tokens[anchor + step]]))[1] for step in range(steps)])
        assert torch.allclose(got, expected[row], atol=2e-4, rtol=1e-4), f"anchor {anchor}"
        assert model.logits(got).argmax(1).tolist() == model.logits(expected[row]).argmax(1).tolist()


def test_a_chain_sees_only_what_was_there(trained: tuple[Eagle3Draft, Trainer, Path]) -> None:
    """The target's state at the anchor does not exist yet when its successor is drafted; that before it is needed."""
    network = trained[0].task.network
    assert isinstance(network, Eagle3Network)
    generator = torch.Generator().manual_seed(1)
    states, embedded = (torch.randn(1, 20, width, generator=generator) for width in (192, 64))
    anchors = torch.tensor([[7, 12]])
    with torch.no_grad():
        before = network(states, embedded, anchors, 3)
        later = states.clone()
        later[:, 7:] += 1.0
        after = network(later, embedded, anchors, 3)
        earlier = states.clone()
        earlier[:, 6] += 1.0
        moved = network(earlier, embedded, anchors, 3)
        other = embedded.clone()
        other[:, 8] += 1.0
        retold = network(states, other, anchors, 3)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1], atol=1e-3)
    assert not torch.allclose(before[:, 0], moved[:, 0], atol=1e-3)
    assert torch.equal(before[:, 0, 0], retold[:, 0, 0]), "the first draft does not know its own token"
    assert not torch.allclose(before[:, 0, 1], retold[:, 0, 1], atol=1e-3)


def test_labels_are_the_tokens_that_follow(world: World) -> None:
    """A network that says the next token everywhere is right everywhere."""
    draft = world.draft()
    task = draft.task
    assert isinstance(task, Eagle3Task)
    corpus = world.corpus()
    batch = corpus.batch(corpus.training[:3], 4, task.columns, torch.Generator().manual_seed(0))
    following = batch.tokens.roll(-1, 1)
    head = task._head.float()

    class Teller(torch.nn.Module):
        spec = draft._spec

        def forward(self, _: object, __: object, anchors: torch.Tensor, steps: int) -> torch.Tensor:
            at = (anchors.unsqueeze(-1) + torch.arange(steps)).clamp(max=batch.tokens.shape[1] - 1)
            ids = task._draft_ids[following.unsqueeze(1).expand(-1, at.shape[1], -1).gather(2, at)]
            return head[ids] * 1e3

    task.network = Teller()  # type: ignore[assignment]
    _, right, inside = task.loss(batch)
    assert torch.equal(right, inside) and 12 <= int(inside.sum()) <= 48
    assert not inside.all(), "no chain reaches past its answer"


def test_saved_in_the_original_layout(world: World, trained: tuple[Eagle3Draft, Trainer, Path]) -> None:
    draft, _, folder = trained
    spec, tensors, kind = load(folder, TargetFacts.of(tiny_config("llama")))
    assert kind == "EAGLE-3" and spec == replace(draft._spec, own_head=True)
    assert (spec.taps, spec.most, spec.draft_vocab_size) == (TAPS, 4, 100)
    head = tiny_model("llama").get_output_embeddings().weight[tensors["d2t"]]
    assert torch.equal(tensors["lm_head.weight"], head.detach().bfloat16())
    assert DRAFTS["eagle3"] is Eagle3Draft and Eagle3Draft.default_taps(30) == (1, 14, 27)
    requests = [request(f"r{i}", [30 + i, 31 + i, 32 + i, 33 + i], 12, temperature=0.0, logprobs=2) for i in range(4)]
    expected = Ladder(load_worker(world.folder, memory="8MiB", threads=1)).run(requests)
    worker = load_worker(world.folder, memory="8MiB", threads=1, draft=DraftConfig("eagle3", str(folder), 4))
    ladder = Ladder(worker)
    assert assert_same(expected, ladder.run(requests)) == 0
    assert ladder.stats.spec_drafted > 0


def test_shapes_that_no_such_draft_has_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="--layers"):
        world.draft(replace(SHAPE, layers=2))
    with pytest.raises(ConfigError, match="--taps"):
        world.draft(replace(SHAPE, taps=(0, 9)))
