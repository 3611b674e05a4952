"""`slipstream train-diffusion OUTPUT`: trains a small masked-diffusion language model on the task `worksheet`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from training.diffusion import batches, checkpoint, report, vocabulary
from training.diffusion.loss import Objective
from training.diffusion.network import Network, Shape
from training.diffusion.trainer import ATTENTION, Point, Schedule, Trainer
from training.options import positive, say


def main(arguments: Sequence[str]) -> int:
    """Train, write a checkpoint that the engine serves, and its card."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    output = Path(asked.output)
    network, tokenizer, before = _start(asked)
    mask_id, end_id = (vocabulary.token(tokenizer, text) for text in (vocabulary.MASK, vocabulary.END))
    objective = Objective(mask_id, end_id, asked.block_size, asked.padding, behind=asked.behind)
    sheets = batches.Sheets(tokenizer)
    trainer = Trainer(network, sheets, objective, _schedule(asked), output / "training")
    _train(trainer)
    attention = "full" if asked.attention == "both" else asked.attention
    checkpoint.save(output, network, tokenizer, attention, asked.block_size)
    trials = []
    if asked.trials:
        served, _ = checkpoint.load(output)  # as rounded to 16 bits
        cases = report.cases(asked.trials)
        trials = [report.attempt(served, sheets, objective, attention, at, cases) for at in (0.9, 1.1)]
    runs = [*before, report.Run(_told(asked), trainer.points)]
    report.write(output, attention, network, objective, runs, trials)
    say(f"{output}: held-out {trainer.points[-1].held_out}; try: slipstream serve {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slipstream train-diffusion", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("output", metavar="OUTPUT", help="folder of the checkpoint; OUTPUT/training keeps the state of a killed run")
    add("--attention", choices=ATTENTION, default="full", help="both: steps of either kind in turn, for a shared start")
    add("--start-from", metavar="DIR", default="", help="a checkpoint of this command: its weights and its tokenizer")
    add("--steps", type=positive, default=4000, help="training steps")
    add("--sequences", type=positive, default=8, help="sheets of a step")
    add("--block-size", type=positive, default=32, help="tokens of a block")
    add("--lr", type=float, default=3e-3, help="learning rate of the plateau")
    add("--warmup", type=int, default=50, help="steps of the rise to it")
    add("--decay", type=float, default=0.0, help="share of the steps, at the end, over which it falls to 0")
    add("--padding", type=float, default=0.1, help="weight of <|endoftext|> behind answers")
    add("--behind", type=float, default=1.0, help="full: weight of what is hidden behind the block that is open")
    add("--adamw", action="store_true", help="AdamW for the layers' matrices, too, in place of Muon")
    add("--vocabulary", type=positive, default=512, help="ids of the tokenizer, 260 at least; without --start-from")
    add("--layers", type=positive, default=5, help="without --start-from")
    add("--hidden", type=positive, default=160, help="without --start-from")
    add("--inner", type=positive, default=448, help="without --start-from")
    add("--heads", type=positive, default=5, help="heads of 32; without --start-from")
    add("--evaluate-every", type=positive, default=250, help="steps")
    add("--save-every", type=positive, default=100, help="steps")
    add("--trials", type=int, default=100, help="held-out sheets that are decoded at the end; 0: none")
    add("--threads", type=positive, default=1, help="CPU threads")
    add("--float32", action="store_true", help="matrix products in float32, not in bfloat16")
    add("--seed", type=int, default=1, help="of the weights and the data")
    return parser


def _start(asked: argparse.Namespace) -> tuple[Network, Tokenizer, list[report.Run]]:
    """Network and tokenizer, new or taken over, and the runs behind them."""
    if asked.start_from:
        folder = Path(asked.start_from)
        network, tokenizer = checkpoint.load(folder)
        return network, tokenizer, report.read_runs(folder)
    tokenizer = vocabulary.train(batches.corpus(asked.seed, 4000), asked.vocabulary)
    torch.manual_seed(asked.seed)
    size = tokenizer.get_vocab_size()
    shape = Shape(size, asked.hidden, asked.inner, asked.layers, asked.heads)
    return Network(shape), tokenizer, []


def _told(asked: argparse.Namespace) -> dict[str, object]:
    """The options with folders by their names alone, and the command that says them again."""
    plain = vars(_parser().parse_args(["OUTPUT"]))
    options = {**vars(asked), "output": Path(asked.output).name, "start_from": Path(asked.start_from).name}
    words = ["slipstream train-diffusion", str(options["output"])]
    for name, value in options.items():
        if name != "output" and value != plain[name]:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return {**options, "command": " ".join(words)}


def _schedule(asked: argparse.Namespace) -> Schedule:
    return Schedule(
        attention=asked.attention,
        steps=asked.steps,
        sequences=asked.sequences,
        lr=asked.lr,
        warmup=asked.warmup,
        decay=asked.decay,
        evaluate_every=asked.evaluate_every,
        save_every=asked.save_every,
        seed=asked.seed,
        muon=not asked.adamw,
        bfloat16=not asked.float32,
    )


def _train(trainer: Trainer) -> None:
    steps = trainer.schedule.steps
    with tqdm(total=steps, initial=trainer.step, unit=" steps", desc="training", mininterval=10) as bar:

        def on_step(_: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        def on_point(point: Point) -> None:
            held = "; ".join(
                f"{name} {entropy:.3f} nats, {right:.3f} right" for name, (entropy, right) in point.held_out.items()
            )
            bar.write(f"step {point.step}, {point.seconds:.0f} s: loss {point.loss:.3f}, held-out {held}")

        trainer.run(on_step, on_point)
