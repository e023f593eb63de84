"""The router of a mixture of experts: which experts a token goes to, with which weights, and what keeps loads even.

Scores are computed in fp32 or wider. Everything that is summed is summed over the tokens of one row, so that it does
not depend on microbatches and layouts: the capacity of an expert, and the loss of uneven loads. What a step's routers
saw is noted in backward passes, which recomputation does not repeat.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.distributed.collectives import copy_to_group, gather_sequence, reduce_from_group, sum_gradient
from megalm.distributed.places import select, whole
from megalm.distributed.sharding import ShardSpec
from megalm.nn.context import Context
from megalm.tensor_parallel.initialize import Initializer

SUMS = ("load_balance", "router_z", "valid", "dropped")
"""What is noted of a step beside the choices of each expert; see `Router.seen`."""


class Router(nn.Module):
    """Choose experts for each token: x_BTD (x_BTtD with `sequence`) -> (gates_BTk, chosen_BTk), of all tokens.

    A token goes to the k experts with the highest scores, to which `bias` is added for the choice only; its gates are
    those scores, divided by their sum where there are several. A choice beyond an expert's capacity is number E, no
    expert. Every rank of `group`, the tensor group, must call, and of those of `context`, which have tokens of the same
    rows (None: this one has whole rows).

    After `begin` and until `end`, forward passes with gradients add to the gates' gradients those of two losses, as
    sums over rows and tokens:
    load balance  n sum_i f_i P_i, with f_i = E/(k n) times the choices of expert i, and P_i the mean of its share of
                  the scores, over the n valid tokens of a row           (DeepSeek-AI 2024, equations 17 to 20)
    router z      the square of logsumexp of the logits of each valid token             (Zoph et al. 2022, equation 5)
    """

    def __init__(
        self,
        name: str,
        config: ModelSection,
        *,
        group: dist.ProcessGroup,
        init: Initializer,
        sequence: bool,
        context: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        assert config.experts is not None
        self.experts, self.chosen = config.experts, config.experts_per_token
        self.capacity_factor, self.sigmoid = config.capacity_factor, config.router_score == "sigmoid"
        self.row_tokens = config.sequence
        self.group, self.sequence, self.context = group, sequence, context
        self.weight = init.table(ShardSpec.whole(f"{name}.weight", (self.experts, config.hidden)), config.init_std)
        bias = None
        if config.router_bias_rate is not None:
            wide = torch.promote_types(init.dtype, torch.float32)
            bias = torch.zeros(self.experts, dtype=wide, device=init.device)
            bias.shard = ShardSpec.whole(f"{name}.bias", (self.experts,))  # type: ignore[attr-defined]
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self._factors: Tensor | None = None
        self.seen = torch.zeros(self.experts + len(SUMS), dtype=torch.float64, device=init.device)
        """Choices of each expert, dropped ones too, and SUMS, over the valid tokens of a step that this rank ran."""

    def begin(self, load_balance: Tensor, router_z: Tensor) -> None:
        """Begin a step, whose gradients have so many times those of the two losses."""
        self._factors = torch.stack((load_balance, router_z))
        self.seen.zero_()

    def end(self) -> None:
        """Add no losses from here on."""
        self._factors = None

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return gates and choices."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = sum_gradient(self.weight, self.group) if self.sequence else self.weight
        logits = F.linear(x.to(wide), weight.to(wide))
        scores = torch.sigmoid(logits) if self.sigmoid else torch.softmax(logits, dim=-1)
        own_BTk = self._choose(scores.detach())
        gates = scores.gather(-1, own_BTk)
        if self.chosen > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        chosen_BTk = gather_sequence(own_BTk, self.group) if self.sequence else own_BTk
        fits = whole_fits = None
        if self.capacity_factor is not None:
            whole_rows = chosen_BTk if self.context is None else self.context.whole_rows(chosen_BTk)
            # Without a loss mask a row may be the begin of one, as in generation: whole rows have the capacity.
            tokens = context.tokens if context.loss_mask_BT is not None else self.row_tokens
            whole_fits = within_capacity(whole_rows, self.experts, self.capacity_factor, tokens)
            places = whole(context.tokens) if self.context is None else self.context.places(context.tokens)
            fits = select(whole_fits, places)
        if self._factors is not None and torch.is_grad_enabled():
            gates = self._with_losses(gates, logits, scores, own_BTk, whole_fits, context)
        gates_BTk = gather_sequence(gates, self.group) if self.sequence else copy_to_group(gates, self.group)
        return gates_BTk, chosen_BTk if fits is None else chosen_BTk.masked_fill(~fits, self.experts)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the experts of each token."""
        ranked = scores if self.bias is None else scores + self.bias
        return ranked.topk(self.chosen, dim=-1).indices

    def _with_losses(
        self, gates: Tensor, logits: Tensor, scores: Tensor, own_BTk: Tensor, fits: Tensor | None, context: Context
    ) -> Tensor:
        """Return the gates, in whose backward pass the losses' gradients are added and what was seen is noted."""
        assert context.loss_mask_BT is not None and self._factors is not None, "training has a loss mask"
        whole_BT = context.loss_mask_BT
        valid_BT1 = select(whole_BT, context.held)[..., None].to(scores.dtype)
        shares = scores / scores.sum(dim=-1, keepdim=True) if self.sigmoid else scores
        choices = torch.zeros_like(scores).scatter_(-1, own_BTk, 1.0)
        z = torch.logsumexp(logits, dim=-1, keepdim=True).square()
        # Of each row: the sums of the shares, of z, of the choices, and the number of its tokens.
        sums_BX = (torch.cat((shares, z, choices, torch.ones_like(z)), dim=-1) * valid_BT1).sum(dim=1)
        if self.sequence:
            sums_BX = reduce_from_group(sums_BX, self.group)
        if self.context is not None:
            sums_BX = reduce_from_group(sums_BX, self.context.group)
        shares_BE, z_B, choices_BE, valid_B = sums_BX.split((self.experts, 1, self.experts, 1), dim=-1)
        uneven_B = (shares_BE * choices_BE.detach()).sum(dim=-1) / valid_B[:, 0].detach().clamp_min(1.0)
        losses = torch.stack((uneven_B.sum() * (self.experts / self.chosen), z_B.sum()))
        dropped = gates.new_zeros(()) if fits is None else (~fits & whole_BT[..., None]).sum()
        noted = torch.cat(
            (choices_BE.sum(dim=0), losses, torch.stack((valid_B.sum(), dropped.to(valid_B.dtype))))
        ).detach()
        attached: Tensor = _Attach.apply(gates, (losses * self._factors).sum(), noted, self.seen)
        return attached


