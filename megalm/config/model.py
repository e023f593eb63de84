"""The section `model` of a recipe: the Transformer's shape and all its choices, and the values derived from them."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from megalm.config.fields import LARGEST_ENUMERATED, AboveZero, Count, Few, Fraction, Positive, Section, one_of
from megalm.config.patterns import BlockPattern

_Share = Annotated[float, Field(gt=0.0, le=1.0)]


class ModelSection(Section):
    """The Transformer's shape. None stands for the value that the property of the same meaning derives.

    Positions: `rotary_share` of a head's features turn, their frequencies scaled by `rotary_scaling` for texts
    `rotary_factor` times as long as `rotary_original`; t5 has `relative_buckets` of distances up to
    `relative_distance`. Each `nope_every`-th layer knows no positions.

    Attention: a query sees the last `window` tokens in the layers that are S in `window_pattern`, which repeats, and
    all of them in those that are L; with `document_mask` its own document only. `attention_sinks` add a learned term
    to the denominator of each head's softmax, `attention_gate` multiplies what a head gives by a sigmoid of the
    layer's input. The caps bound scores and logits by tanh. Scores are divided by the root of `scores_head_dim` (None:
    of a head's size).

    With the `attention_pattern` strided a query sees blocks of `block_size` tokens: the last `local_blocks`, its own
    included, and each `block_stride`-th before its own; and the first `global_tokens` tokens. With hierarchical it sees
    of each block before the local ones the mean key and the mean value, after norm and rotation, as those of one token.

    With `kv_rank` attention is latent (DeepSeek-V2, 2024): keys and values are made from a normed vector of `kv_rank`
    features a token, and queries from one of `q_rank` (None: from the hidden state). Of a query or key `rope_head_dim`
    features turn with the position, those of keys the same for all heads, and `nope_head_dim` do not; a value has
    `value_head_dim`.

    With `mtp_depth` D the model learns to predict D tokens more, by a block for each behind the last layer, numbered on
    from it, which is given the embedding of the token before (DeepSeek-V3, 2024); see `loss.mtp`.

    Block: the norm stands before each half (pre), after the sum (post), or before and after the half (sandwich); with
    `parallel_residual` both halves read the same input. The norm rmsnorm_zero_centered multiplies by 1 + weight. What a
    half adds is multiplied by `residual_scale`, and left out for whole samples with a probability that grows over the
    layers to `stochastic_depth`.

    Mixture of experts: behind the first `dense_layers` an MLP is `experts` of `expert_ffn` features, without biases, of
    which a token goes to `experts_per_token`, those with the highest `router_score` of its router. `shared_experts`
    more, as one MLP, see every token. With `capacity_factor` an expert takes that multiple of its even share of a
    row's tokens, the first ones, and leaves the others out (None: it takes all). `router_bias_rate` moves a bias of
    each expert's score, for the choice only, after each step, so that loads become even without a loss.

    First values: matrices are drawn as `init` says, tables of embeddings with the deviation `init_std`; with
    `init_depth_scaled` what adds to the residual stream starts smaller by the root of twice the layers.

    With `mup_base`, the width at which a rate was found good, it is good at any `hidden` (muP, Yang et al. 2022): the
    blocks' matrices start smaller by the root of hidden / mup_base and learn slower by it, logits are divided by it,
    and scores by the root of a head's size over `mup_base_head_dim`, where heads grow too. What else is given in
    features (`ffn`, the ranks of latent attention) must grow with `hidden`.

    `kernels` says what computes it: fused Triton kernels or plain torch (auto: fused on CUDA); `flash_attention` false
    stores the whole matrix of attention scores. The model is the same.
    """

    layers: Few
    mtp_depth: Annotated[int, Field(ge=0, le=64)] = 0
    hidden: Positive
    heads: Few
    kv_heads: Positive | None = None
    head_dim: Positive | None = None
    kv_rank: Positive | None = None
    q_rank: Positive | None = None
    rope_head_dim: Positive | None = None
    nope_head_dim: Positive | None = None
    value_head_dim: Positive | None = None
    ffn: Positive | None = None
    vocab: Positive | None = None
    sequence: Positive

    norm: Annotated[str, one_of("norm")] = "layernorm"
    norm_eps: AboveZero = 1e-5
    norm_place: Annotated[str, one_of("norm_place")] = "pre"
    parallel_residual: bool = False
    activation: Annotated[str, one_of("activation")] = "gelu"
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    embedding_norm: bool = False
    embedding_scale: AboveZero = 1.0
    residual_scale: AboveZero = 1.0

    position: Annotated[str, one_of("position")] = "learned"
    nope_every: Positive | None = None
    rotary_base: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 10000.0
    rotary_share: _Share = 1.0
    rotary_scaling: Annotated[str, one_of("rotary_scaling")] = "none"
    rotary_factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 1.0
    rotary_original: Positive | None = None
    relative_buckets: Annotated[int, Field(ge=2, le=2**16)] = 32
    relative_distance: Positive = 128

    window: Positive | None = None
    window_pattern: Annotated[str, Field(pattern="^[SL]+$")] = "S"
    attention_pattern: Annotated[str, one_of("attention_pattern")] = "full"
    block_size: Positive = 64
    local_blocks: Positive = 4
    block_stride: Positive | None = None
    global_tokens: Count = 0
    document_mask: bool = False
    qk_norm: bool = False
    scores_head_dim: Positive | None = None
    attention_softcap: AboveZero | None = None
    attention_sinks: bool = False
    attention_gate: bool = False
    logit_softcap: AboveZero | None = None

    experts: Annotated[int, Field(ge=2, le=LARGEST_ENUMERATED)] | None = None
    experts_per_token: Few = 2
    expert_ffn: Positive | None = None
    shared_experts: Count = 0
    dense_layers: Count = 0
    capacity_factor: AboveZero | None = None
    router_score: Annotated[str, one_of("router_score")] = "softmax"
    router_bias_rate: AboveZero | None = None

    dropout: Fraction = 0.0
    attention_dropout: Fraction | None = None
    stochastic_depth: Fraction = 0.0
    tie_embeddings: bool = True
    init: Annotated[str, one_of("init")] = "normal"
    init_std: AboveZero = 0.02
    init_depth_scaled: bool = True
    mup_base: Positive | None = None
    mup_base_head_dim: Positive | None = None
    kernels: Annotated[str, one_of("kernels")] = "auto"
    flash_attention: bool = True

    @property
    def blocks(self) -> int:
        """Number of all blocks: the layers, and those that predict further tokens."""
        return self.layers + self.mtp_depth

    @property
    def is_latent(self) -> bool:
        """Whether keys and values are made from a latent vector."""
        return self.kv_rank is not None

    @property
    def head_size(self) -> int:
        """Features of a query or key: `head_dim`, else hidden / heads; of latent attention both kinds together."""
        if self.is_latent:
            return self.nope_size + self.rope_size
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def nope_size(self) -> int:
        """Features of a latent attention's query or key that do not turn: `nope_head_dim`, else hidden / heads."""
        return self.hidden // self.heads if self.nope_head_dim is None else self.nope_head_dim

    @property
    def rope_size(self) -> int:
        """Features of a latent attention's key that turn: `rope_head_dim`, else half as many as do not, in pairs."""
        return max(2, self.nope_size // 4 * 2) if self.rope_head_dim is None else self.rope_head_dim

    @property
    def value_size(self) -> int:
        """Features of a value: those of a key; of latent attention `value_head_dim`, else as many as do not turn."""
        if not self.is_latent:
            return self.head_size
        return self.nope_size if self.value_head_dim is None else self.value_head_dim

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values; fewer than `heads` under grouped-query attention, 1 under multi-query."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def has_gated_activation(self) -> bool:
        """Whether the MLP has two projections up, one of which gates the other."""
        return self.activation in ("swiglu", "geglu")

    @property
    def feed_forward(self) -> int:
        """Features inside the MLP: `ffn`, else 4 x hidden; with a gate 8/3 x hidden up to a multiple of 64."""
        if self.ffn is not None:
            return self.ffn
        if self.has_gated_activation:
            return -(-8 * self.hidden // (3 * 64)) * 64
        return 4 * self.hidden

    @property
    def expert_features(self) -> int:
        """Features inside an expert: `expert_ffn`, else those of an MLP."""
        return self.feed_forward if self.expert_ffn is None else self.expert_ffn

    @property
    def shared_features(self) -> int:
        """Features inside the MLP that stands for all shared experts."""
        return self.shared_experts * self.expert_features

    @property
    def has_dense_mlps(self) -> bool:
        """Whether anything has the width `feed_forward`: a layer's MLP, or experts without a width of their own."""
        return self.experts is None or self.expert_ffn is None or self.dense_layers > 0

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer's MLP is a mixture of experts."""
        return self.experts is not None and layer >= self.dense_layers

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases: `qkv_bias`, else `bias`; latent attention has none."""
        return not self.is_latent and (self.bias if self.qkv_bias is None else self.qkv_bias)

    @property
    def has_out_bias(self) -> bool:
        """Whether attention's projection back has a bias: `out_bias`, else `bias`."""
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def probability_dropout(self) -> float:
        """The rate at which attention probabilities are dropped: `attention_dropout`, else `dropout`."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def projected_width(self) -> int:
        """Features of queries, gates, keys and values together."""
        queries = self.heads * (2 if self.attention_gate else 1)
        return (queries + 2 * self.key_value_heads) * self.head_size

    @property
    def attention_matrices(self) -> dict[str, int]:
        """Number of elements of each matrix of a layer's attention, by its name there."""
        queries, values = self.heads * self.head_size, self.heads * self.value_size
        sizes = {"out": self.hidden * values}
        if self.kv_rank is not None:
            sizes["kv_down"] = self.hidden * (self.kv_rank + self.rope_size)
            sizes["kv_up"] = self.kv_rank * (self.heads * self.nope_size + values)
            if self.q_rank is None:
                return sizes | {"q": self.hidden * queries}
            return sizes | {"q_down": self.hidden * self.q_rank, "q_up": self.q_rank * queries}
        if self.key_value_heads == 1 and self.heads > 1:
            shared = 2 * self.head_size
            return sizes | {"q": self.hidden * (self.projected_width - shared), "kv": self.hidden * shared}
        return sizes | {"qkv": self.hidden * self.projected_width}

    @property
    def hidden_matrices(self) -> dict[str, int]:
        """Number of elements of each matrix of the blocks, by its logical name."""
        attention = {f"attention.{name}": size for name, size in self.attention_matrices.items()}
        found = {
            f"blocks.{n}.{name}.weight": size
            for n in range(self.blocks)
            for name, size in (attention | self._mlp_matrices(n)).items()
        }
        joins = {f"blocks.{n}.mtp.project.weight": 2 * self.hidden**2 for n in range(self.layers, self.blocks)}
        return found | joins

    def _mlp_matrices(self, layer: int) -> dict[str, int]:
        """Return the number of elements of each matrix of a layer's MLP or experts, by its name in the block."""
        up, down = self.hidden * (2 if self.has_gated_activation else 1), self.hidden
        if not self.has_experts(layer):
            return {"mlp.up": up * self.feed_forward, "mlp.down": down * self.feed_forward}
        width, shared = (self.experts or 0) * self.expert_features, self.shared_features
        sizes = {"mlp.experts.up": up * width, "mlp.experts.down": down * width}
        return sizes | ({"mlp.shared.up": up * shared, "mlp.shared.down": down * shared} if shared else {})

    @property
    def residual_shrink(self) -> float:
        """The factor of the first values of what adds to the residual stream: its 2 x layers terms have variance 1."""
        return 1.0 / math.sqrt(2 * self.layers) if self.init_depth_scaled else 1.0

    @property
    def width_factor(self) -> float:
        """How many times as wide as muP's base the model is; 1 without muP."""
        return 1.0 if self.mup_base is None else self.hidden / self.mup_base

    @property
    def matrix_std(self) -> float:
        """The deviation of the first values of the blocks' matrices, where `init` leaves it open."""
        return self.init_std / math.sqrt(self.width_factor)

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by: under muP scores are divided by a head's size and not by its root."""
        if self.scores_head_dim is not None:
            return math.sqrt(self.head_size / self.scores_head_dim)
        return 1.0 if self.mup_base_head_dim is None else math.sqrt(self.mup_base_head_dim / self.head_size)

    @property
    def draws_masks(self) -> bool:
        """Whether a training step leaves anything out at random."""
        return max(self.dropout, self.probability_dropout, self.stochastic_depth) > 0.0

    @property
    def rotary_size(self) -> int:
        """Features of a head that turn, its first: an even number."""
        if self.is_latent:
            return self.rope_size
        return int(self.head_size * self.rotary_share) // 2 * 2

    @property
    def block_pattern(self) -> BlockPattern | None:
        """Which blocks a query sees; None: attention does not go by blocks."""
        if self.attention_pattern == "strided":
            return BlockPattern(self.block_size, self.local_blocks, self.block_stride, self.global_tokens)
        if self.attention_pattern == "hierarchical":
            return BlockPattern(self.block_size, self.local_blocks, summaries=True)
        return None

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a query of a layer sees, its own included; None: all before it."""
        pattern = self.window_pattern
        return self.window if pattern[layer % len(pattern)] == "S" else None

    def knows_positions(self, layer: int) -> bool:
        """Return whether positions enter the attention of a layer, where the kind of position has them enter there."""
        return self.nope_every is None or (layer + 1) % self.nope_every != 0
