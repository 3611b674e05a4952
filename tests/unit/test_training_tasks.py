"""Tasks: what is asked, what an answer is worth, and that training never sees a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from training.tasks.loading import NAMES, load
from training.tasks.rouge import rouge_l, rouge_n
from training.tasks.scoring import KINDS
from training.tasks.task import Item


def score(kind: str, answer: str, reference: str) -> float:
    return KINDS[kind](answer, Item("?", reference))


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "worth"),
    [
        ("3 + 4 = 7. The answer is 7.", "So she has 3+4 = <<3+4=7>>7 left.\n#### 7", 1),
        ("The answer is 1,250 dollars", "#### 1250", 1),
        ("It costs $2.50.", "2.5", 1),
        ("minus: -3", "3", 0),
        ("7 apples, then 8", "7", 0),
        ("none", "7", 0),
        ("", "", 0),
    ],
)
def test_the_last_number_counts(answer: str, reference: str, worth: float) -> None:
    assert score("number", answer, reference) == worth


def test_texts_are_compared_without_case_spaces_and_quotes() -> None:
    assert score("exact", ' "Name: Anna\n Age: 3" ', "name: anna age: 3") == 1
    assert score("exact", "Name: Anna", "Name: Ann") == 0
    assert score("contains", "I say: Yes, sir", "yes, sir") == 1
    assert score("contains", "Yesterday", "yes") == 0, "whole words"


def test_rouge_is_the_f1_of_shared_words() -> None:
    ours, theirs = "the cat sat on the mat", "the cat lay on the mat"
    assert rouge_n(ours, theirs, 1) == pytest.approx(10 / 12)
    assert rouge_n(ours, theirs, 2) == pytest.approx(6 / 10)  # the cat, on the, the mat
    assert rouge_l(ours, theirs) == pytest.approx(10 / 12)
    assert rouge_l("mat the on sat cat the", ours) == pytest.approx(6 / 12), "the order counts"
    assert rouge_n("the the the", "the cat", 1) == pytest.approx(2 / 5), "no word counts more often than it is there"
    assert rouge_n("", ours, 2) == rouge_n(ours, "", 2) == rouge_n("one", "one", 2) == 0
    assert score("rouge2", "A, b! C", "a b c") == score("rougeL", "A, b! C", "a b c") == 1


# ---- tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_built_in_tasks_have_disjoint_splits_and_perfect_references(name: str) -> None:
    task = load(name)
    training, test = task.items("train", 300, seed=3), task.items("test", 80, seed=4)
    assert len({item.prompt for item in training}) == 300 and len({item.prompt for item in test}) == 80
    assert not {item.prompt for item in training} & {item.prompt for item in test}
    assert all(task.score(item.reference, item) == 1 for item in test)
    assert all(task.score("I don't know.", item) == 0 for item in test)
    assert task.items("test", 80, seed=4) == test, "the same for the same seed"
    assert task.items("test", 80, seed=5) != test
    if task.chat:  # asked without examples
        assert not task.stop
        return
    begin = test[0].prompt[: test[0].prompt.rindex("\n\n")]
    assert all(item.prompt.startswith(begin) for item in training), "the examples are the same, for the prefix cache"
    assert task.stop == ("\n\n",)


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_task_file_is_split_by_its_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", *({"question": f"{i} + 1?", "answer": i + 1} for i in range(60)))
    task = load(path, max_tokens=9)
    assert (task.name, task.kind, task.chat, task.max_tokens) == ("sums", "number", True, 9)
    training, test = task.items("train", 1000), task.items("test", 1000, seed=9)
    assert len(training) + len(test) == 60 and test
    assert {item.prompt for item in training}.isdisjoint(item.prompt for item in test)
    assert task.score("it is 5", Item("?", "5")) == 1


def test_lines_with_tests_are_scored_by_running_them(tmp_path: Path) -> None:
    task = load(write(tmp_path / "code.jsonl", {"prompt": "double", "tests": "assert double(1) == 2"}))
    assert task.kind == "code"
    with pytest.raises(ConfigError, match="nothing to be scored with"):
        load(write(tmp_path / "code.jsonl", {"prompt": "double", "tests": "x"}), "rouge2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 must be an object"),
        ({"reference": "1"}, "line 2 has no prompt"),
        ({"prompt": "1"}, "neither a reference nor tests"),
        ({"prompt": ["1"], "reference": "1"}, "prompt must be a text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path / "task.jsonl", {"prompt": "1", "reference": "1"}, line))


def test_what_is_no_task_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task of that name"):
        load("nothing")
    with pytest.raises(ConfigError, match="holds no prompts"):
        load(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match="--score bleu"):
        load("sums", "bleu")
    with pytest.raises(ConfigError, match="no split 'dev'"):
        load("sums").items("dev", 1)
    with pytest.raises(ConfigError, match="belongs to the split 'test'"):
        load(write(tmp_path / "one.jsonl", {"prompt": "a0", "reference": "1"})).items("test", 1)
