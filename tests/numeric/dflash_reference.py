"""DFlash written down again, in loops: one sequence, no cache, float64. Nothing of the engine's network is used.

Every round runs the target over all tokens so far, makes the context anew from its hidden states, and attends slot by
slot and head by head over the keys that a slot may see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from engine.models.dflash.spec import DFlashSpec

Tensor = torch.Tensor
Bias = Callable[[int, int], Tensor]  # (position, size) -> what is added to the draft's logits there


@dataclass
class Round:
    """One round: where its anchor stands, the block's logits and confidences, its drafts, and how many stood."""

    position: int
    logits: Tensor  # [most, draft vocabulary], before the bias and before refinement
    confidences: Tensor | None
    drafts: list[int]
    accepted: int


@dataclass
class Reference:
    """A draft and its target in float64."""

    spec: DFlashSpec
    weights: dict[str, Tensor]
    target: PreTrainedModel
    rounds: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {name: w.double() if w.is_floating_point() else w for name, w in self.weights.items()}
        ends = {"table": self.target.get_input_embeddings(), "head": self.target.get_output_embeddings()}
        self.weights |= {name: end.get_parameter("weight") for name, end in ends.items()}
        assert self.target.dtype is torch.float64

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int, bias: Bias) -> list[int]:
        """Greedy decoding of `count` tokens by rounds of draft and verification."""
        tokens = [*prompt, self._greedy(prompt)[-1]] if len(prompt) > 1 else list(prompt)  # one token is an anchor
        self.rounds = []
        while (left := len(prompt) + count - len(tokens)) > 0:
            if left == 1:  # no room for a draft
                tokens.append(self._greedy(tokens)[-1])
                break
            position = len(tokens) - 1
            logits, confidences, drafts = self.draft(tokens, bias)
            drafts = drafts[: left - 1]
            own = self._greedy([*tokens, *drafts])[position:]
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == own[accepted]:
                accepted += 1
            tokens += [*drafts[:accepted], own[accepted]]
            self.rounds.append(Round(position, logits, confidences, drafts, accepted))
        return tokens[len(prompt) :]

    def draft(self, tokens: list[int], bias: Bias) -> tuple[Tensor, Tensor | None, list[int]]:
        """Logits, confidences and tokens of the block whose anchor is the last of `tokens`."""
        spec, weights = self.spec, self.weights
        hidden = self._block(tokens)
        hidden = hidden if spec.anchor_predicts else hidden[1:]
        ids = weights.get("d2t", torch.arange(spec.vocab_size))
        head = weights["lm_head.weight"] if spec.own_head else weights["head"][ids]
        logits = hidden @ head.T * spec.logit_scale
        if spec.logit_softcap:
            logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        previous, drafts, confidences = tokens[-1], [], []
        for step in range(len(hidden)):
            scores = logits[step] + bias(len(tokens) + step, len(ids))
            if spec.markov_rank:
                before = weights["markov_head.markov_w1.weight"][previous]
                scores = scores + weights["markov_head.markov_w2.weight"] @ before
            if spec.selector_rank:
                scores = self._select(scores, hidden[step], previous)
            if spec.confidence_head:
                seen = [hidden[step]]
                if spec.confidence_with_markov:
                    seen.append(weights["markov_head.markov_w1.weight"][previous])
                confidence = weights["confidence_head.proj.weight"] @ torch.cat(seen)
                confidences.append(confidence + weights["confidence_head.proj.bias"])
            previous = int(ids[int(scores.argmax())])
            drafts.append(previous)
        return logits, torch.cat(confidences) if confidences else None, drafts

    def _select(self, scores: Tensor, hidden: Tensor, previous: int) -> Tensor:
        weights = self.weights
        projected = weights["candidate_selector.hidden_projection.weight"] @ hidden
        chosen = torch.full_like(scores, float("-inf"))
        for token in scores.argsort(descending=True)[: self.spec.selector_top_k].tolist():
            pair = weights["candidate_selector.predecessor_codebook"][previous] * projected
            chosen[token] = scores[token] + pair @ weights["candidate_selector.successor_codebook"][token]
        return chosen

    def _greedy(self, tokens: list[int]) -> list[int]:
        return self.target(torch.tensor([tokens])).logits[0].argmax(-1).tolist()

    def _context(self, tokens: list[int]) -> list[Tensor]:
        """The fused vector of every position before the anchor's."""
        states = self.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        fused = []
        for position in range(len(tokens) - 1):
            joined = torch.cat([states[tap + 1][0, position] for tap in self.spec.taps])
            fused.append(self._norm(self.weights["fc.weight"] @ joined, "hidden_norm"))
        return fused

    def _block(self, tokens: list[int]) -> Tensor:
        """Last hidden states [block_size, D] of the block."""
        spec, start = self.spec, len(tokens) - 1
        context = self._context(tokens)
        table = self.weights["embed_tokens.weight" if spec.own_embedding else "table"]
        ids = [tokens[-1]] + [spec.mask_token_id] * (spec.block_size - 1)
        stream = [table[token] * spec.embedding_scale for token in ids]
        for index in range(len(spec.layers)):
            stream = self._layer(index, stream, context, start)
        return torch.stack([self._norm(x, "norm") for x in stream])

    def _layer(self, index: int, stream: list[Tensor], context: list[Tensor], start: int) -> list[Tensor]:
        prefix = f"layers.{index}"
        normed = [self._norm(x, f"{prefix}.input_layernorm") for x in stream]
        inputs, made = self._convolve(f"{prefix}.attention_conv", normed, normed, 0), normed
        attended = self._attention(index, inputs, context, start)
        attended = self._convolve(f"{prefix}.attention_conv", attended, made, 1)
        stream = [x + y for x, y in zip(stream, attended, strict=True)]
        normed = [self._norm(x, f"{prefix}.post_attention_layernorm") for x in stream]
        inputs = self._convolve(f"{prefix}.mlp_conv", normed, normed, 0)
        gate, up, down = (self.weights[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        outputs = [down @ (F.silu(gate @ x) * (up @ x)) for x in inputs]
        outputs = self._convolve(f"{prefix}.mlp_conv", outputs, normed, 1)
        return [x + y for x, y in zip(stream, outputs, strict=True)]

    def _attention(self, index: int, inputs: list[Tensor], context: list[Tensor], start: int) -> list[Tensor]:
        spec, layer = self.spec, self.spec.layers[index]
        entries = [(position, x) for position, x in enumerate(context)]
        entries += [(start + slot, x) for slot, x in enumerate(inputs)]
        keys, values = [], []
        for position, x in entries:
            keys.append(self._heads(index, "k", x, spec.num_kv_heads, position))
            values.append(self._linear(index, "v", x).view(spec.num_kv_heads, spec.head_dim))
        outputs = []
        for slot, x in enumerate(inputs):
            own = start + slot
            queries = self._heads(index, "q", x, spec.num_heads, own)
            seen = [
                place
                for place, (position, _) in enumerate(entries)
                if (position <= own or not layer.causal)
                and (layer.window is None or abs(position - own) < layer.window)
            ]
            heads = []
            for head in range(spec.num_heads):
                group = head // (spec.num_heads // spec.num_kv_heads)
                scores = torch.stack([keys[place][group] @ queries[head] for place in seen]) / spec.head_dim**0.5
                mixed = scores.softmax(0) @ torch.stack([values[place][group] for place in seen])
                heads.append(mixed)
            outputs.append(self._linear(index, "o", torch.cat(heads)))
        return outputs

    def _linear(self, index: int, part: str, x: Tensor) -> Tensor:
        name = f"layers.{index}.self_attn.{part}_proj"
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", torch.zeros(1, dtype=x.dtype))

    def _heads(self, index: int, part: str, x: Tensor, count: int, position: int) -> Tensor:
        """Normed and rotated heads [count, head_dim] of a query or key."""
        size = self.spec.head_dim
        theta = float(dict(self.spec.rope)["rope_theta"])  # type: ignore[arg-type]
        angles = position * theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        cos, sin = angles.cos(), angles.sin()
        rotated = []
        for head in self._linear(index, part, x).view(count, size):
            normed = self._norm(head, f"layers.{index}.self_attn.{part}_norm")
            first, second = normed[: size // 2], normed[size // 2 :]
            rotated.append(torch.cat((first * cos - second * sin, second * cos + first * sin)))
        return torch.stack(rotated)

    def _convolve(self, name: str, xs: list[Tensor], normed: list[Tensor], which: int) -> list[Tensor]:
        spec = self.spec
        if not spec.conv_kernel:
            return xs
        outputs = []
        for slot, source in enumerate(normed):
            made = self.weights[f"{name}.kernel_projection.weight"] @ source
            kernel = made.view(2, spec.conv_kernel, -1)[which].repeat_interleave(spec.conv_group, dim=1)
            kernel = kernel + self.weights[f"{name}.base_kernel"][which]
            total = torch.zeros_like(source)
            for tap in range(spec.conv_kernel):
                if slot >= tap:
                    total = total + kernel[tap] * xs[slot - tap]
            outputs.append(total)
        return outputs

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + self.spec.rms_norm_eps).sqrt() * self.weights[f"{name}.weight"]
