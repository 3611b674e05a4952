"""Training of drafts: the traps that ruin acceptance, the loss, and runs that are killed and go on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from engine.errors import ConfigError
from engine.models.dflash.formats import TargetFacts, load
from tests.numeric.dflash_reference import Reference
from tests.tiny import save_tiny, tiny_config
from training.batches import Corpus
from training.data import shards
from training.data.states import TargetStates
from training.dflash import DFlashTask
from training.drafts import DFlashDraft, Shape
from training.loss import Labels, mixed_cross_entropy
from training.network import DraftNetwork
from training.trainer import Schedule, Trainer

CPU = torch.device("cpu")
TAPS = (0, 2)
LAST = 3
SHAPE = Shape(taps=TAPS, layers=2, block_size=5, random_start=True)


@dataclass
class World:
    """A tiny target, its answers (texts that count up and down, so that there is something to learn) and states."""

    folder: Path
    data: Path

    def corpus(self) -> Corpus:
        return Corpus(self.data, taps=(*TAPS, LAST))

    def draft(self, shape: Shape = SHAPE) -> DFlashDraft:
        torch.manual_seed(3)
        return DFlashDraft(self.folder, self.corpus(), shape, CPU)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    save_tiny("llama", root / "target")
    source = TargetStates(root / "target", (*TAPS, LAST), CPU)
    samples = []
    for number in range(24):
        tokens = [(number * 5 + step * (1 + number % 2)) % 90 + 20 for step in range(26 + number % 5)]
        states = source(torch.tensor(tokens))[:-1]
        samples.append(shards.Sample(str(number), tokens, 4 + number % 3, states))
    (root / "data").mkdir()
    shards.write(root / "data" / "shard-00000.safetensors", samples[:13], (*TAPS, LAST))
    shards.write(root / "data" / "shard-00001.safetensors", samples[13:], (*TAPS, LAST))
    return World(root / "target", root / "data")


def task_of(draft: DFlashDraft) -> DFlashTask:
    assert isinstance(draft.task, DFlashTask)
    return draft.task


def network_of(draft: DFlashDraft) -> DraftNetwork:
    return task_of(draft).network


def run(network: DraftNetwork, states: torch.Tensor, tokens: torch.Tensor, anchors: list[int]) -> torch.Tensor:
    """Last hidden states [anchors, slots, width] of blocks of one sequence, masks embedded as ones."""
    slots, width = network.spec.block_size, network.spec.hidden_size
    inputs = torch.ones(1, len(anchors), slots, width)
    inputs[0, :, 0] = functional.one_hot(tokens[anchors] % width, width).float()
    hidden = network(states.unsqueeze(0), inputs.flatten(1, 2), torch.tensor([anchors]))
    return hidden[0].unflatten(0, (len(anchors), slots))


# ---- the four traps: dflash.md section 4 ------------------------------------------------------------------


@pytest.mark.parametrize("anchor_predicts", [False, True])
def test_trap_one_labels_stand_at_the_positions_of_their_slots(world: World, anchor_predicts: bool) -> None:
    """Slot j >= 1 predicts the token at anchor + j, not the one after it; DSpark's slot j the one at anchor + j + 1."""
    draft = world.draft(replace(SHAPE, anchor_predicts=anchor_predicts))
    corpus = world.corpus()
    batch = corpus.batch(corpus.training[:3], 4, task_of(draft).columns, torch.Generator().manual_seed(0))
    rows, at = task_of(draft)._label_places(batch)
    anchors = batch.anchors[batch.visible]
    most = 5 if anchor_predicts else 4
    assert at.tolist() == [[anchor + j for j in range(1, most + 1)] for anchor in anchors.tolist()]
    assert rows[:, 0].tolist() == batch.visible.nonzero()[:, 0].tolist()


def test_trap_two_the_context_ends_before_the_anchor(world: World) -> None:
    """The target's state at the anchor does not exist yet when the block is drafted."""
    network = network_of(world.draft())
    states, tokens = torch.randn(20, 2 * 64), torch.arange(20)
    before = run(network, states, tokens, [7, 12])
    later = states.clone()
    later[7:] += 1.0
    after = run(network, later, tokens, [7, 12])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    earlier = states.clone()
    earlier[6] += 1.0
    assert not torch.allclose(before[0], run(network, earlier, tokens, [7, 12])[0], atol=1e-3)


def test_trap_three_a_block_sees_itself_both_ways_and_no_other_block(world: World) -> None:
    network = network_of(world.draft())
    states, slots = torch.randn(1, 20, 2 * 64), network.spec.block_size
    inputs = torch.randn(1, 2 * slots, 64)
    positions = torch.tensor([[7, 9]])
    before = network(states, inputs, positions)[0].unflatten(0, (2, slots))
    changed = inputs.clone()
    changed[0, slots - 1] += 1.0  # the last slot of the first block
    after = network(states, changed, positions)[0].unflatten(0, (2, slots))
    assert not torch.allclose(before[0, 0], after[0, 0], atol=1e-4), "the first slot must see the last"
    assert torch.equal(before[1], after[1])


