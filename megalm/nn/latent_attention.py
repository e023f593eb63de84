"""The projections of latent attention: keys and values from one small vector a token (DeepSeek-V2, 2024, section 2.1).

    c_kv = norm(W_kv_down x)    k = [R(W_kr x); W_uk c_kv]    v = W_uv c_kv
    c_q  = norm(W_q_down x)     q = [R(W_qr c_q); W_uq c_q]   (without a rank of queries c_q = x)

R turns features by their position. The part of a key that turns is one for all heads. It stands in front, where the
paper has it behind: a score is a sum over features, and rotary positions turn the first ones of a head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.distributed.collectives import sum_gradient
from megalm.distributed.sharding import ShardSpec
from megalm.nn.norms import RMSNorm
from megalm.nn.ops import select_operations
from megalm.tensor_parallel.initialize import Initializer
from megalm.tensor_parallel.linear import Linear, shared_input
from megalm.tensor_parallel.recomputation import Origin, made_again, remember, unchanged


class LatentProjection(Linear):
    """Queries, keys and values of latent attention: x_BTD (x_BTtD with `sequence`) -> q_BTHE, None, k_BTHE, v_BTHE.

    The projections down are whole on every tensor rank, those up are split by heads. A rank goes down from the tokens
    that it holds, so that what is gathered over them is the latents and not the hidden state. Without `sequence` the
    ranks go down alike, and the latents' gradient, summed over the heads of all ranks, makes that of the projections
    down whole; with it each rank's gradient is that of its tokens, and is summed. Every rank of `group` must call.

    Weights: `kv_down` [K + R, D] of the K features of the latent and the R that turn, `kv_up` [H (N + V), K] by heads,
    of each its key and its value, `q_down` [Q, D] and `q_up` [H (R + N), Q] by heads, of each what turns and what does
    not; without a rank of queries `q` [H (R + N), D].
    """

    def __init__(
        self, name: str, config: ModelSection, *, group: dist.ProcessGroup, init: Initializer, sequence: bool
    ) -> None:
        super().__init__()
        assert config.kv_rank is not None
        self.group, self.sequence = group, sequence
        self.rope, self.nope, self.value = config.rope_size, config.nope_size, config.value_size
        self.ranks = (config.q_rank or 0, config.kv_rank, self.rope)

        def matrix(which: str, rows: int, columns: int, parts: tuple[int, ...], split: bool) -> torch.nn.Parameter:
            full, shape = f"{name}.{which}.weight", (rows, columns)
            spec = (
                ShardSpec.split(full, shape, 0, group.rank(), group.size()) if split else ShardSpec.whole(full, shape)
            )
            return init.matrix(replace(spec, interleaved=parts), config.matrix_std)

        def norm(which: str, features: int) -> RMSNorm:
            operations = select_operations(config.kernels, init.device)
            token_group = group if sequence else None
            return RMSNorm(
                f"{name}.{which}",
                features,
                eps=config.norm_eps,
                bias=False,
                group=token_group,
                init=init,
                operations=operations,
            )

        heads, hidden, kv_rank = config.heads, config.hidden, config.kv_rank
        query, key_value = (self.rope, self.nope), (self.nope, self.value)
        self.q_down_weight = self.q_latent_norm = None
        if config.q_rank is None:
            self.q_weight = matrix("q", heads * sum(query), hidden, query, split=True)
        else:
            self.q_down_weight = matrix("q_down", config.q_rank, hidden, (), split=False)
            self.q_latent_norm = norm("q_latent_norm", config.q_rank)
            self.q_weight = matrix("q_up", heads * sum(query), config.q_rank, query, split=True)
        self.kv_down_weight = matrix("kv_down", kv_rank + self.rope, hidden, (kv_rank, self.rope), split=False)
        self.kv_latent_norm = norm("kv_latent_norm", kv_rank)
        self.kv_up_weight = matrix("kv_up", heads * sum(key_value), kv_rank, key_value, split=True)

    def forward(self, x: Tensor, origin: Origin | None = None) -> tuple[Tensor, None, Tensor, Tensor]:
        """Project a hidden state. With the `origin` of x, x and the gathered latents are made again."""
        with made_again(x, origin):
            kv_latent, k_turning = self._down(x, self.kv_down_weight).split(self.ranks[1:], dim=-1)
            q_latent = None if self.q_down_weight is None else self._down(x, self.q_down_weight)
        latents = [self.kv_latent_norm(kv_latent), k_turning]
        if q_latent is not None and self.q_latent_norm is not None:
            latents.insert(0, self.q_latent_norm(q_latent))
        shared, of_latents = self._latents(torch.cat(latents, dim=-1), again=origin is not None)
        *q_latents, kv_latent, k_turning = shared.split(self.ranks[-len(latents) :], dim=-1)
        if q_latents:
            (q_input,), of_queries = q_latents, of_latents
        else:
            q_input, of_queries = shared_input(x, origin, self.group, self.sequence)
        with made_again(q_input, of_queries):
            q_BTHE = self.linear(q_input, self.q_weight).unflatten(-1, (-1, self.rope + self.nope))
        with made_again(kv_latent, of_latents):
            up = self.linear(kv_latent, self.kv_up_weight).unflatten(-1, (-1, self.nope + self.value))
        k_fixed, v = up.split((self.nope, self.value), dim=-1)
        k_BTHE = torch.cat((k_turning.unsqueeze(2).expand(-1, -1, k_fixed.shape[2], -1), k_fixed), dim=-1)
        return q_BTHE, None, k_BTHE, F.pad(v, (0, k_BTHE.shape[-1] - self.value))

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.linear(x, sum_gradient(weight, self.group) if self.sequence else weight)

    def _latents(self, x: Tensor, again: bool) -> tuple[Tensor, Origin | None]:
        """Return all tokens of what each rank's heads read, and their origin if they are to be gathered `again`."""
        x, origin = remember(x, x, unchanged) if again and self.sequence else (x, None)
        return shared_input(x, origin, self.group, self.sequence)
