"""DualDiffusion as plain loops over a float64 network of the test's own: no engine, no pages, one request at a time.

With the threshold rule. `Plain` is a Llama with two-way attention whose keys and values are kept by position,
so that a pass over some rows sees older ones of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.runtime.rng import Purpose, gumbel

VOCAB, MASK = 48, 47
JUNK = 50.0  # where nothing was written: reading it would show
_WIDTH, _HEADS, _KV_HEADS, _DIM = 32, 4, 2, 8


def tiny_llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Random weights whose confidences spread from nearly 0 to nearly 1."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=_WIDTH,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=_DIM,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.7 if "lm_head" in name else 0.3)
    return model.eval()


class Plain:
    """The same network, written out."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.layers = model.config.num_hidden_layers
        self.calls = 0

    def cache(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [256, kv heads, dim] of each layer, by place."""
        shape = (256, _KV_HEADS, _DIM)
        return [(torch.full(shape, JUNK).double(), torch.full(shape, JUNK).double()) for _ in range(self.layers)]

    def run(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        visible: Tensor,
        kept: list[tuple[Tensor, Tensor]],
        start: int = 0,
    ) -> Tensor:
        """Logits [rows, VOCAB] of rows in places `start` on; row r sees the places k with visible[r, k]."""
        self.calls += 1
        at = self.weights
        states = at["model.embed_tokens.weight"][list(ids)]
        places = slice(start, start + len(ids))
        for layer, (keys, values) in enumerate(kept):
            name = f"model.layers.{layer}."
            inner = _rms(states, at[name + "input_layernorm.weight"])
            query, key, value = (inner @ at[f"{name}self_attn.{part}_proj.weight"].T for part in "qkv")
            keys[places] = _turned(key.view(len(ids), _KV_HEADS, _DIM), positions)
            values[places] = value.view(len(ids), _KV_HEADS, _DIM)
            query = _turned(query.view(len(ids), _HEADS, _DIM), positions)
            seen = visible.shape[1]
            key, value = (part[:seen].repeat_interleave(_HEADS // _KV_HEADS, 1) for part in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", query, key) / _DIM**0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            joined = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
            states = states + joined @ at[name + "self_attn.o_proj.weight"].T
            inner = _rms(states, at[name + "post_attention_layernorm.weight"])
            gate, up = (inner @ at[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            states = states + (torch.nn.functional.silu(gate) * up) @ at[name + "mlp.down_proj.weight"].T
        return _rms(states, at["model.norm.weight"]) @ at["lm_head.weight"].T


def _rms(states: Tensor, weight: Tensor) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _turned(heads: Tensor, positions: Sequence[int]) -> Tensor:
    half = _DIM // 2
    angles = torch.tensor(positions).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@dataclass(frozen=True)
class Setting:
    canvas: int = 12
    block: int = 4
    steps: int = 2  # draft steps between verify steps, at most
    verify: str = "confidence"
    least: float = 0.5  # verify_threshold
    threshold: float = 0.4  # of the rule
    unit: int = 0  # of a block-causal drafter
    sub_block: int = 0  # likewise
    shift: bool = False  # of the served model
    draft_shift: bool = False  # of the drafter
    temperature: float = 0.0
    seed: int = 5


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)  # of the tokens, when they were put in
    forwards: int = 0
    draft_forwards: int = 0
    positions: int = 0  # fed to either
    draft_positions: int = 0
    verifies: int = 0
    remasked: int = 0
    forced: int = 0  # verify steps that would have brought nothing


class Reference:
    """One request. Logits go by the position whose token they predict."""

    def __init__(self, served: Plain, drafter: Plain | None, prompt: Sequence[int], setting: Setting) -> None:
        self.served, self.drafter, self.setting = served, drafter, setting
        self.size, self.end = len(prompt), len(prompt) + setting.canvas
        self.ids = [*prompt, *[MASK] * setting.canvas]
        self.chances = dict.fromkeys(range(self.end), 0.0)
        self.drafted: dict[int, int] = {}  # position -> step
        self.step = 0  # of the block
        self.answer = Answer()
        self.final = 0  # positions whose KV a block-causal drafter need not compute again
        self.kept = (drafter or served).cache()
        self.shifted = setting.shift if drafter is None else setting.draft_shift

    def decode(self) -> Answer:
        setting, start, logits = self.setting, self.size, None
        while start < self.end:
            stop = start + setting.block
            if setting.unit:
                stop = (start // setting.unit + 1) * setting.unit
            logits = self.block(start, min(stop, self.end), logits)
            start = stop
        self.answer.tokens = self.ids[self.size :]
        self.answer.chances = [self.chances[at] for at in range(self.size, self.end)]
        return self.answer

    def block(self, start: int, stop: int, logits: Tensor | None) -> Tensor | None:
        """Fill positions start to stop - 1. `logits`: of an exact pass over what is there now, if there was one.

        Returns such logits for the next block where the last verify step changed nothing.
        """
        taken = self.step = 0
        if self.drafter is None:
            self.commit(range(start, stop), self.exact() if logits is None else logits, first=self.shifted)
        elif not self.setting.unit:
            self.drafts(range(start, stop), self.whole_draft(), first=self.shifted)
            taken = 1
        elif self.shifted and start % self.setting.unit == 0:
            self.drafts(range(start, start + 1), self.draft(start - 1, start, opening=True))
            taken, self.step = 1, 0
        while self.drafted or MASK in self.ids[start:stop]:
            while taken < self.setting.steps and MASK in self.ids[start:stop]:
                self.drafts(self.open_part(start, stop), self.draft(start, stop))
                taken += 1
            if self.setting.verify == "trust" and MASK not in self.ids[start:stop]:
                self.drafted.clear()
                break
            before = list(self.ids)
            logits = self.verify(start, stop)
            taken = 0
            if self.drafter is None and self.ids == before:
                return logits
        return None

    def open_part(self, start: int, stop: int) -> range:
        """The first sub-block with a mask."""
        width, unit = self.setting.sub_block, self.setting.unit
        if not width:
            return range(start, stop)
        first = self.ids.index(MASK, start, stop)
        return range(start, min(first // unit * unit + (first % unit // width + 1) * width, stop))

    def drafts(self, positions: range, logits: Tensor, first: bool = False) -> None:
        step = self.step
        self.drafted.update(dict.fromkeys(self.commit(positions, logits, first), step))

    def draft(self, start: int, stop: int, opening: bool = False) -> Tensor:
        """A cheap pass over the block, or over the last rows before the block that it opens."""
        if not self.setting.unit:
            return self.rows(self.drafter or self.served, start, stop)
        assert self.drafter is not None
        unit = self.setting.unit
        end = (start // unit + 1) * unit
        ids = [*self.ids, *[MASK] * unit][:end]
        block = torch.arange(end) // unit
        self.count(self.drafter, end - min(self.final, start))
        self.final = end if opening else end - unit
        found = self.drafter.run(ids, range(end), block[:, None] >= block[None], self.drafter.cache())
        return torch.cat((found[:1], found)) if self.shifted else found

    def whole_draft(self) -> Tensor:
        assert self.drafter is not None
        return self.rows(self.drafter, 0, self.end)

    def rows(self, model: Plain, start: int, stop: int) -> Tensor:
        """A pass over positions start to stop - 1 that sees what is kept of the others."""
        self.count(model, stop - start)
        visible = torch.ones(stop - start, self.end, dtype=torch.bool)
        found = torch.full((self.end, VOCAB), torch.nan).double()
        found[start:stop] = model.run(self.ids[start:stop], range(start, stop), visible, self.kept, start)
        return found.roll(1, 0) if self.shifted else found

    def count(self, model: Plain, fed: int) -> None:
        self.answer.positions += fed
        if model is self.drafter:
            self.answer.draft_forwards += 1
            self.answer.draft_positions += fed
        else:
            self.answer.forwards += 1

    def exact(self, copies: Sequence[int] = ()) -> Tensor:
        """A whole pass of the served model; then come the logits of masked copies of some positions."""
        self.count(self.served, self.end + len(copies))
        ids, positions = [*self.ids, *[MASK] * len(copies)], [*range(self.end), *copies]
        visible = torch.ones(len(ids), len(ids), dtype=torch.bool)
        visible[:, self.end :] = False
        for row, position in enumerate(copies, start=self.end):
            visible[row, position] = False
            visible[row, row] = True
        kept = self.kept if self.drafter is None else self.served.cache()
        found = self.served.run(ids, positions, visible, kept)
        assert not (copies and self.setting.shift)
        return found.roll(1, 0) if self.setting.shift else found

    def commit(self, positions: range, logits: Tensor, first: bool = False) -> list[int]:
        """The threshold rule over the masked positions, and the `first` of them whatever it says; which it filled."""
        sure = {i: self.best(logits[i], i, self.step) for i in positions if self.ids[i] == MASK}
        if not sure:
            return []
        chosen = [i for i, (_, chance) in sure.items() if chance >= self.setting.threshold]
        chosen = chosen or [max(sure, key=lambda i: sure[i][1])]
        if first and positions[0] in sure:
            chosen = sorted({positions[0], *chosen})
        for i in chosen:
            self.ids[i], self.chances[i] = sure[i]
        self.step += 1
        return chosen

    def verify(self, start: int, stop: int) -> Tensor:
        setting, drafted = self.setting, sorted(self.drafted)
        copied = setting.verify == "masked_copy"
        logits = self.exact(drafted if copied else ())
        self.answer.verifies += 1
        rows = {i: logits[self.end + n] if copied else logits[i] for n, i in enumerate(drafted)}
        own = {i: self.best(rows[i], i, self.drafted[i]) for i in drafted}
        rejected = []
        for i in drafted:
            differs, unsure = own[i][0] != self.ids[i], float(self.law(rows[i])[self.ids[i]]) < setting.least
            gone = {"trust": False, "exact": differs, "confidence": unsure}.get(setting.verify, differs or unsure)
            rejected += [i] * gone
        progress = bool(self.commit(range(start, stop), logits)) or len(rejected) < len(drafted)
        block = start // setting.unit * setting.unit if setting.unit else start
        placed = [block] if self.shifted and block in rejected else []
        if rejected and not progress and not placed:
            placed = [max(rejected, key=lambda i: own[i][1])]
            self.answer.forced += 1
        for i in rejected:
            if i not in placed:
                self.ids[i] = MASK
                self.answer.remasked += 1
            elif own[i][0] != self.ids[i]:
                self.ids[i], self.chances[i] = own[i]
                self.answer.remasked += 1
        self.drafted.clear()
        return logits

    def best(self, row: Tensor, position: int, step: int) -> tuple[int, float]:
        """The token that is drawn there, and its probability without the temperature."""
        law, scores = self.law(row), row.clone()
        scores[MASK] = -torch.inf
        if self.setting.temperature:
            noise = gumbel(self.setting.seed, 0, position, Purpose.DENOISE, VOCAB, "cpu", step)
            scores = scores / self.setting.temperature + noise
        token = int(scores.argmax())
        return token, float(law[token])

    def law(self, row: Tensor) -> Tensor:
        row = row.clone()
        row[MASK] = -torch.inf
        return row.softmax(-1)
