"""A small plain sampler, to see during training what a model can do. One sequence at a time, greedy, no tricks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training.diffusion.network import KeyValue, Network


@dataclass(frozen=True, slots=True)
class Sampler:
    """Decodes by blocks: every token as sure as `threshold` is committed, and always the surest one (Fast-dLLM, 3.3).

    A threshold above 1 commits one token a step. `room`: most tokens of an answer, prompt and room within the network's
    positions; `ends`: ids behind which an answer is over.
    """

    network: Network
    mask_id: int
    ends: tuple[int, ...]
    block: int = 32
    room: int = 256
    threshold: float = 0.9

    @torch.no_grad()
    def __call__(self, attention: str, prompt: list[int]) -> tuple[list[int], int]:
        """The answer to a prompt with the token that ended it, and the forwards it took."""
        return self._full(prompt) if attention == "full" else self._block_causal(prompt)

    def _full(self, prompt: list[int]) -> tuple[list[int], int]:
        canvas = torch.tensor([prompt + [self.mask_id] * self.room])
        forwards = 0
        for start in range(len(prompt), canvas.shape[1], self.block):
            end = min(start + self.block, canvas.shape[1])
            while (canvas[0, start:end] == self.mask_id).any():
                states, _ = self.network(canvas)
                self._commit(canvas[0, start:end], states[0, start:end])
                forwards += 1
            if any(token in self.ends for token in canvas[0, start:end].tolist()):
                return self._cut(canvas[0, len(prompt) : end].tolist()), forwards
        return canvas[0, len(prompt) :].tolist(), forwards

    def _block_causal(self, prompt: list[int]) -> tuple[list[int], int]:
        tokens, past, forwards = list(prompt), None, 0
        done = len(prompt) // self.block * self.block
        if done:
            past = self._extend(torch.tensor([tokens[:done]]), None)
            forwards += 1
        while len(tokens) < len(prompt) + self.room:
            known = tokens[done:]
            block = torch.tensor([known + [self.mask_id] * (self.block - len(known))])
            while (block == self.mask_id).any():
                states, _ = self.network(block, done, None, past)
                self._commit(block[0], states[0])
                forwards += 1
            tokens = tokens[:done] + block[0].tolist()
            if any(token in self.ends for token in tokens[max(done, len(prompt)) :]):
                break
            past = self._extend(block, past)
            done += self.block
            forwards += 1
        return self._cut(tokens[len(prompt) : len(prompt) + self.room]), forwards

    def _extend(self, blocks: torch.Tensor, past: list[KeyValue] | None) -> list[KeyValue]:
        """Keys and values of the past and of whole clean blocks [1, T] behind it."""
        for start in range(0, blocks.shape[1], self.block):
            before = 0 if past is None else past[0][0].shape[2]
            _, own = self.network(blocks[:, start : start + self.block], before, None, past)
            if past is None:
                past = own
            else:
                past = [
                    (torch.cat((old[0], new[0]), dim=2), torch.cat((old[1], new[1]), dim=2))
                    for old, new in zip(past, own, strict=True)
                ]
        assert past is not None
        return past

    def _commit(self, block: torch.Tensor, states: torch.Tensor) -> None:
        """Fill in what is sure enough. block [T] ids, changed in place; states [T, hidden]."""
        logits = self.network.logits(states).double()
        logits[:, self.mask_id] = float("-inf")
        sure, best = logits.softmax(-1).max(-1)
        sure = torch.where(block == self.mask_id, sure, -1.0)
        chosen = sure >= self.threshold
        chosen[sure.argmax()] = True
        block[chosen] = best[chosen]

    def _cut(self, tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self.ends]
        return tokens[: ends[0] + 1] if ends else tokens
