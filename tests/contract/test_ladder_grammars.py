"""The equality ladder, crossed with grammars and drafts: every answer has its form, and drafts change no token."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLParserLimits

from engine.config import DraftConfig
from engine.grammar import Grammar
from engine.protocols import Worker
from engine.registry import DRAFTERS
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import FinishReason, Request, SpeculationParams
from tests.contract import neural, oracle
from tests.contract.ladder import Ladder, Outcome, load_worker, request
from tests.contract.test_ladder import alone
from tests.tiny import EOS, byte_tokenizer, save_tiny, tiny_config

MAX_DRAFT = 6
TOKENIZER = byte_tokenizer()


def at(letter: str) -> int:
    """Its token."""
    return TOKENIZER.encode(letter).ids[0]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "size": {"type": "integer", "minimum": -50, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None, True]}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
LETTERS = r"([a-f]{2,9}|[0-9]{3}(-[0-9]{3}){0,2})[.!]"
NESTED = 'start: item\nitem: "(" (item | /[a-z]/){0,2} ")"'
GRAMMARS = {
    "json": Grammar("json", json.dumps({**SCHEMA, "x-guidance": {"whitespace_pattern": " ?"}})),
    "regex": Grammar("regex", LETTERS),
    "lark": Grammar("lark", NESTED),
    "choice": Grammar("lark", 'start: "red" | "green" | "greenish" | "blue"'),
    "later": Grammar("regex", "[x-z]{1,4}", after=at("q")),
}
# "later" waits for a letter that a request has to be led to.
FREE: dict[str, dict[str, Any]] = {"later": {"logit_bias": ((at("q"), 6.0),)}}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "seeded": {"temperature": 1.2},
    "penalties": {
        **{"temperature": 0.9, "top_p": 0.95, "top_k": 60, "min_p": 0.001},
        **{"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    },
    "bans": {"temperature": 1.0, "min_tokens": 9, "bad_words": ((at("a"),), (at("1"), at("2")), (at("{"),))},
    "stops": {"temperature": 1.0, "stop_token_ids": (at("c"), at("7")), "min_tokens": 4},
}
RUNGS: dict[str, dict[str, Any]] = {
    "batched": {},
    "lag 1, chunked": {"lag": 1, "chunk": 7},
    "preempted": {"num_blocks": 6},
    "three at a time": {"seqs": 3, "prefix_cache": False},
}


ALL = tuple(RUNGS)
# Seeded answers of random weights do not repeat themselves: look-up would have nothing to say there.
CLIMBS = {"greedy": {"": ALL, "ngram": ALL, "oracle": ALL, "dflash": ALL, "tree": ALL}}
SHORT_CLIMB = {"oracle": ALL, "dflash": ("lag 1, chunked",), "tree": ("batched", "preempted")}


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """One checkpoint, served without a drafter, and with drafts of every kind; most of them know the answers."""
    folder, threads = tmp_path_factory.mktemp("grammars"), torch.get_num_threads()
    save_tiny("llama", folder / "target")
    network = neural.save_dflash(tiny_config("llama"), folder / "draft", block_size=MAX_DRAFT)
    drafts = {
        "": None,
        "ngram": DraftConfig("ngram", max_draft=MAX_DRAFT),
        "oracle": DraftConfig("oracle", max_draft=MAX_DRAFT),
        "dflash": DraftConfig("helped-dflash", path=str(network)),
        "tree": DraftConfig("helped-dflash", path=str(network), tree=12),
    }
    with pytest.MonkeyPatch.context() as patch, neural.registered():
        patch.setitem(DRAFTERS, "oracle", "tests.contract.oracle:OracleDrafter")
        made: dict[str, Worker] = {
            name: load_worker(folder / "target", memory="3MiB", threads=1, draft=draft)
            for name, draft in drafts.items()
        }
        yield made | {"ahead": load_worker(folder / "target", memory="3MiB", threads=1, graphs="eager")}
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    oracle.ANSWERS.clear()
    neural.ANSWERS.clear()


def workload(sampling: str, seeds: int = 3) -> list[Request]:
    """Every grammar with a few seeds and prompts, some of which share a beginning."""
    rng = random.Random(2)
    shared = [rng.randrange(256) for _ in range(20)]
    asked = []
    for seed in range(seeds):
        for name, grammar in GRAMMARS.items():
            prompt = shared[: rng.choice((1, 16, 20))] + [rng.randrange(256) for _ in range(rng.choice((1, 9, 15)))]
            options = {**SAMPLING[sampling], **FREE.get(name, {})}
            one = request(f"{name}{seed}", prompt, 56, seed=seed, grammar=grammar, **options)
            asked.append(replace(one, eos_ids=(EOS,)))
    return asked


def learn(outcomes: dict[str, Outcome], requests: Sequence[Request]) -> None:
    for answers in (oracle.ANSWERS, neural.ANSWERS):
        answers.clear()
        answers.update({one.id: [*one.prompt_ids, *outcomes[one.id].tokens] for one in requests})


def check_form(one: Request, outcome: Outcome) -> bool:
    """Has the answer its grammar's form? False where it was cut, by its length or by a stop id."""
    ended = outcome.finish is FinishReason.STOP and outcome.tokens[-1] == EOS
    tokens, name = outcome.tokens[:-1] if ended else outcome.tokens, re.sub(r"\d", "", one.id)
    assert EOS not in tokens, "something stands behind the end"
    if name == "later":
        place = tokens.index(at("q")) if at("q") in tokens else len(tokens)
        tokens = tokens[place + 1 :]
    if not ended:
        return False
    text = TOKENIZER.decode(tokens)
    match name:
        case "json":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "regex":
            assert re.fullmatch(LETTERS, text), text
        case "lark":
            assert text.count("(") == text.count(")") and re.fullmatch(r"\([a-z()]*\)", text), text
        case "choice":
            assert text in ("red", "green", "greenish", "blue"), text
        case "later":
            assert re.fullmatch("[x-z]{1,4}", text), text
    return True