class _Attach(torch.autograd.Function):
    """Gates as they are; in the backward pass the loss has the gradient 1, and what was noted is added to `seen`."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, loss: Tensor, noted: Tensor, seen: Tensor) -> Tensor:
        ctx.save_for_backward(noted)
        ctx.seen, ctx.dtype = seen, loss.dtype
        return gates.view_as(gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (noted,) = ctx.saved_tensors
        ctx.seen += noted
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device), None, None


def capacity(factor: float, row_tokens: int, each: int, experts: int) -> int:
    """Return how many of a row's choices an expert takes."""
    return math.ceil(factor * row_tokens * each / experts)


def within_capacity(chosen_BTk: Tensor, experts: int, factor: float, row_tokens: int | None = None) -> Tensor:
    """Return which choices fit, bool [B, T, k]: the first ones of a row, ceil(factor n k / experts) for each expert.

    n is the number of tokens in a row, `row_tokens`, or T. Whether a token's do does not depend on those behind it.
    """
    rows, tokens, each = chosen_BTk.shape
    choices = tokens * each
    most = capacity(factor, row_tokens or tokens, each, experts)
    ordered_BN, order_BN = chosen_BTk.flatten(1).sort(dim=1, stable=True)
    counts_BE = torch.zeros(rows, experts, dtype=torch.int64, device=chosen_BTk.device)
    counts_BE.scatter_add_(1, ordered_BN, torch.ones_like(ordered_BN))
    first_BE = counts_BE.cumsum(dim=1) - counts_BE
    place_BN = torch.arange(choices, device=chosen_BTk.device) - first_BE.gather(1, ordered_BN)
    fits_BN = torch.empty_like(ordered_BN, dtype=torch.bool).scatter_(1, order_BN, place_BN < most)
    return fits_BN.view_as(chosen_BTk)
