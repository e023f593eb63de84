"""Causal self-attention with grouped queries, its heads split over the tensor axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.distributed.collectives import sum_gradient
from megalm.distributed.sharding import ShardSpec
from megalm.errors import ConfigError
from megalm.nn.context import Context
from megalm.nn.dropout import Dropout
from megalm.nn.latent_attention import LatentProjection
from megalm.nn.norms import RMSNorm
from megalm.nn.ops import REFERENCE, select_operations
from megalm.nn.pattern_attention import pattern_attention
from megalm.nn.positions import POSITIONS
from megalm.tensor_parallel.chunks import entered, entering
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear, shared_input
from megalm.tensor_parallel.recomputation import Origin, made_again

Projected = tuple[Tensor, Tensor | None, Tensor, Tensor]
"""q_BTHE, the gate of each head's result in the same shape (None: there is none), k_BTGE, v_BTGE.

Values that have fewer features than keys have zeros behind them.
"""


class Attention(nn.Module):
    """Attention of layer `layer`: x_BTD -> y_BTD (x_BTtD -> y_BTtD with `sequence`), see `ModelSection`.

    `context` are the ranks that divide a row's tokens: x has this rank's.

    With `recompute` set the backward pass computes scores and probabilities again (Korthikanti et al. 2022, section 5),
    where attention keeps them: fused kernels and patterns do that by themselves.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
        context: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        size = group.size()
        self.heads = config.heads // size
        self.first_head = group.rank() * self.heads
        self.all_heads = config.heads
        self.recompute = False
        self.window = config.window_of(layer)
        self.pattern = config.block_pattern
        self.softcap = config.attention_softcap
        self.value_size = config.value_size
        project: Callable[..., nn.Module] = GroupedQuery
        if config.is_latent:
            project = LatentProjection
        elif config.key_value_heads == 1 and config.heads > 1:
            project = MultiQuery
        self.project = project(name, config, group=group, init=init, sequence=sequence)
        self.out = RowParallelLinear(
            f"{name}.out",
            config.heads * config.value_size,
            config.hidden,
            group=group,
            init=init,
            std=config.matrix_std,
            shrink=config.residual_shrink,
            bias=config.has_out_bias,
            sequence=sequence,
        )
        self.dropout = Dropout(f"{name}.probabilities", config.probability_dropout)
        operations = select_operations(config.kernels, init.device)
        self.attend = operations.flash_attention if config.flash_attention else operations.unfused_attention
        if self.pattern is not None:
            self.attend = pattern_attention
        elif config.flash_attention and config.head_size > operations.widest_head:
            raise ConfigError(
                f"a head has {config.head_size} features, the fused kernels take {operations.widest_head} at most; "
                "use model.flash_attention=false or model.kernels=reference"
            )
        self.keeps_scores = self.pattern is None and (not config.flash_attention or operations is REFERENCE)
        if context is not None:
            self.attend = context.around(self.attend, operations)
        self.query_factor = config.query_factor
        self.rotates = config.knows_positions(layer)
        kind = POSITIONS.get(config.position)
        self.score_bias = kind.score_bias(name, config, group, init) if self.rotates else None
        # Each rank sees its own heads, so the gradients of these norms are summed over the tensor axis.
        shared: dict[str, Any] = {
            "eps": config.norm_eps,
            "bias": False,
            "group": group,
            "init": init,
            "operations": operations,
        }
        self.q_norm, self.k_norm = (
            RMSNorm(f"{name}.{which}_norm", config.head_size, **shared) if config.qk_norm else None for which in "qk"
        )
        self.sinks = None
        if config.attention_sinks:
            spec = ShardSpec.split(f"{name}.sinks", (config.heads,), 0, group.rank(), size)
            self.sinks = init.constant(spec, 0.0)

    def forward(self, x: Tensor, context: Context, origin: Origin | None = None) -> Tensor:
        """Attend over all earlier tokens of the same row that the layer's masks leave visible.

        With its `origin` x is made again for the backward pass of its projections.
        """
        q_BTHE, gate_BTHE, k_BTGE, v_BTGE = self.project(x, origin)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTGE = self.q_norm(q_BTHE), self.k_norm(k_BTGE)
        if self.query_factor != 1.0:
            q_BTHE = q_BTHE * self.query_factor
        if self.rotates:
            q_BTHE, k_BTGE = context.rotate(q_BTHE), context.rotate(k_BTGE)
        if self.q_norm is None and q_BTHE.is_contiguous():
            # As views keys and values would keep all of the projection, which the queries do not need any more.
            k_BTGE, v_BTGE = k_BTGE.contiguous(), v_BTGE.contiguous()
        attend = self.attend
        bias = {} if self.score_bias is None else self.score_bias(context.queries, context.tokens)
        keeps_scores = self.keeps_scores or (self.pattern is None and "bias_HTS" in bias)
        if self.recompute and keeps_scores and torch.is_grad_enabled():
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
        result = attend(
            q_BTHE,
            k_BTGE,
            v_BTGE,
            causal=True,
            drop=self.dropout.at(context.dropout, self.first_head, self.all_heads),
            window=self.window,
            softcap=self.softcap,
            documents=context.documents,
            return_lse=self.sinks is not None,
            **({} if self.pattern is None else {"pattern": self.pattern}),
            **bias,
        )
        if self.sinks is not None:
            out_BTHE, lse_BHT = result
            result = _with_sinks(out_BTHE, lse_BHT, self.sinks)
        if gate_BTHE is not None:
            result = result * torch.sigmoid(gate_BTHE)
        return self.out(result[..., : self.value_size].flatten(2))


