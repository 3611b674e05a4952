"""What an EAGLE-3 draft is made of, whatever file format said so."""

from __future__ import annotations

from dataclasses import dataclass

# Names of activations as configurations have them -> as `ops.gated_activation` has them.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True, slots=True)
class Eagle3Spec:
    """A draft of the EAGLE-3 family (arXiv 2503.01840): one decoder layer that reads a token and a feature.

    `taps` are the target's layers whose outputs it reads, 0 being the first (HF `hidden_states[tap + 1]`), in the order
    in which `fc` takes them. `rope` holds theta, scaling and the like as a `transformers` configuration has them.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    taps: tuple[int, ...]
    vocab_size: int  # of the target
    draft_vocab_size: int  # of the head; smaller than vocab_size where there is a d2t map
    most: int = 5  # tokens of one draft, where nobody asks for another length
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: tuple[tuple[str, object], ...] = (("rope_theta", 10000.0), ("rope_type", "default"))
    max_position_embeddings: int = 0
    window: int | None = None  # keys at distance < window are visible
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_before_residual: bool = False  # the residual stream begins with the normed feature
    norm_before_fc: bool = False  # one norm over all tapped states together
    fc_norm: bool = False  # one norm for each tapped state
    norm_output: bool = False  # what the next drafted token is fed is normed
    own_embedding: bool = False  # the checkpoint brings its own embedding table
    own_head: bool = True  # and its own head