@pytest.mark.parametrize("sampling", SAMPLING)
def test_answers_have_their_form_and_drafts_change_no_token(workers: dict[str, Worker], sampling: str) -> None:
    requests = workload(sampling)
    expected = alone(workers[""], requests)
    formed = sum(check_form(one, expected[one.id]) for one in requests)
    assert formed >= len(requests) * (0.3 if sampling == "stops" else 0.8), f"{formed} of {len(requests)}"
    assert len({tuple(outcome.tokens) for outcome in expected.values()}) > len(requests) / 2, "too uniform to tell"
    learn(expected, requests)
    for drafter, rungs in CLIMBS.get(sampling, SHORT_CLIMB).items():
        drafted = accepted = 0
        for name in rungs:
            ladder = Ladder(workers[drafter], **RUNGS[name])
            got = ladder.run(requests)
            for one in requests:
                have, want = got[one.id], expected[one.id]
                assert (have.tokens, have.finish) == (want.tokens, want.finish), f"{drafter}, {name}: {one.id}"
            assert ("preempted" in name) == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"
            drafted, accepted = drafted + ladder.stats.spec_drafted, accepted + ladder.stats.spec_accepted
        least = {"": 0, "ngram": 1}.get(drafter, 40 * len(rungs))
        assert accepted >= least, f"{drafter}: only {accepted} of {drafted} stood"


def test_the_rules_that_a_grammar_wins_over_hold_where_they_can(workers: dict[str, Worker]) -> None:
    """At least so many tokens, or none of some words: unless nothing that the grammar allows would be left."""

    def answer(pattern: str, **sampling: Any) -> str:
        grammar = Grammar("regex", pattern)
        asked = replace(
            request("x", [5, 6, 7], 40, temperature=1.0, seed=1, grammar=grammar, **sampling), eos_ids=(EOS,)
        )
        expected = Ladder(workers[""]).run([asked])["x"]
        learn({"x": expected}, [asked])
        for drafter in ("oracle", "tree"):
            assert Ladder(workers[drafter]).run([asked])["x"].tokens == expected.tokens
        assert expected.finish is FinishReason.STOP and expected.tokens[-1] == EOS
        return TOKENIZER.decode(expected.tokens[:-1])

    assert len(answer("[a-f]{2,30}", min_tokens=30)) == 30
    assert len(answer("[a-f]{2,9}", min_tokens=30)) == 9  # it is complete
    banned = tuple((at(letter),) for letter in "abcde")
    assert set(answer("[a-f]{20}", bad_words=banned)) == {"f"}
    assert len(answer("[a-e]{20}", bad_words=banned)) == 20
    assert answer("[a-f]{4}|ba", bad_words=((at("b"), at("a")),)) != "ba"
    # A stop id may stand in the grammar's text; it ends nothing before its time.
    assert len(answer("[ab]{12}", stop_token_ids=(at("a"), at("b")), min_tokens=30)) == 12


