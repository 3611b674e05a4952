"""What a block-diffusion draft is made of, whatever file format said so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """One layer's attention. `window`: keys at distance < window are visible; `causal`: inside the block too."""

    window: int | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class DFlashSpec:
    """A draft of the DFlash family (arXiv 2602.06036) and its successors.

    `taps` are the target's layers whose outputs it reads, 0 being the first (HF `hidden_states[tap + 1]`) and -1 the
    embedding's output, in the order in which `fc` takes them. `rope` holds theta, scaling and the like as a
    `transformers` configuration has them.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[DraftLayer, ...]
    taps: tuple[int, ...]
    block_size: int  # input slots of one pass: the anchor and masks
    mask_token_id: int
    vocab_size: int  # of the target
    draft_vocab_size: int  # of the head; smaller than vocab_size where, and only where, there is a d2t map
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: tuple[tuple[str, object], ...] = (("rope_type", "default"), ("rope_theta", 10000.0))
    max_position_embeddings: int = 0
    attention_bias: bool = False
    anchor_predicts: bool = False  # DSpark: slot j predicts the token after it, so the anchor's slot drafts too
    own_embedding: bool = False  # the checkpoint brings its own embedding table
    own_head: bool = False  # and its own head; else the head is the target's, or its rows d2t
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    markov_rank: int = 0  # DSpark: logits += W1[previous] @ W2.T
    confidence_head: bool = False
    confidence_with_markov: bool = False
    conv_kernel: int = 0  # DFlash2: taps of the dynamic convolutions around attention and MLP; 0: none
    conv_group: int = 16
    selector_rank: int = 0  # DFlash2: path selector over the best `selector_top_k` tokens of each slot
    selector_top_k: int = 0

    @property
    def most(self) -> int:
        """Tokens that one pass drafts."""
        return self.block_size if self.anchor_predicts else self.block_size - 1