def test_trap_four_anchors_are_random_and_new_in_every_epoch(world: World) -> None:
    corpus = world.corpus()
    columns = corpus.columns(TAPS, 64)
    found: dict[tuple[int, ...], list[list[int]]] = {}
    steps = -(-len(corpus.training) // 4)
    for number, batch in enumerate(corpus.epochs(4, 3, columns, seed=5)):
        if number == 2 * steps:
            break
        for tokens, length, anchors in zip(batch.tokens, batch.lengths.tolist(), batch.anchors.tolist(), strict=True):
            found.setdefault(tuple(tokens[:length].tolist()), []).append(anchors)
            assert len(set(anchors)) == 3
    assert len(found) == len(corpus.training)
    assert all(len(turns) == 2 for turns in found.values()), "every sample once an epoch"
    changed = sum(first != second for first, second in found.values())
    assert changed > 0.8 * len(found), "the blocks of the two epochs must differ"
    distances = {b - a for first, _ in found.values() for a, b in itertools.pairwise(first)}
    assert len(distances) > 3, "uniform blocks would have one distance"


def test_anchors_have_a_label_and_belong_to_the_answer(world: World) -> None:
    corpus = world.corpus()
    batch = corpus.batch(corpus.training, 100, corpus.columns(TAPS, 64), torch.Generator().manual_seed(0))
    for row, (s, i) in enumerate(corpus.training):
        anchors = batch.anchors[row][batch.visible[row]].tolist()
        prompt = int(shards.read(corpus.paths[s]).prompt_lens[i])
        assert anchors == list(range(prompt, int(batch.lengths[row]) - 1))


# ---- training and inference are one network ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [
    SHAPE,
    replace(SHAPE, layers=1, anchor_predicts=True, markov_rank=4),
    replace(SHAPE, draft_vocab=48),
    replace(SHAPE, random_start=False),
])  # fmt: skip
def test_a_trained_draft_drafts_as_in_training(world: World, shape: Shape, tmp_path: Path) -> None:
    """The saved checkpoint, by the plain-loop reference of inference, has the logits that training saw."""
    draft = world.draft(shape)
    network = network_of(draft)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    draft.save(tmp_path)
    target = load_target(world.folder)
    spec, tensors, _ = load(tmp_path, TargetFacts.of(target.config))
    corpus = world.corpus()
    shard = shards.read(corpus.paths[0])
    tokens = shard.tokens[: int(shard.starts[1])].long()
    anchors = [6, 9, 14]
    embedded = target.get_input_embeddings().weight.detach().float()
    ids = torch.full((len(anchors), spec.block_size), spec.mask_token_id)
    ids[:, 0] = tokens[anchors]
    features = shard.states[: len(tokens), task_of(draft).columns[: len(TAPS) * 64]]
    hidden = network(features.unsqueeze(0), embedded[ids].flatten(0, 1).unsqueeze(0), torch.tensor([anchors]))
    hidden = hidden[0].unflatten(0, (len(anchors), -1))[:, spec.block_size - spec.most :]
    head = tensors.get("lm_head.weight", embedded).float()
    expected = (hidden @ head.T).detach()
    reference = Reference(spec, {**tensors}, target)
    for row, anchor in enumerate(anchors):
        logits, _, _ = reference.draft(tokens[: anchor + 1].tolist(), lambda _, size: torch.zeros(size))
        scale = expected[row].abs().max()
        assert (logits.float() - expected[row]).abs().max() < 0.03 * scale  # the checkpoint is bf16, the states fp16


