"""From prompts to a checkpoint that can be served, with tiny models; and what lies between."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch

from engine.config import DraftConfig
from engine.errors import ConfigError
from engine.llm import LLM
from engine.types import SamplingParams, SpeculationParams
from tests.tiny import save_tiny
from training import train_draft
from training.data import shards
from training.data.generate import Plan, generate
from training.data.prompts import TEMPLATES, Prompt, collect, whole_items
from training.data.states import TargetStates


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("target"))


# ---- prompts ----------------------------------------------------------------------------------------------


def test_prompts_of_all_kinds_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    entries: list[object] = [
        {"prompt": "one"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "no"}]},
        {"turns": ["three", "no"]},
        {"messages": [{"role": "system", "content": "no"}]},
        {"other": "no"},
    ]
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    chats = tmp_path / "chats.json"
    whole = json.dumps([{"conversations": [{"from": "human", "value": "four"}, {"from": "gpt", "value": "no"}]}] * 2)
    chats.write_text(whole[:-1] + ', {"conversations": [{"from": "hum')  # cut off, as the published one is
    found = {prompt.text for prompt in collect([str(lines), str(chats)], 100, [], seed=0)}
    assert found == {"one", "two", "three", "four"}


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_cut_off_array_gives_its_whole_items(tmp_path: Path, block: int) -> None:
    file = tmp_path / "items.json"
    file.write_bytes('[{"a": "ü"}, {"b": [1, 2]},\n {"c": "cut'.encode())
    with file.open("rb") as opened:
        assert list(whole_items(opened, block)) == [{"a": "ü"}, {"b": [1, 2]}]


def test_evaluation_prompts_are_kept_out(tmp_path: Path) -> None:
    question = "A farmer has twelve cows and buys five more. How many cows are there now?"
    data, evaluation = tmp_path / "data.jsonl", tmp_path / "evaluation.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": text}) for text in (f"Please answer: {question}", "Hello")))
    evaluation.write_text(json.dumps({"prompt": question}))
    assert [prompt.text for prompt in collect([str(data)], 9, [evaluation], seed=0)] == ["Hello"]
    assert len(collect([str(data)], 9, [], seed=0)) == 2


def test_templates_are_functions_of_the_seed_and_rarely_repeat() -> None:
    for name, make in TEMPLATES.items():
        texts = [make(random) for random in [Random(5)] for _ in range(400)]
        assert texts == [make(random) for random in [Random(5)] for _ in range(400)]
        assert len(set(texts)) > 300, name
        assert not any("{" in text and "}" in text and "{n}" in text for text in texts)


def test_unknown_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file, and no templates of that name"):
        collect(["poetry"], 5, [], seed=0)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{no json")
    with pytest.raises(ConfigError, match="no JSON"):
        collect([str(broken)], 5, [], seed=0)


# ---- answers ----------------------------------------------------------------------------------------------

PROMPTS = [Prompt(f"prompt number {number} " + "x" * (number % 4), "test") for number in range(13)]
PLAN = Plan(taps=(0, 2, 3), max_tokens=12, max_prompt=64, concurrency=4, shard_tokens=120, threads=1, memory="16MiB")


def test_the_engine_keeps_the_states_of_every_position(target: Path, tmp_path: Path) -> None:
    """Batched, with shared prefixes: they are those of a plain pass over prompt and answer."""
    counts: list[int] = []
    generate(str(target), PROMPTS, tmp_path, PLAN, counts.append)
    assert sum(counts) == len(PROMPTS)
    assert len(shards.paths(tmp_path)) > 1
    plain = TargetStates(target, PLAN.taps, torch.device("cpu"))
    for path in shards.paths(tmp_path):
        assert shards.taps_of(path) == PLAN.taps
        shard = shards.read(path)
        for start, end, prompt in zip(shard.starts, shard.starts[1:], shard.prompt_lens, strict=False):
            tokens = shard.tokens[start:end].long()
            assert 1 <= len(tokens) - prompt <= PLAN.max_tokens
            expected = plain(tokens)[:-1]
            assert (shard.states[start : end - 1].float() - expected.float()).abs().max() < 0.02
            assert not shard.states[end - 1].any()  # the last token was never computed


def test_answers_that_are_there_are_not_made_again(target: Path, tmp_path: Path) -> None:
    generate(str(target), PROMPTS, tmp_path / "whole", PLAN, lambda _: None)
    generate(str(target), PROMPTS, tmp_path / "parts", PLAN, lambda _: None)
    lost = shards.paths(tmp_path / "parts")[0]
    names = shards.names_of(lost)
    lost.rename(tmp_path / "parts" / "lost.part")  # as if the run had been killed before it was written
    counts: list[int] = []
    generate(str(target), PROMPTS, tmp_path / "parts", PLAN, counts.append)
    assert counts[0] == len(PROMPTS) - len(names), "the others were found"
    assert sum(counts) == len(PROMPTS)

    def answers(folder: Path) -> dict[str, list[int]]:
        found = {}
        for path in shards.paths(folder):
            shard, bounds = shards.read(path), shards.read(path).starts.tolist()
            for name, start, end in zip(shards.names_of(path), bounds, bounds[1:], strict=False):
                found[name] = shard.tokens[start:end].tolist()
        return found

    assert answers(tmp_path / "parts") == answers(tmp_path / "whole")


# ---- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", ["cached", "fly"])
def test_the_command_makes_a_draft_that_can_be_served(
    target: Path, tmp_path: Path, states: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt.text}) for prompt in PROMPTS))
    output = tmp_path / "draft"
    arguments = [
        *(str(output), "--model", str(target), "--prompts", str(prompts), "--states", states, "--threads", "1"),
        *("--num-prompts", "13", "--max-tokens", "16", "--steps", "6", "--evaluate-every", "3", "--sequences", "3"),
        *("--anchors", "5", "--block-size", "5", "--taps", "0,2", "--draft-vocab", "64", "--device", "cpu"),
    ]
    assert train_draft.main(arguments) == 0
    assert "slipstream serve" in capsys.readouterr().err
    assert {"config.json", "model.safetensors", "README.md", "curves.png", "training.json"} <= {
        path.name for path in output.iterdir()
    }
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    with LLM(
        str(target),
        pipeline="speculative",
        quant="none",
        memory="16MiB",
        threads=1,
        draft={"drafter": "dflash", "path": str(output)},
    ) as llm:
        report = llm.generate(
            "hello", SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True), SpeculationParams(report=True)
        )[0].speculation
        assert report is not None
        assert report.rounds > 0
        assert llm.info.max_draft == 4


def test_wrong_options_are_named(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--taps 1;2"):
        train_draft.main([str(tmp_path), "--model", str(target), "--taps", "1;2"])
    with pytest.raises(ConfigError, match="holds no answers"):
        train_draft.main([str(tmp_path), "--model", str(target), "--skip-generation", "--device", "cpu"])


def test_draft_config_takes_the_paths_of_checkpoints() -> None:
    assert DraftConfig("dflash", path="somewhere").path == "somewhere"
