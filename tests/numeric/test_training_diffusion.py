"""Training of the small diffusion models: the task, what is masked, who sees whom, runs that go on, what is saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from engine.errors import ConfigError
from training.diffusion import batches, checkpoint, loss, masking, report, vocabulary
from training.diffusion.network import KeyValue, Network, Shape, block_masks
from training.diffusion.sampling import Sampler
from training.diffusion.trainer import Schedule, Trainer
from training.tasks.loading import load
from training.tasks.task import held_out
from training.train_diffusion import main

SHAPE = Shape(vocab=300, hidden=32, inner=64, layers=2, heads=2, head_dim=16)
BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return vocabulary.train(batches.corpus(1, 200), SHAPE.vocab)


@pytest.fixture(scope="module")
def sheets(tokenizer: Tokenizer) -> batches.Sheets:
    return batches.Sheets(tokenizer)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(5)
    network = Network(SHAPE)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms that are not 1, logits that differ
    return network


def objective(tokenizer: Tokenizer) -> loss.Objective:
    mask_id, end_id = (vocabulary.token(tokenizer, text) for text in (vocabulary.MASK, vocabulary.END))
    return loss.Objective(mask_id, end_id, BLOCK)


# ---- tokens and masks -------------------------------------------------------------------------------------


def test_held_out_sheets_never_meet_training(sheets: batches.Sheets) -> None:
    """Training draws what `held_out` refuses; the task that is measured draws what it takes, 2,000 and more."""
    task = load("worksheet")
    test = task.items("test", 2000, seed=7)
    assert len({item.prompt for item in test}) == 2000
    assert all(held_out(item) for item in test)
    asked = {tuple(sheets.encode(item.prompt).prompt) for item in test}
    assert not asked & {tuple(sample.prompt) for sample in sheets.samples(Random(7), 500)}
    assert task.score(test[0].reference, test[0]) == 1.0


def test_the_tokenizer_takes_any_text_and_splits_digits(tokenizer: Tokenizer) -> None:
    text = "12 Bären\n\t<|nothing|> 東 007"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    years = vocabulary.train(["2024 2024 and 2024"] * 50, 300)  # a number that it would make one token
    assert [years.id_to_token(token) for token in years.encode("2024").ids] == ["2", "0", "2", "4"]
    assert [tokenizer.token_to_id(text) for text in vocabulary.SPECIALS] == [0, 1, 2, 3]


def test_samples_become_canvases_and_blocks(sheets: batches.Sheets) -> None:
    samples = sheets.step(1, 0, 4)
    assert samples == sheets.step(1, 0, 4) != sheets.step(1, 1, 4)
    for batch in (sheets.on_canvas(samples, Random(0)), sheets.in_blocks(samples, BLOCK)):
        for row, sample in enumerate(samples):
            known = len(sample.prompt)
            assert batch.ids[row, : known + len(sample.answer)].tolist() == sample.prompt + sample.answer
            assert set(batch.ids[row, known + len(sample.answer) :].tolist()) <= {sheets.end}
            assert batch.answers[row].nonzero().flatten().tolist() == list(range(known, int(batch.lengths[row])))
    room = sheets.on_canvas(samples, Random(0)).answers.sum(1)
    assert (room % 32 == 0).all() and (room <= 256).all()
    assert (sheets.in_blocks(samples, BLOCK).lengths % BLOCK == 0).all()


def test_masks_are_complementary_and_spare_the_prompt(sheets: batches.Sheets, tokenizer: Tokenizer) -> None:
    batch = sheets.in_blocks(sheets.step(1, 0, 6), BLOCK)
    generator = torch.Generator().manual_seed(0)
    for drawn in (masking.uniform(batch.answers, generator), masking.by_block(batch.answers, BLOCK, generator)):
        first, second = masking.complementary(drawn, batch.answers).chunk(2)
        assert torch.equal(first ^ second, batch.answers)
        assert 0 < int(first.sum()) < int(batch.answers.sum())
    always = replace(objective(tokenizer), leftward=1.0)
    hidden, told = loss.canvas_masks(batch, always, torch.Generator().manual_seed(3))
    (first, second), behind = hidden.chunk(2), told[: len(batch.ids)]
    assert torch.equal(told, behind.repeat(2, 1)) and not (hidden & ~batch.answers.repeat(2, 1)).any()
    assert torch.equal(first & second, behind)  # what is open is hidden once, what is behind it twice
    open_ = (first | second) & ~behind
    assert (open_.sum(1) <= BLOCK).all() and (open_.sum(1) > 0).all()
    for row in range(len(open_)):
        places = open_[row].nonzero().flatten()
        assert (int(places[0]) - batch.answers[row].long().argmax()) % BLOCK == 0
        assert behind[row].nonzero().flatten().tolist() == list(range(int(places[-1]) + 1, int(batch.lengths[row])))


def test_levels_differ_between_sequences_and_blocks() -> None:
    answers = torch.ones(64, 4 * 200, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    rates = masking.uniform(answers, generator).float().mean(1)
    assert rates.min() < 0.1 and rates.max() > 0.9
    by_block = masking.by_block(answers, 200, generator).float().unflatten(1, (4, 200)).mean(2)
    assert by_block.std(1).mean() > 0.15  # within a sequence


def test_the_three_part_mask_is_that_of_a_plain_loop() -> None:
    length, tail = 12, 8
    over_clean, over_both = block_masks(length, tail, 4, torch.device("cpu"))
    for row in range(length):
        for column in range(length):
            assert bool(over_clean[0, 0, row, column]) == (column // 4 <= row // 4)
    for row in range(tail):
        at = length - tail + row
        for column in range(length + tail):
            noisy = column >= length
            key = column - tail if noisy else column  # a noisy column's position: length - tail + (column - length)
            expected = key // 4 == at // 4 if noisy else key // 4 < at // 4
            assert bool(over_both[0, 0, row, column]) == expected, (row, column)


# ---- the network ------------------------------------------------------------------------------------------


def test_block_causal_training_sees_what_inference_sees(
    network: Network, sheets: batches.Sheets, tokenizer: Tokenizer
) -> None:
    """Noisy blocks in one pass = each noisy block over the cached clean blocks before it."""
    batch = sheets.in_blocks(sheets.step(1, 0, 2), BLOCK)
    ids, start = batch.ids[:1], batch.prompt // BLOCK * BLOCK
    mask_id = objective(tokenizer).mask_id
    hidden = masking.by_block(batch.answers[:1], BLOCK, torch.Generator().manual_seed(1))
    noisy = ids.masked_fill(hidden, mask_id)
    with torch.no_grad():
        trained = network.logits(network.denoise(ids, noisy[:, start:], BLOCK))
        sampler = Sampler(network, mask_id, (), BLOCK)
        past: list[KeyValue] | None = None
        for at in range(0, ids.shape[1], BLOCK):
            if at >= start:
                states, _ = network(noisy[:, at : at + BLOCK], at, None, past)
                found = network.logits(states)
                torch.testing.assert_close(found, trained[:, at - start : at - start + BLOCK], atol=1e-4, rtol=1e-4)
            past = sampler._extend(ids[:, at : at + BLOCK], past)


def test_a_short_canvas_is_the_same_alone_and_beside_a_longer_one(network: Network, sheets: batches.Sheets) -> None:
    samples = sorted(sheets.step(1, 0, 8), key=lambda one: len(one.prompt) + len(one.answer))
    both = sheets.on_canvas([samples[0], samples[-1]], Random(0))
    length = int(both.lengths[0])
    assert length < both.ids.shape[1]
    seen = torch.arange(both.ids.shape[1]) < both.lengths.unsqueeze(1)
    with torch.no_grad():
        beside, _ = network(both.ids, 0, seen[:, None, None])
        alone, _ = network(both.ids[:1, :length])
    torch.testing.assert_close(beside[:1, :length], alone, atol=1e-5, rtol=1e-4)


def test_padding_counts_for_a_part_only(network: Network, sheets: batches.Sheets, tokenizer: Tokenizer) -> None:
    """The loss is the weighted mean of the cross entropies, computed one by one."""
    plan = replace(objective(tokenizer), leftward=0.0)
    batch = sheets.on_canvas(sheets.step(1, 0, 2), Random(0))
    scored = loss.full(network, batch, plan, torch.Generator().manual_seed(2))
    drawn = masking.uniform(batch.answers, torch.Generator().manual_seed(2))
    total = weight = 0.0
    for hidden in (drawn, batch.answers & ~drawn):
        for row in range(len(batch.ids)):
            length = int(batch.lengths[row])
            with torch.no_grad():
                states, _ = network(batch.ids[row : row + 1, :length].masked_fill(hidden[row, :length], plan.mask_id))
                laws = network.logits(states[0]).double().log_softmax(-1)
            for place in hidden[row].nonzero().flatten().tolist():
                label = int(batch.ids[row, place])
                share = plan.padding if label == plan.end_id else 1.0
                total, weight = total - share * float(laws[place, label]), weight + share
    assert float(scored.loss.detach()) == pytest.approx(total / weight, rel=1e-5)
    assert scored.count == int(((batch.ids != plan.end_id) & batch.answers).sum())


def test_what_is_behind_the_open_block_has_its_weight(
    network: Network, sheets: batches.Sheets, tokenizer: Tokenizer
) -> None:
    batch = sheets.on_canvas(sheets.step(1, 0, 3), Random(0))
    found = {}
    for behind in (0.0, 0.5, 1.0):
        plan = replace(objective(tokenizer), leftward=1.0, behind=behind, padding=1.0)
        found[behind] = loss.full(network, batch, plan, torch.Generator().manual_seed(4)).loss.detach()
    hidden, told = loss.canvas_masks(batch, plan, torch.Generator().manual_seed(4))
    open_, later = int((hidden & ~told).sum()), int(told.sum())
    total = found[1.0] * (open_ + later)  # = open_ * its mean + later * its mean
    of_later = (total - found[0.0] * open_) / later
    expected = (found[0.0] * open_ + 0.5 * of_later * later) / (open_ + 0.5 * later)
    torch.testing.assert_close(found[0.5], expected)
    assert abs(found[0.0] - found[1.0]) > 1e-4


# ---- runs and checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [True, False])
def test_a_killed_run_goes_on_to_the_same_weights(
    sheets: batches.Sheets, tokenizer: Tokenizer, tmp_path: Path, muon: bool
) -> None:
    plan = Schedule("both", 5, sequences=2, warmup=2, decay=0.5, evaluate_every=4, save_every=3, muon=muon)

    def trainer(folder: str) -> Trainer:
        torch.manual_seed(1)
        return Trainer(Network(SHAPE), sheets, objective(tokenizer), plan, tmp_path / folder, tests=4)

    def killed(step: int, _: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    whole = trainer("whole")
    whole.run(lambda *_: None, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        trainer("killed").run(killed, lambda _: None)
    resumed = trainer("killed")
    assert resumed.step == 3
    resumed.run(lambda *_: None, lambda _: None)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert [point.held_out for point in resumed.points] == [point.held_out for point in whole.points]
    assert [point.tokens for point in resumed.points] == [point.tokens for point in whole.points]
    with pytest.raises(ConfigError, match="another schedule"):
        Trainer(Network(SHAPE), sheets, objective(tokenizer), replace(plan, lr=1.0), tmp_path / "killed")


def test_a_plateau_may_become_longer(sheets: batches.Sheets, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Without a decay nothing depends on how many steps are planned."""
    short = Schedule("block_causal", 1, sequences=1)
    for plan in (short, replace(short, steps=2)):
        trainer = Trainer(Network(SHAPE), sheets, objective(tokenizer), plan, tmp_path, tests=1)
        trainer.run(lambda *_: None, lambda _: None)
    assert trainer.step == 2 and [point.step for point in trainer.points] == [1, 2]
    with pytest.raises(ConfigError, match="another schedule"):
        Trainer(Network(SHAPE), sheets, objective(tokenizer), replace(short, decay=0.5), tmp_path)


