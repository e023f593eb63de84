"""The definition of correctness: the model and one training step in plain PyTorch, on one process.

Shares no code with megalm but the recipe (`megalm.config`): random numbers, initial weights, dropout masks,
model, loss, clipping and learning rate are written here once more, as formulas. Nothing is split, fused or
recomputed, and the whole global batch is one batch. Every layout of megalm must give these losses and these
gradients.

Shapes: G sequences of the global batch, T tokens, D hidden, H query heads, K key-value heads, R = H/K query
heads of a key-value head, E head size, F feed-forward, V vocabulary. A linear weight is [out, in].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megalm.config.run import RunConfig

Dropout = Callable[[Tensor, str], Tensor]
"""(x, site) -> x with elements dropped."""

Batch = tuple[Tensor, Tensor, Tensor]
"""tokens [G,T] int64, labels [G,T] int64, mask [G,T] bool (False: the token does not count in the loss)."""


# ---------------------------------------- random numbers


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Return the four 32-bit words, uint64, of Philox4x32-10. Source: Salmon et al. 2011, section 3.3."""
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0  # two 32-bit factors: fits in 64 bits
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low32,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(parts: tuple[object, ...], count: int) -> np.ndarray:
    """Return the words of elements 0..count-1 of the tensor that `parts` names: [ceil(count/4), 4] uint64.

    Element n is word n % 4 of counter n // 4; the key is the BLAKE2b hash of the names.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    block = np.arange(-(-count // 4), dtype=np.uint64)
    zero = np.zeros_like(block)
    counter = (block & np.uint64(0xFFFFFFFF), block >> np.uint64(32), zero, zero)
    return np.stack(philox(counter, (key & 0xFFFFFFFF, key >> 32)), axis=1)


def uniform(parts: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
    """Return numbers in [0, 1), float64: the top 24 bits of each word."""
    count = math.prod(shape)
    words = random_words(parts, count).reshape(-1)[:count]
    return torch.from_numpy((words >> np.uint64(8)).astype(np.float64) * 2.0**-24).view(shape)


def normal(parts: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers, float64: Box-Muller of words (0, 1) and of words (2, 3)."""
    count = math.prod(shape)
    u = (random_words(parts, count).astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(u[:, 0::2]))
    angle = 2.0 * np.pi * u[:, 1::2]
    z = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=2)  # [blocks, pair, (cos, sin)]
    return torch.from_numpy(z.reshape(-1)[:count]).view(shape)


def dropped(x: Tensor, rate: float, parts: tuple[object, ...], first: int, global_batch: int) -> Tensor:
    """Return x with a share `rate` of its elements dropped, the others scaled so that the expectation stays.

    The mask is drawn for a whole global batch, of which x is the rows from `first` on.
    """
    u = uniform(parts, (global_batch, *x.shape[1:]))[first : first + len(x)]
    return x * (u >= rate) / (1.0 - rate)


# ---------------------------------------- parameters


