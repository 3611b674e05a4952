"""EAGLE-3 drafts: those of a plain loop, whatever happened around the request; and greedy answers they don't change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from engine.config import DraftConfig
from engine.protocols import Dense, DraftAsk, Drafter, DraftProposal
from engine.runtime.batch import AttentionMode, SeqInput, TreeRows
from engine.runtime.linear import NativeLinear
from engine.runtime.worker import LocalWorker
from engine.types import Request, SpeculationParams
from tests.contract.ladder import Ladder, assert_same, load_worker, request
from tests.eagle3 import PlainDraft, Variant, save_draft
from tests.tiny import save_tiny, tiny_config, tiny_model

OFF = SpeculationParams(enabled=False)
VARIANTS = {
    "plain": Variant(),
    "whole vocabulary, the target's head": Variant(draft_vocab=None),
    "speculators' norms": Variant(norm_before_residual=True, norm_before_fc=True, norm_output=True),
    "everything": Variant(fc_norm=True, norm_output=True, own_embedding=True, bias=True, window=7, layer_ids=(3, 1)),
}


@dataclass
class Listener:
    """Passes everything on, and remembers which draft was made after which tokens."""

    drafter: Drafter
    tokens: dict[str, list[int]] = field(default_factory=dict)
    heard: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def most(self) -> int:
        return self.drafter.most

    @property
    def scores(self) -> bool:
        return self.drafter.scores

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] = list(tokens)
        self.drafter.admit(request_id, tokens)

    def drop(self, request_id: str) -> None:
        self.drafter.drop(request_id)

    def commit(self, request_id: str, tokens: Sequence[int]) -> None:
        self.tokens[request_id] += tokens
        self.drafter.commit(request_id, tokens)

    def propose(self, asks: Sequence[DraftAsk], sampler: object = None, width: int = 0) -> DraftProposal:
        """Hears longer drafts than are asked for: a random draft is seldom right, so the scheduler asks for little."""
        longer = [replace(ask, limit=min(4, 16 * len(ask.block_ids) - ask.position)) for ask in asks]
        for asked in (longer, asks):
            proposal = self.drafter.propose(asked, None, width)
            for ask, row, length in zip(asked, proposal.tokens.tolist(), proposal.lengths, strict=True):
                self.hear(ask, row, length)
        return proposal

    def hear(self, ask: DraftAsk, row: list[int], length: int) -> None:
        context = tuple(self.tokens[ask.request_id])
        assert ask.position == len(context) - 1
        able = ask.fed == 1 and ask.position > 0
        assert length == (ask.limit if able else 0) and all(token == -1 for token in row[length:])
        if length:
            known = self.heard.setdefault(context, row[:length])
            shorter = min(len(known), length)
            assert known[:shorter] == row[:shorter], "two drafts after the same tokens"
            self.heard[context] = max(known, row[:length], key=len)


def serve(
    folder: Path, draft: Path | None, quant: str = "none", attention: str = "auto"
) -> tuple[LocalWorker, Listener | None]:
    """A worker, and an ear at its drafter."""
    config = None if draft is None else DraftConfig("eagle3", str(draft), 4)
    worker = load_worker(folder, memory="8MiB", threads=1, draft=config, quant=quant, attention=attention)
    if draft is None:
        return worker, None
    listener = Listener(worker._pipeline._drafter)  # type: ignore[attr-defined]
    worker._pipeline._drafter = listener  # type: ignore[attr-defined]
    return worker, listener


def check(listener: Listener, plain: PlainDraft, least: int) -> None:
    """Every draft that was heard is the one that a cold, lonely, plain loop makes."""
    assert sum(map(len, listener.heard.values())) >= least
    for context, drafted in sorted(listener.heard.items(), key=lambda item: -len(item[0])):
        expected, gap = plain.draft(context, len(drafted))
        assert drafted == expected or gap < 1e-5, f"after {len(context)} tokens"
    listener.heard.clear()


def prompts() -> list[list[int]]:
    rng = random.Random(4)
    shared = [rng.randrange(256) for _ in range(33)]
    return [[rng.randrange(256) for _ in range(n)] for n in (1, 2, 15, 16, 17, 40)] + [shared, shared[:20] + [3] * 9]


def greedy(max_tokens: int = 7, speculation: SpeculationParams | None = None) -> list[Request]:
    return [
        request(f"r{i}", prompt, max_tokens, temperature=0.0, logprobs=2, speculation=speculation)
        for i, prompt in enumerate(prompts())
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_drafts_are_those_of_a_plain_loop(family: str, variant: Variant, tmp_path: Path) -> None:
    """Batched, in both layouts, with answers as without drafts."""
    folder = save_tiny(family, tmp_path / "target")
    expected = Ladder(serve(folder, None)[0]).run(greedy())
    plain = PlainDraft(tiny_model(family), variant)
    heard = []
    for layout in ("original", "speculators"):
        worker, listener = serve(folder, save_draft(tmp_path / layout, tiny_config(family), variant, layout))
        assert listener is not None
        assert assert_same(expected, Ladder(worker).run(greedy())) == 0
        heard.append(dict(listener.heard))
        check(listener, plain, 100)
    assert heard[0] == heard[1]


@pytest.fixture(scope="module", params=["paged_cpu", "sdpa"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LocalWorker, Listener, PlainDraft]:
    folder = tmp_path_factory.mktemp("eagle3")
    draft = save_draft(folder / "draft", tiny_config("llama"))
    worker, listener = serve(save_tiny("llama", folder / "target"), draft, attention=request.param)
    assert listener is not None
    return worker, listener, PlainDraft(tiny_model("llama"), Variant())


RUNGS: dict[str, dict[str, int]] = {
    "chunked": {"chunk": 7},
    "preempted": {"num_blocks": 6},
    "preempted, lag 1, chunked": {"num_blocks": 6, "lag": 1, "chunk": 16},
    "one at a time": {"seqs": 1},
}


@pytest.mark.parametrize("rung", RUNGS)
def test_drafts_do_not_depend_on_the_surroundings(served: tuple[LocalWorker, Listener, PlainDraft], rung: str) -> None:
    worker, listener, plain = served
    ladder = Ladder(worker, **RUNGS[rung])  # type: ignore[arg-type]
    ladder.run(greedy(24 if "preempted" in rung else 8))
    assert ("preempted" in rung) == (ladder.stats.preemptions > 0), ladder.stats.preemptions
    check(listener, plain, 100)


def test_what_a_request_without_drafts_left_is_whole(served: tuple[LocalWorker, Listener, PlainDraft]) -> None:
    """Its blocks are found again, and the first draft after them needs the last feature that it wrote."""
    worker, listener, plain = served
    ladder = Ladder(worker)
    first = ladder.run(greedy(20, OFF))
    assert not listener.heard
    longer = [replace(one, prompt_ids=(*one.prompt_ids, *first[one.id].tokens), speculation=SpeculationParams())
              for one in greedy(8)]  # fmt: skip
    again = ladder.run([replace(one, id=f"{one.id}+") for one in longer])
    assert sum(outcome.cached_tokens for outcome in again.values()) >= 8 * 16
    edges = [one for one in longer if len(one.prompt_ids) % 16 == 1]
    assert edges, "no prompt is a token longer than its blocks: none is drafted for in its first step"
    for one in edges:
        assert tuple(one.prompt_ids) in listener.heard
    check(listener, plain, 100)


def test_numbers_beside_the_tokens(served: tuple[LocalWorker, Listener, PlainDraft]) -> None:
    """Margins, probabilities, options and hidden states belong to the tokens; chains end at their limits."""
    worker, listener, plain = served
    drafter, runner = listener.drafter, worker._pipeline._runner  # type: ignore[attr-defined]
    texts = {"b": prompts()[3], "a": prompts()[5]}
    tables = {"b": (4, 2), "a": (1, 7, 5)}
    runner.forward([SeqInput(text[:-1], 0, tables[name], len(text) - 1) for name, text in texts.items()], [0])
    for name, text in texts.items():
        drafter.admit(name, text)
    asks = [
        DraftAsk("b", 2, 15, 1, tables["b"], temperature=1.0),
        DraftAsk("b", 4, 15, 2, tables["b"]),
        DraftAsk("a", 3, 39, 1, tables["a"], temperature=0.5),
        DraftAsk("a", 0, 39, 1, tables["a"]),
    ]
    proposal = drafter.propose(asks, None, 100)  # as many options as the draft's vocabulary has tokens
    assert proposal.lengths == (2, 0, 3, 0) and proposal.tokens.shape == (4, 3)
    assert proposal.margins is not None and proposal.options is not None and proposal.hidden is not None
    for row, prompt in ((0, texts["b"]), (2, texts["a"])):
        length = proposal.lengths[row]
        assert proposal.tokens[row].tolist() == plain.draft(prompt, length)[0] + [-1] * (3 - length)
        assert proposal.options.tokens[row, :length, 0].tolist() == proposal.tokens[row, :length].tolist()
        best = proposal.options.log_probs[row, :length]
        assert (best[:, :-1] >= best[:, 1:]).all()
        assert torch.allclose(best[:, 0] - best[:, 1], proposal.margins[row, :length], atol=1e-5)
        own = (best / asks[row].temperature).softmax(-1)[:, 0]
        assert torch.allclose(own, proposal.marginal.probs[row, :length])  # type: ignore[union-attr]
        assert proposal.hidden[row, :length].abs().sum(-1).gt(0).all()
    assert (proposal.margins[[1, 3]] == float("-inf")).all()
    sampler = LastToken()
    drawn = drafter.propose(asks, sampler)
    assert sampler.rows == [(2, 0), (0, 0), (2, 1), (0, 1), (2, 2)]  # the longest chain first, and the asks' own places
    assert isinstance(drawn.law, Dense) and drawn.law.probs.shape == (2, 3, 259) and drawn.law.rows == (2, 0)
    assert drawn.law.probs[:, :, 258].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert drawn.tokens.tolist() == [[258, 258, -1], [-1] * 3, [258] * 3, [-1] * 3]
    mixed = drafter.propose([replace(ask, temperature=0.0) for ask in asks], LastToken((0,)))
    assert isinstance(mixed.law, Dense) and mixed.law.probs.shape == (1, 2, 259) and mixed.law.rows == (0,)
    assert mixed.tokens.tolist() == [[258, 258, -1], [-1] * 3, proposal.tokens[2].tolist(), [-1] * 3]
    assert mixed.marginal is None
    for name in texts:
        drafter.drop(name)


class LastToken:
    """A sampler that draws the vocabulary's last token, for some of the asks."""

    def __init__(self, wanted: Sequence[int] = range(4)) -> None:
        self.rows: list[tuple[int, int]] = []
        self._wanted = wanted

    def draws(self, ask: int) -> bool:
        return ask in self._wanted

    def draw(
        self, logits: torch.Tensor, asks: Sequence[int], steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows += zip(asks, steps, strict=True)
        assert logits.shape == (len(asks), 259) and logits.dtype is torch.float32
        assert logits.isfinite().sum(1).eq(100).all()  # what the draft's vocabulary lacks can't be drawn
        tokens = torch.full((len(asks),), 258)
        return tokens, torch.nn.functional.one_hot(tokens, 259).float()


def test_trees_are_followed_along_their_branches(served: tuple[LocalWorker, Listener, PlainDraft]) -> None:
    """Each node's entry belongs to its parent, also after the accepted path has been moved together."""
    worker, listener, plain = served
    drafter, runner = listener.drafter, worker._pipeline._runner  # type: ignore[attr-defined]
    text, other = prompts()[5][:19], prompts()[4]
    nodes = [20, 21, 22, 23, 24, 25]
    parents = [-1, -1, 0, 1, 3, 2]
    masks, depths = [1], [0]  # the anchor is the root
    for node, parent in enumerate(parents):
        masks.append(masks[parent + 1] | 1 << node + 1)
        depths.append(depths[parent + 1] + 1)
    tree = TreeRows(18, [18 + depth for depth in depths], masks)
    table, others = (6, 3), (8, 9)
    runner.forward([SeqInput(text[:-1], 0, table, 18)], [0])
    fed = SeqInput([text[-1], *nodes], 18, table, 25, tree)
    runner.forward([SeqInput(other[:-1], 0, others, 16), fed], [0], AttentionMode.TREE)
    source, target = (
        torch.tensor([table[p // 16] * 16 + p % 16 for p in places]) for places in ((20, 22, 23), (19, 20, 21))
    )
    runner.compact(source, target)  # nodes 1, 3 and 4 stand: places 20, 22 and 23 of the table
    committed = [*text, 21, 23, 24, 99]
    for name, tokens, blocks in (("tree", committed, table), ("other", other, others)):
        drafter.admit(name, tokens)
        proposal = drafter.propose([DraftAsk(name, 4, len(tokens) - 1, 1, blocks)])
        assert proposal.tokens[0].tolist() == plain.draft(tokens, 4)[0]
        drafter.drop(name)


def test_packed_weights_draft_nearly_the_same(tmp_path: Path) -> None:
    folder, draft = save_tiny("llama", tmp_path / "target"), save_draft(tmp_path / "draft", tiny_config("llama"))
    worker, listener = serve(folder, draft, quant="fp16")
    assert listener is not None
    model = listener.drafter._model  # type: ignore[attr-defined]
    packed = [part for part in model.network.modules() if isinstance(part, NativeLinear)]
    assert len(packed) == 7, "fc, query, key and value, output, gate and up, down, head"
    Ladder(worker).run(greedy())
    plain = PlainDraft(tiny_model("llama"), Variant())
    same = [drafted[:1] == plain.draft(context, 1)[0] for context, drafted in listener.heard.items()]
    assert len(same) > 30 and sum(same) > 0.95 * len(same)
