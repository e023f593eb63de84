"""The peer of the training-step benchmark: a GPT-2 or Llama model and its training loop in plain PyTorch.

This is what one writes by hand for a single device: torch's modules, its fused attention, its fused AdamW, its
clipping. It shares no code with megalm. In bf16 the weights are bf16 copies of fp32 masters, and gradients are added
up in fp32 over the microbatches, so that the arithmetic is the same as in the step it is held against.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainShape:
    """A GPT-2 model (learned positions, LayerNorm, GELU in its tanh form, biases) or, with `llama`, one of rotary
    positions, RMSNorm and SwiGLU without biases. Embeddings are tied; every head has its own key and value.
    """

    llama: bool
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    sequence: int
    vocab: int
    norm_eps: float
    rotary_base: float

    def norm(self) -> nn.Module:
        """Return a norm over the hidden dim."""
        kind = nn.RMSNorm if self.llama else nn.LayerNorm
        return kind(self.hidden, eps=self.norm_eps)


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        hidden, bias = shape.hidden, not shape.llama
        self.heads = shape.heads
        self.llama = shape.llama
        self.attention_norm = shape.norm()
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.out = nn.Linear(hidden, hidden, bias=bias)
        self.mlp_norm = shape.norm()
        self.up = nn.Linear(hidden, shape.feed_forward * (2 if shape.llama else 1), bias=bias)
        self.down = nn.Linear(shape.feed_forward, hidden, bias=bias)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return x_BTD after this block; `rotary` are the positions' cosines and sines, each [T, E]."""
        rows, tokens, hidden = x_BTD.shape
        parts = self.qkv(self.attention_norm(x_BTD)).split(hidden, dim=-1)
        q, k, v = (part.view(rows, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).reshape(rows, tokens, hidden))
        up = self.up(self.mlp_norm(x_BTD))
        if self.llama:
            gate, value = up.chunk(2, dim=-1)
            return x_BTD + self.down(F.silu(gate) * value)
        return x_BTD + self.down(F.gelu(up, approximate="tanh"))


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Return queries or keys turned by their positions' angles, in pairs (j, j + E/2)."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE


class PlainModel(nn.Module):
    """tokens_BT (int64) -> logits_BTV."""

    cos_TE: Tensor
    sin_TE: Tensor

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.llama = shape.llama
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        if shape.llama:
            size = shape.hidden // shape.heads
            theta = shape.rotary_base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = torch.outer(torch.arange(shape.sequence, dtype=torch.float64), theta).repeat(1, 2)
            self.register_buffer("cos_TE", angles.cos().float())
            self.register_buffer("sin_TE", angles.sin().float())
        else:
            self.position = nn.Embedding(shape.sequence, shape.hidden)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.layers))
        self.final_norm = shape.norm()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits of every token."""
        x_BTD, tokens = self.embedding(tokens_BT), tokens_BT.shape[1]
        rotary = None
        if self.llama:
            rotary = self.cos_TE[:tokens], self.sin_TE[:tokens]
        else:
            x_BTD = x_BTD + self.position.weight[:tokens]
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary)
        return F.linear(self.final_norm(x_BTD), self.embedding.weight)

    @torch.no_grad()
    def read(self, weights: Mapping[str, Tensor], heads: int) -> None:
        """Copy the weights of a megalm model of the same shape, given by their logical names.

        megalm keeps query, key and value of a head side by side in the rows of qkv; here all queries come first.
        """
        own = dict(self.named_parameters())
        assert len(own) == len(weights), f"{len(own)} parameters here, {len(weights)} there"
        for name, value in weights.items():
            if ".qkv." in name:
                value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(value.shape)
            parameter = own[re.sub(r"(blocks\.\d+\.)(?:attention|mlp)\.", r"\1", name)]
            parameter.copy_(value.view_as(parameter))


class PlainLoop:
    """The training loop: gradient accumulation, clipping, AdamW; a call of `step` is one update."""

    def __init__(
        self,
        model: PlainModel,
        *,
        micro_batch: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad_norm: float | None,
    ) -> None:
        self.model = model
        self.micro_batch = micro_batch
        self.clip_grad_norm = clip_grad_norm
        self.weights = list(model.parameters())
        self.mixed = self.weights[0].dtype == torch.bfloat16
        self.masters = [w.detach().float() for w in self.weights] if self.mixed else self.weights
        groups = [
            {"params": [p for p in self.masters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.masters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def step(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Update the weights once on a global batch; return its mean loss, still on the device."""
        microbatches = len(tokens_BT) // self.micro_batch
        total = torch.zeros((), device=tokens_BT.device)
        for tokens, labels in zip(tokens_BT.split(self.micro_batch), labels_BT.split(self.micro_batch), strict=True):
            logits = self.model(tokens).flatten(0, 1).float()
            loss = F.cross_entropy(logits, labels.flatten()) / microbatches
            loss.backward()
            total += loss.detach()
            if self.mixed:
                self._accumulate()
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.masters, self.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.mixed:
            with torch.no_grad():
                for weight, master in zip(self.weights, self.masters, strict=True):
                    weight.copy_(master)
        return total

    def _accumulate(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None, "every parameter has a part in the loss"
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None


class PlainBatches:
    """Reads batches from a memory-mapped array of token ids; `starts` are the samples' first tokens, in order."""

    def __init__(
        self, path: Path, dtype: np.dtype, offset: int, starts: np.ndarray, sequence: int, device: torch.device
    ) -> None:
        self.tokens = np.memmap(path, dtype, "r", offset)
        self.starts = starts
        self.sequence = sequence
        self.device = device

    def read(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return tokens_BT and labels_BT, int64 on the device, of samples first ... first + count - 1."""
        length = self.sequence
        spans = np.stack([self.tokens[at : at + length + 1] for at in self.starts[first : first + count]])
        batch = torch.from_numpy(spans.astype(np.int64))
        parts = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        if self.device.type == "cuda":
            tokens, labels = (part.pin_memory().to(self.device, non_blocking=True) for part in parts)
            return tokens, labels
        return parts