def test_choices_logprobs_and_prefix_hits(workers: dict[str, Worker]) -> None:
    """The raw model's log-probabilities, whatever the grammar allows; prompts that go on from what was served."""
    for temperature in (1.0, 0.0):
        first = [request("e", range(40), 20, temperature=temperature, grammar=GRAMMARS["json"])]
        prompt = [*range(40), *Ladder(workers[""]).run(first)["e"].tokens][:52]
        asked = []
        for choice in range(3):
            one = request(f"json{choice}", prompt, 56, choice, seed=5, logprobs=3, prompt_logprobs=1)
            params = replace(one.sampling, temperature=temperature, grammar=GRAMMARS["json"])
            asked.append(replace(one, group="x", eos_ids=(EOS,), sampling=params))
        expected = alone(workers[""], asked)
        assert all(check_form(one, expected[one.id]) for one in asked)
        learn(expected, asked)
        for drafter in ("oracle", "dflash", "tree"):
            ladder = Ladder(workers[drafter])
            ladder.run(first)
            got = ladder.run([replace(one, sampling=replace(one.sampling, prompt_logprobs=None)) for one in asked])
            again = ladder.run(asked)
            assert got["json0"].cached_tokens >= 32
            assert ladder.stats.spec_accepted > 20
            for name, want in expected.items():
                assert (got[name].tokens, got[name].finish) == (want.tokens, want.finish)
                assert again[name].tokens == want.tokens
                for a, b in zip(want.logprobs, got[name].logprobs, strict=True):
                    assert (a.token_id, a.rank, len(a.top)) == (b.token_id, b.rank, len(b.top))
                    assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_ends_inside_an_accepted_block_end_it_there(workers: dict[str, Worker], lag: int) -> None:
    """The end at every place that a round may have, the grammar's own and the longest answer's; nothing behind it."""
    asked = []
    for length in range(1, 16):
        one = request(f"e{length}", range(20), 40, seed=length, grammar=Grammar("regex", f"[a-f]{{{length}}}"))
        asked.append(replace(one, eos_ids=(EOS,)))
        asked.append(replace(one, id=f"m{length}", sampling=replace(one.sampling, max_tokens=length)))
    expected = alone(workers[""], asked)
    learn(expected, asked)
    for drafter in ("oracle", "tree"):
        got = Ladder(workers[drafter], lag=lag).run(asked)
        for length in range(1, 16):
            end, cut = got[f"e{length}"], got[f"m{length}"]
            assert (len(end.tokens), end.tokens[-1], end.finish) == (length + 1, EOS, FinishReason.STOP)
            assert (cut.tokens, cut.finish) == (end.tokens[:-1], FinishReason.LENGTH)
            assert end.tokens == expected[f"e{length}"].tokens


def test_plain_requests_beside_them_are_undisturbed(workers: dict[str, Worker]) -> None:
    """And go on as they do without them once these are over, ahead of the host where they may."""
    rng = random.Random(9)
    plain = [
        request(f"p{i}", [rng.randrange(256) for _ in range(12)], 24, temperature=i % 2 * 1.0, seed=i) for i in range(6)
    ]
    off = [replace(one, speculation=SpeculationParams(enabled=False)) for one in workload("seeded", 1)]
    requests = [*plain, *off, *(replace(one, id=f"{one.id}0") for one in workload("seeded", 1))]
    expected = alone(workers[""], requests)
    learn(expected, requests)
    for drafter in ("", "ahead", "oracle", "dflash", "tree"):
        got = Ladder(workers[drafter], chunk=40, lag=int(drafter == "ahead")).run(requests)
        assert {name: one.tokens for name, one in got.items()} == {name: one.tokens for name, one in expected.items()}