def load_target(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


# ---- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [1.0, 0.3, 0.0])
def test_the_fused_loss_is_the_plain_one_and_has_its_gradients(hard: float) -> None:
    torch.manual_seed(1)
    rows, width, vocab, rank = 1500, 12, 17, 3  # more rows than one chunk
    hidden = torch.randn(rows, width, requires_grad=True)
    markov = torch.randn(rows, rank, requires_grad=True)
    w2 = torch.randn(vocab, rank, requires_grad=True)
    head, weights = torch.randn(vocab, width), torch.rand(rows)
    ids = torch.randint(0, vocab, (rows,))
    teacher, teacher_rows = torch.randn(40, vocab), torch.randint(0, 40, (rows,))
    loss, best = mixed_cross_entropy(hidden, head, Labels(ids, teacher, teacher_rows), weights, hard, markov, w2)
    loss.backward()
    got = [part.grad.clone() for part in (hidden, markov, w2)]  # type: ignore[union-attr]
    for part in (hidden, markov, w2):
        part.grad = None
    logits = hidden @ head.T + markov @ w2.T
    law = hard * functional.one_hot(ids, vocab) + (1 - hard) * teacher.softmax(1)[teacher_rows]
    plain = (-(law * logits.log_softmax(1)).sum(1) * weights).sum()
    plain.backward()
    assert torch.allclose(loss, plain, rtol=1e-5)
    assert torch.equal(best, logits.argmax(1))
    for mine, part in zip(got, (hidden, markov, w2), strict=True):
        assert torch.allclose(mine, part.grad, atol=1e-4)  # type: ignore[arg-type]


def test_the_teacher_is_the_target_itself(world: World) -> None:
    """Its row for a label is the target's own logits one position before, restricted to the draft vocabulary."""
    draft = world.draft(replace(SHAPE, draft_vocab=48))
    task, corpus, target = task_of(draft), world.corpus(), load_target(world.folder)
    batch = corpus.batch(corpus.training[:3], 5, task.columns, torch.Generator().manual_seed(0))
    rows, at = task._label_places(batch)
    inside = at < batch.lengths[rows]
    logits, places = task._teacher(batch, rows, at.clamp(max=batch.tokens.shape[1] - 1))
    for row, length in enumerate(batch.lengths.tolist()):
        own = target(batch.tokens[row : row + 1, :length]).logits[0][:, draft._vocabulary].float()
        for block in (rows[:, 0] == row).nonzero()[:, 0].tolist():
            for step in inside[block].nonzero()[:, 0].tolist():
                expected = own[at[block, step] - 1]
                error = (logits[places[block, step]] - expected).abs().max()
                assert error < 0.03 * expected.abs().max()  # bf16 products


def test_labels_outside_the_draft_vocabulary_or_the_answer_weigh_nothing(world: World) -> None:
    draft = world.draft(replace(SHAPE, draft_vocab=20))
    task, corpus = task_of(draft), world.corpus()
    batch = corpus.batch(corpus.training[:2], 100, task.columns, torch.Generator().manual_seed(0))
    _, right, inside = task.loss(batch)
    rows, at = task._label_places(batch)
    assert torch.equal(inside, at < batch.lengths[rows])
    unknown = ~torch.isin(batch.tokens[rows, at.clamp(max=batch.tokens.shape[1] - 1)], draft._vocabulary)
    assert unknown.any()
    assert not (right & (unknown | ~inside)).any()


# ---- the trainer ------------------------------------------------------------------------------------------

SCHEDULE = Schedule(steps=12, sequences=4, anchors=6, lr=3e-3, evaluate_every=4, save_every=3)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(world: World, tmp_path: Path) -> None:
    whole = world.draft()
    Trainer(whole.task, world.corpus(), SCHEDULE, tmp_path / "whole").run(lambda *_: None, lambda _: None)

    def kill(step: int, _: float) -> None:
        if step == 8:
            raise Killed

    first = Trainer(world.draft().task, world.corpus(), SCHEDULE, tmp_path / "parts")
    with pytest.raises(Killed):
        first.run(kill, lambda _: None)
    second = world.draft()
    trainer = Trainer(second.task, world.corpus(), SCHEDULE, tmp_path / "parts")
    assert trainer.step == 6  # the last checkpoint before the kill
    trainer.run(lambda *_: None, lambda _: None)
    for (name, one), two in zip(
        network_of(whole).state_dict().items(), network_of(second).state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    assert [point.step for point in trainer.points] == [4, 8, 12]
    with pytest.raises(ConfigError, match="another schedule"):
        Trainer(second.task, world.corpus(), replace(SCHEDULE, lr=1.0), tmp_path / "parts")


def test_training_learns_and_measures_it(world: World, tmp_path: Path) -> None:
    draft = world.draft(replace(SHAPE, hard=1.0))
    schedule = replace(SCHEDULE, steps=150, anchors=16, lr=5e-3, evaluate_every=50)
    trainer = Trainer(draft.task, world.corpus(), schedule, tmp_path)
    start = trainer.evaluate()[0]
    trainer.run(lambda *_: None, lambda _: None)
    assert trainer.points[-1].loss < 0.5 * trainer.points[0].loss
    assert trainer.points[-1].acceptance_length > start + 1.0
    survival = trainer.points[-1].survival
    assert list(survival) == sorted(survival, reverse=True)


# ---- where hidden states come from ------------------------------------------------------------------------


def test_states_on_the_fly_are_those_that_were_kept(world: World) -> None:
    kept = world.corpus()
    fly = Corpus(world.data, world.folder, (*TAPS, LAST), CPU)
    columns = kept.columns((*TAPS, LAST), 64)
    one = kept.batch(kept.training[:4], 5, columns, torch.Generator().manual_seed(2))
    two = fly.batch(fly.training[:4], 5, columns, torch.Generator().manual_seed(2))
    assert torch.equal(one.anchors, two.anchors)
    used = torch.arange(one.states.shape[1]) < one.lengths.unsqueeze(1) - 1
    assert torch.allclose(one.states[used].float(), two.states[used].float(), atol=2e-2)


def test_a_corpus_that_lacks_a_tap_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="holds the layers"):
        Corpus(world.data, taps=(1,))


def test_the_network_has_the_published_names() -> None:
    """11 tensors a layer and three more: dflash.md 2.2."""
    from tests.tiny_drafts import tiny_spec, tiny_tensors

    spec = tiny_spec(tiny_config("llama"))
    folded = DraftNetwork(spec).folded()
    assert {name: tensor.shape for name, tensor in folded.items()} == {
        name: tensor.shape for name, tensor in tiny_tensors(spec).items()
    }
    assert isinstance(DraftNetwork(spec).fc, nn.Linear)