def test_the_rate_rises_stays_and_falls() -> None:
    plan = Schedule("full", 100, lr=1.0, warmup=10, decay=0.5)
    assert [plan.rate(step) for step in (0, 9, 30, 50, 75, 99)] == [0.1, 1.0, 1.0, 1.0, 0.5, 0.02]
    assert Schedule("full", 100, lr=1.0, warmup=0).rate(99) == 1.0


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_a_saved_folder_is_a_llama_to_transformers(
    network: Network, tokenizer: Tokenizer, tmp_path: Path, attention: str
) -> None:
    """Tensors and keys are Llama's: under a mask of our own, transformers' network gives the same logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint.save(tmp_path, network, tokenizer, attention, BLOCK, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("a2d-llama", ["A2DLlamaLMHeadModel"])
    assert (config["diffusion_attention"], config["block_size"], config["mask_token_id"]) == (attention, BLOCK, 3)
    config.pop("architectures")
    translated = LlamaConfig(**{**config, "model_type": "llama", "attn_implementation": "eager"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, config=translated).float().eval()
    ids = torch.randint(4, SHAPE.vocab, (2, 3 * BLOCK))
    seen = torch.ones(24, 24, dtype=torch.bool)
    seen = seen if attention == "full" else block_masks(24, 8, BLOCK, ids.device)[0][0, 0]
    with torch.no_grad():
        bias = torch.zeros(1, 1, 24, 24).masked_fill(~seen, float("-inf"))
        expected = theirs(ids, attention_mask=bias.expand(2, -1, -1, -1)).logits
        ours = network.logits(network(ids, 0, seen[None, None])[0])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    again, _ = checkpoint.load(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_folder_of_another_kind_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of train-diffusion"):
        checkpoint.load(tmp_path)


class Oracle(Network):
    """Says the answer's tokens, the k-th of a block with a confidence that falls with k."""

    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        super().__init__(replace(SHAPE, hidden=SHAPE.vocab, heads=1, head_dim=4, inner=4, layers=1))
        self.told = prompt + answer
        self.embed_tokens.weight.data = torch.eye(SHAPE.vocab)

    def forward(
        self, ids: torch.Tensor, start: int = 0, mask: torch.Tensor | None = None, past: list[KeyValue] | None = None
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        states = torch.zeros(1, ids.shape[1], SHAPE.vocab)
        for row in range(ids.shape[1]):
            at = start + row
            states[0, row, self.told[at] if at < len(self.told) else 0] = 12.0 - (at % 4)
        empty = torch.zeros(1, 1, ids.shape[1], 4)
        return states, [(empty, empty)]


@pytest.mark.parametrize("attention", ["full", "block_causal"])
@pytest.mark.parametrize("threshold", [0.9, 1.1])
def test_the_sampler_says_what_the_network_is_sure_of(attention: str, threshold: float) -> None:
    prompt, answer = list(range(10, 21)), [*range(30, 50), 2]
    sampler = Sampler(Oracle(prompt, answer), 3, (0, 2), BLOCK, 64, threshold)
    ids, forwards = sampler(attention, prompt)
    assert ids == answer
    passes = 3 if attention == "full" else 3 + 1 + 2  # three blocks; the prompt's, and two of the answer are closed
    assert forwards == passes if threshold < 1 else forwards > len(answer)


def test_the_command_trains_branches_and_writes_a_card(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vocabulary", "300", "--layers", "1", "--hidden", "32", "--inner", "32", "--heads", "1"]
    quick = ["--sequences", "2", "--steps", "2", "--trials", "1"]
    first = ["--attention", "block_causal", "--block-size", "8", "--trials", "0"]
    assert main([str(tmp_path / "warm"), *first, *sizes, *quick]) == 0
    start = ["--start-from", str(tmp_path / "warm")]
    assert main([str(tmp_path / "branch"), "--attention", "full", *start, *quick, "--decay", "1"]) == 0
    record = json.loads((tmp_path / "branch" / "training.json").read_text())
    assert [run["options"]["attention"] for run in record["runs"]] == ["block_causal", "full"]
    assert [trial["threshold"] for trial in record["trials"]] == [0.9, 1.1]
    text = (tmp_path / "branch" / "README.md").read_text()
    assert str(tmp_path) not in text and "--start-from warm" in text
    assert {file.name for file in (tmp_path / "branch").iterdir()} >= {"curves.png", "tokenizer.json", "config.json"}
    assert report.cases(3) == report.cases(3)
    capfd.readouterr()