def _with_sinks(out_BTHE: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """Return attention whose softmax has one more term, exp(sink), which no value belongs to (Agarwal et al. 2025)."""
    share_BHT = torch.sigmoid(lse_BHT - sinks_H.to(lse_BHT.dtype)[:, None])
    return (out_BTHE * share_BHT.transpose(1, 2)[..., None]).to(out_BTHE.dtype)


class GroupedQuery(nn.Module):
    """Queries, gates, keys and values by one fused projection.

    Its rows are grouped by key/value head: the queries of its group, their gates where there are any, its key, its
    value. So a split of the groups over the tensor axis is a contiguous split of the weight's rows.
    """

    def __init__(
        self, name: str, config: ModelSection, *, group: dist.ProcessGroup, init: Initializer, sequence: bool
    ) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.groups = config.key_value_heads // group.size()
        queries = config.heads // config.key_value_heads
        self.parts = (queries, queries, 1, 1) if config.attention_gate else (queries, 1, 1)
        self.qkv = ColumnParallelLinear(
            f"{name}.qkv",
            config.hidden,
            config.key_value_heads * sum(self.parts) * config.head_size,
            group=group,
            init=init,
            std=config.matrix_std,
            bias=config.has_qkv_bias,
            sequence=sequence,
            interleaved=tuple(part * config.head_size for part in self.parts),
        )

    def forward(self, x: Tensor, origin: Origin | None = None) -> Projected:
        """Project a hidden state."""
        projected = self.qkv(x, origin)
        grouped = projected.view(*projected.shape[:2], self.groups, sum(self.parts), self.head_size)
        parts = grouped.split(self.parts, dim=3)  # one backward for all, unlike slices
        q, *gate, k, v = (part.flatten(2, 3) for part in parts)
        return q, gate[0] if gate else None, k, v


class MultiQuery(Linear):
    """All queries share one key and value head, which every tensor rank computes (Shazeer 2019).

    Queries, and their gates beside them, have weight `q` [1 or 2, H * E, D], split by heads; key and value have `kv`
    [2 * E, D], whole on every rank, whose gradient is summed over the heads of all ranks.
    """

    def __init__(
        self, name: str, config: ModelSection, *, group: dist.ProcessGroup, init: Initializer, sequence: bool
    ) -> None:
        super().__init__()
        self.group, self.sequence = group, sequence
        self.head_size = config.head_size
        self.gated = config.attention_gate
        index, count = group.rank(), group.size()
        leading = (2,) if self.gated else ()
        shape = (*leading, config.heads * config.head_size, config.hidden)
        self.q_weight = init.matrix(
            ShardSpec.split(f"{name}.q.weight", shape, len(leading), index, count), config.matrix_std
        )
        shared = 2 * config.head_size
        spec = ShardSpec.whole(f"{name}.kv.weight", (shared, config.hidden))
        self.kv_weight = init.matrix(replace(spec, interleaved=(config.head_size,) * 2), config.matrix_std)
        self.q_bias = self.kv_bias = None
        if config.has_qkv_bias:
            self.q_bias = init.constant(ShardSpec.split(f"{name}.q.bias", shape[:-1], len(leading), index, count), 0.0)
            self.kv_bias = init.constant(ShardSpec.whole(f"{name}.kv.bias", (shared,)), 0.0)

    def forward(self, x: Tensor, origin: Origin | None = None) -> Projected:
        """Project a hidden state."""
        q_bias = None if self.q_bias is None else self.q_bias.flatten()
        kv_bias = None if self.kv_bias is None else sum_gradient(self.kv_bias, self.group)
        q_weight, kv_weight = self.q_weight.flatten(0, -2), sum_gradient(self.kv_weight, self.group)
        if self.chunks > 1 and self.group.size() > 1:
            pairs = []
            for part, made in entering(x, origin, self.group, self.sequence, self.chunks):
                with made_again(part, made):
                    pairs.append((self.linear(part, q_weight, q_bias), self.linear(part, kv_weight, kv_bias)))
            own, shared = (entered(products, x, self.group, self.sequence) for products in zip(*pairs, strict=True))
        else:
            x, origin = shared_input(x, origin, self.group, self.sequence)
            with made_again(x, origin):
                own, shared = self.linear(x, q_weight, q_bias), self.linear(x, kv_weight, kv_bias)
        q, *gate = (part.unflatten(-1, (-1, self.head_size)) for part in own.chunk(2 if self.gated else 1, dim=-1))
        k, v = (part.unsqueeze(2) for part in shared.chunk(2, dim=-1))
        return q, gate[0] if gate else None, k, v