def test_a_grammar_that_can_not_be_followed_ends_its_request_alone(
    workers: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody compiled before, and one that meets a bound after some tokens, with drafts and without."""

    def tight() -> LLParserLimits:
        return LLParserLimits(step_max_items=120, verbose_errors=False)

    entangled = Grammar("lark", "start: s\ns: s s | /[ab]/ | /[bc]/  // ambiguous: the parser has more and more to do")
    broken = replace(request("broken", [1, 2], 9, grammar=Grammar("regex", "(")), eos_ids=(EOS,))
    options = {"logit_bias": ((EOS, -100.0),), "seed": 5}
    stuck = replace(request("stuck", [1, 2], 60, grammar=entangled, **options), eos_ids=(EOS,))  # type: ignore[arg-type]
    others = workload("seeded", 1)
    expected = alone(workers[""], others)
    told: dict[str, list[int]] = {}
    for drafter in ("", "oracle", "tree"):
        learn({**expected, "stuck": Outcome(told.get("", []))}, [*others, stuck])
        with monkeypatch.context() as patch:
            patch.setattr("engine.structured.matcher.parser_limits", tight)
            workers[drafter].prepare(stuck)
        core = Ladder(workers[drafter], lag=1).core
        for one in [broken, stuck, *others]:
            core.add(one)
        tokens: dict[str, list[int]] = {one.id: [] for one in [broken, stuck, *others]}
        errors: dict[str, str | None] = {}
        while core.has_work():
            for update in core.step().updates:
                tokens[update.request_id] += update.token_ids
                if update.finish is FinishReason.ERROR:
                    errors[update.request_id] = update.error
        core.settle()
        assert errors.keys() == {"broken", "stuck"}
        assert "unclosed group" in (errors["broken"] or "") and "too complex" in (errors["stuck"] or "")
        assert {name: tokens[name] for name in expected} == {name: one.tokens for name, one in expected.items()}
        told[drafter] = tokens["stuck"]
    assert told[""] == told["oracle"] == told["tree"] and 5 < len(told[""]) < 30


FORCED = Grammar("lark", 'start: "{\\"a long name\\": " /[0-9]/ ", \\"another long name\\": " /[a-f]{1,3}/ "}"')


@pytest.mark.parametrize("drafter", ["ngram", "dflash", "tree"])
def test_what_a_grammar_forces_is_the_draft(workers: dict[str, Worker], drafter: str) -> None:
    """Without any help: all of it stands, and answers take fewer steps. Not for drafts of requests that draw them."""
    asked = [
        replace(request(f"f{i}", range(5 + i), 60, temperature=i % 2 * 1.0, seed=i, grammar=FORCED), eos_ids=(EOS,))
        for i in range(4)
    ]
    plain = Ladder(workers[""])
    expected = plain.run(asked)
    ladder = Ladder(workers[drafter])
    got = ladder.run(asked)
    for name, want in expected.items():
        assert (got[name].tokens, got[name].finish) == (want.tokens, FinishReason.STOP)
    assert ladder.stats.spec_accepted > 0.6 * sum(len(one.tokens) for one in got.values())
    assert ladder.stats.steps < plain.stats.steps / 2.5
    if drafter == "ngram":
        assert ladder.stats.spec_accepted == ladder.stats.spec_drafted


def test_the_demo_model_writes_json_with_drafts_and_without(demo_folder: Path) -> None:
    """fp32, greedy: what the schema forces comes in fewer steps, and nothing else changes."""
    tokenizer = Tokenizer.load(demo_folder)
    schema = {
        "type": "object",
        "properties": {
            "full_name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
            "favourite_colour": {"enum": ["red", "green", "blue"]},
        },
        "required": ["full_name", "age", "favourite_colour"],
        "additionalProperties": False,
    }
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Describe Ann, who is 42, as JSON."}])
    grammar = Grammar("json", json.dumps(schema))
    one = request("r", prompt, 60, temperature=0.0, grammar=grammar)
    one = replace(one, eos_ids=tokenizer.eos_ids)
    worker = load_worker(demo_folder, "none", draft=DraftConfig("ngram", max_draft=8))
    off = replace(one, speculation=SpeculationParams(enabled=False))
    plain, ladder = Ladder(worker), Ladder(worker, lag=1)
    expected, got = plain.run([off])["r"], ladder.run([one])["r"]
    assert got.tokens == expected.tokens and got.finish is FinishReason.STOP
    jsonschema.validate(json.loads(tokenizer.decode(got.tokens)), schema)
    assert ladder.stats.spec_accepted >= 5 and ladder.stats.steps < 0.85 * plain.stats.steps