def parameter_shapes(config: RunConfig, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every logical tensor of the model, by name."""
    model = config.model
    width, feed_forward = model.hidden, model.feed_forward
    attended = model.heads * model.head_size
    qkv = attended + 2 * model.key_value_heads * model.head_size
    up = (2, feed_forward) if model.activation == "swiglu" else (feed_forward,)
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: tuple[int, ...], into: int) -> None:
        shapes[f"{name}.weight"] = (*out, into)
        if model.bias:
            shapes[f"{name}.bias"] = out

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (width,)
        if model.norm == "layernorm" and model.bias:
            shapes[f"{name}.bias"] = (width,)

    shapes["embedding.weight"] = (vocab, width)
    if model.position == "learned":
        shapes["position.weight"] = (model.sequence, width)
    for i in range(model.layers):
        norm(f"blocks.{i}.attention_norm")
        linear(f"blocks.{i}.attention.qkv", (qkv,), width)
        linear(f"blocks.{i}.attention.out", (width,), attended)
        norm(f"blocks.{i}.mlp_norm")
        linear(f"blocks.{i}.mlp.up", up, width)
        linear(f"blocks.{i}.mlp.down", (width,), feed_forward)
    norm("final_norm")
    if not model.tie_embeddings:
        shapes["head.weight"] = (vocab, width)
    return shapes


def initial_parameter(config: RunConfig, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a logical tensor's initial value, float64: GPT-2's."""
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.float64)
    if len(shape) == 1:  # the weight of a norm
        return torch.ones(shape, dtype=torch.float64)
    std = config.model.init_std
    if name.endswith(("attention.out.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.model.layers)  # 2L residual branches add up to the same variance
    return std * normal((config.seed, "init", name), shape)


# ---------------------------------------- training step


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the rate of `step` (from 0): linear warm-up, then constant or half a cosine to the minimum."""
    schedule, lr = config.lr_schedule, config.optim.lr
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return lr
    lowest = lr * schedule.min_lr_ratio
    progress = (step - schedule.warmup_steps) / (config.train.steps - schedule.warmup_steps)
    return lowest + (lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Reference:
    """The model of `config` with a vocabulary of `vocab` entries, and its optimizer.

    `dtype` float64 or float32 computes everything so. bfloat16 computes with bfloat16 copies of fp32 master
    weights (softmax, norms and loss in fp32) and adds the gradients of the microbatches up in fp32.
    `parameters` holds the weights by logical name; it may be written to between steps with `copy_`.
    """

    def __init__(self, config: RunConfig, vocab: int, dtype: torch.dtype) -> None:
        self.config = config
        self.vocab = vocab
        self.dtype = dtype
        self.wide = torch.float32 if dtype is torch.bfloat16 else dtype
        self.parameters = {
            name: initial_parameter(config, name, shape).to(dtype).to(self.wide)
            for name, shape in parameter_shapes(config, vocab).items()
        }
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        decayed = {name for name, p in self.parameters.items() if name.endswith(".weight") and p.dim() >= 2}
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if name in decayed],
                "weight_decay": optim.weight_decay,
            },
            {
                "params": [p for name, p in self.parameters.items() if name not in decayed],
                "weight_decay": 0.0,
            },
        ]
        if optim.kind == "sgd":
            return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def train_step(self, batch: Batch, step: int) -> tuple[float, float]:
        """Update the parameters once; return the loss and the norm of the gradients before clipping."""
        loss, gradients = self.gradients(batch, step)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        limit = self.config.train.clip_grad_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name] * factor
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.step()
        return loss, norm

    def gradients(self, batch: Batch, step: int) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and its gradient with respect to every parameter, before clipping.

        The loss is the sum over the valid tokens of the global batch over their number.
        """
        tokens, labels, mask = batch
        valid = mask.sum().to(self.wide)
        total = torch.zeros((), dtype=self.wide)
        sums = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        # Only bf16 rounds so coarsely that the split into microbatches is part of the definition.
        rows = self.config.train.micro_batch if self.dtype is torch.bfloat16 else len(tokens)
        for first in range(0, len(tokens), rows):
            part = slice(first, first + rows)
            weights = {name: p.to(self.dtype).detach().requires_grad_() for name, p in self.parameters.items()}
            logits = self.logits(tokens[part], weights, step, first, len(tokens))
            loss = self.loss_sum(logits, labels[part], mask[part]) / valid
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                sums[name] += gradient.to(self.wide)
            total += loss.detach()
        return float(total), sums

    # ---------------------------------------- the model

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the summed cross-entropy of the valid tokens, with label smoothing."""
        smoothing = self.config.loss.label_smoothing
        log_p = torch.log_softmax(logits.to(self.wide), dim=-1)  # [rows,T,V]
        target = labels.masked_fill(~mask, 0).unsqueeze(-1)
        nll = -log_p.gather(-1, target).squeeze(-1)
        losses = (1.0 - smoothing) * nll - smoothing * log_p.mean(dim=-1)
        return (losses * mask).sum()

    def logits(
        self,
        tokens: Tensor,
        weights: dict[str, Tensor] | None = None,
        step: int | None = None,
        first: int = 0,
        global_batch: int = 0,
    ) -> Tensor:
        """Return the logits [rows,T,V] of `tokens` [rows,T], which start at row `first` of the global batch.

        Without `weights` the parameters are used; without `step` there is no dropout (evaluation).
        """
        model = self.config.model
        w = weights or {name: p.to(self.dtype) for name, p in self.parameters.items()}
        length = tokens.shape[1]

        def dropout(x: Tensor, site: str) -> Tensor:
            if step is None or model.dropout == 0.0:
                return x
            return dropped(x, model.dropout, (self.config.seed, "dropout", site, step), first, global_batch)

        x = w["embedding.weight"][tokens]
        if model.position == "learned":
            x = x + w["position.weight"][:length]
        x = dropout(x, "embedding")
        for i in range(model.layers):
            name = f"blocks.{i}"
            h = self._norm(x, w, f"{name}.attention_norm")
            x = x + dropout(self._attention(h, w, f"{name}.attention", dropout), f"{name}.attention")
            h = self._norm(x, w, f"{name}.mlp_norm")
            x = x + dropout(self._mlp(h, w, f"{name}.mlp"), f"{name}.mlp")
        x = self._norm(x, w, "final_norm")
        return x @ w["embedding.weight" if model.tie_embeddings else "head.weight"].T

    def _norm(self, x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        wide = x.to(self.wide)
        if self.config.model.norm == "layernorm":
            wide = wide - wide.mean(dim=-1, keepdim=True)
        wide = wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + self.config.model.norm_eps)
        wide = wide * w[f"{name}.weight"].to(self.wide)
        if f"{name}.bias" in w:
            wide = wide + w[f"{name}.bias"].to(self.wide)
        return wide.to(x.dtype)

    def _attention(self, x: Tensor, w: dict[str, Tensor], name: str, dropout: Dropout) -> Tensor:
        """Causal attention; query head h reads key-value head h // R."""
        model = self.config.model
        rows, length, _ = x.shape
        groups, size = model.key_value_heads, model.head_size
        each = model.heads // groups
        # The rows of qkv go by key-value head: its R query heads, its key, its value.
        qkv = _linear(x, w, f"{name}.qkv").view(rows, length, groups, each + 2, size)
        q = qkv[..., :each, :].permute(0, 2, 3, 1, 4)  # [rows,K,R,T,E]
        k = qkv[..., each, :].permute(0, 2, 1, 3).unsqueeze(2)  # [rows,K,1,T,E]
        v = qkv[..., each + 1, :].permute(0, 2, 1, 3).unsqueeze(2)
        if model.position == "rotary":
            q, k = _rotate(q, model.rotary_base), _rotate(k, model.rotary_base)
        scores = (q @ k.transpose(-1, -2)).to(self.wide) / math.sqrt(size)  # [rows,K,R,T,T]
        future = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
        probabilities = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1).to(x.dtype)
        probabilities = probabilities.reshape(rows, model.heads, length, length)  # head h = group * R + r
        probabilities = dropout(probabilities, f"{name}.probabilities")
        mixed = probabilities.view(rows, groups, each, length, length) @ v  # [rows,K,R,T,E]
        mixed = mixed.permute(0, 3, 1, 2, 4).reshape(rows, length, model.heads * size)
        return _linear(mixed, w, f"{name}.out")

    def _mlp(self, x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        if self.config.model.activation == "swiglu":
            gate, value = _linear(x, w, f"{name}.up").unbind(dim=-2)  # [rows,T,2,F]; 0 the gate, 1 the value
            return _linear(gate * torch.sigmoid(gate) * value, w, f"{name}.down")
        h = _linear(x, w, f"{name}.up")
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))
        return _linear(h, w, f"{name}.down")


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """Return x W^T + b; a weight [2,F,D] gives [rows,T,2,F]."""
    weight = w[f"{name}.weight"]
    y = (x @ weight.reshape(-1, weight.shape[-1]).T).view(*x.shape[:-1], *weight.shape[:-1])
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _rotate(x: Tensor, base: float) -> Tensor:
    """Turn pair (j, j + E/2) of position t (dim -2) by the angle t * base^(-2j/E). Source: Su et al. 2021."""
    length, size = x.shape[-2:]
    theta = base ** (-2.0 * torch.arange(size // 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), theta)  # [T,E/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
