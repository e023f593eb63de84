"""The definition of correctness: the model and one training step in plain PyTorch, on one process.

Shares no code with megalm but the recipe (`megalm.config`): random numbers, initial weights, dropout masks,
loss, clipping and learning rate are written here, the model in `reference_model` and what torch's optimizers lack in
`reference_optimizers`, once more, as formulas. Nothing is split, fused or recomputed, and the whole global batch is one
batch. Every layout of megalm must give these losses and these gradients.

Shapes: G sequences of the global batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from megalm.config.run import RunConfig
from tests.parity import reference_model
from tests.parity.reference_experts import Routing
from tests.parity.reference_optimizers import Lion, Muon, matrix_rows

TABLES = ("relative.weight", "router.weight")
"""Matrices of which one side is a number of scores, not a width."""

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


def truncated_normal(parts: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers within [-3, 3], float64: the quantile at each word's uniform number."""
    count = math.prod(shape)
    u = torch.from_numpy((random_words(parts, count).reshape(-1)[:count].astype(np.float64) + 0.5) * 2.0**-32)
    lowest = 0.5 * (1.0 + math.erf(-3.0 / math.sqrt(2.0)))
    return torch.special.ndtri(lowest + u * (1.0 - 2.0 * lowest)).view(shape)


def dropped(x: Tensor, rate: float, parts: tuple[object, ...], first: int, global_batch: int) -> Tensor:
    """Return x with a share `rate` of its elements dropped, the others scaled so that the expectation stays.

    The mask is drawn for a whole global batch, of which x is the rows from `first` on.
    """
    u = uniform(parts, (global_batch, *x.shape[1:]))[first : first + len(x)]
    return x * (u >= rate) / (1.0 - rate)


# ---------------------------------------- parameters


def parameter_shapes(config: RunConfig, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every logical tensor of the model, by name."""
    return reference_model.parameter_shapes(config.model, vocab)


def initial_parameter(config: RunConfig, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a logical tensor's initial value, float64."""
    model = config.model
    if name.endswith((".bias", ".sinks")):
        return torch.zeros(shape, dtype=torch.float64)
    if len(shape) == 1:  # the weight of a norm
        around_zero = model.norm == "rmsnorm_zero_centered" and not name.endswith(reference_model.HEADS_NORMS)
        return torch.full(shape, 0.0 if around_zero else 1.0, dtype=torch.float64)
    std = model.init_std
    if name not in ("embedding.weight", "head.weight", "position.weight") and not name.endswith(TABLES):
        if model.init == "xavier":
            std = math.sqrt(2.0 / (shape[-1] + shape[-2]))
        if model.init == "he":
            std = math.sqrt(2.0 / shape[-1])
        if model.mup_base is not None and model.init in ("normal", "truncated_normal"):
            std *= math.sqrt(model.mup_base / model.hidden)
        if name.endswith(("attention.out.weight", ".down.weight")) and model.init_depth_scaled:
            std /= math.sqrt(2 * model.layers)  # 2L residual branches add up to the same variance
    draw = truncated_normal if model.init == "truncated_normal" else normal
    return std * draw((config.seed, "init", name), shape)


# ---------------------------------------- training step


def learning_rate(config: RunConfig, step: int) -> float:
    """Return the rate of `step` (from 0): linear warm-up, then constant or half a cosine to the minimum."""
    schedule, lr = config.lr_schedule, config.optim.lr
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return lr
    assert schedule.kind == "cosine", "of the other shapes the layout knows nothing"
    lowest = lr * schedule.min_lr_ratio
    progress = (step - schedule.warmup_steps) / (config.train.steps - schedule.warmup_steps)
    return lowest + (lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Reference:
    """The model of `config` with a vocabulary of `vocab` entries, and its optimizer.

    `dtype` float64 or float32 computes everything so. bfloat16 computes with bfloat16 copies of fp32 master
    weights (softmax, norms and loss in fp32) and adds the gradients of the microbatches up in fp32; so does float16,
    under the loss scale that a run starts with.
    `parameters` holds the weights by logical name; it may be written to between steps with `copy_`.
    """

    def __init__(self, config: RunConfig, vocab: int, dtype: torch.dtype) -> None:
        self.config = config
        self.vocab = vocab
        self.dtype = dtype
        self.wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        self.parameters = {
            name: initial_parameter(config, name, shape).to(dtype).to(self.wide)
            for name, shape in parameter_shapes(config, vocab).items()
        }
        self.averages: dict[str, Tensor] = {}
        self.routing = Routing()
        if config.model.router_bias_rate is not None:
            routers = [name.removesuffix(".weight") for name in self.parameters if name.endswith(".router.weight")]
            zero = torch.zeros(config.model.experts or 0, dtype=self.wide)
            self.routing.biases = {name: zero.clone() for name in routers}
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = []
        for name, parameter in self.trained().items():
            decay = optim.weight_decay if name.endswith(".weight") and parameter.dim() >= 2 else 0.0
            rule = next((rule for rule in optim.rules if fnmatch.fnmatchcase(name, rule.match)), None)
            if rule is not None and rule.weight_decay is not None:
                decay = rule.weight_decay
            factor = 1.0 if rule is None else rule.lr
            model = self.config.model
            matrix = name.endswith(".weight") and not name.endswith(TABLES) and parameter.dim() >= 2
            wide = name.startswith("blocks.") and matrix
            by_muon = optim.kind == "muon" and wide and (rule is None or rule.muon)
            if model.mup_base is not None and wide and not by_muon:
                factor *= model.mup_base / model.hidden
                decay *= model.hidden / model.mup_base
            if optim.kind == "muon" and not by_muon and optim.adamw_lr is not None:
                factor *= optim.adamw_lr / optim.lr
            rows = matrix_rows(self.config.model, name, parameter) if by_muon else None
            groups.append({"params": [parameter], "weight_decay": decay, "factor": factor, "rows": rows})
        if optim.kind == "sgd":
            return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)
        if optim.kind == "rmsprop":
            return torch.optim.RMSprop(groups, optim.lr, alpha=optim.alpha, eps=optim.eps, momentum=optim.momentum)
        if optim.kind == "adagrad":
            return torch.optim.Adagrad(groups, lr=optim.lr, eps=optim.eps)
        if optim.kind == "adafactor":
            return torch.optim.Adafactor(groups, lr=optim.lr, eps=(1e-15, 1e-3))
        if optim.kind == "muon":
            own = {"momentum": optim.muon_momentum, "nesterov": optim.muon_nesterov, "steps": optim.muon_ns_steps}
            own |= {"scale": optim.muon_adjust_lr_fn, "betas": optim.betas, "eps": optim.eps}
            return Muon(groups, {"lr": optim.lr, **own})
        if optim.kind == "lion":
            return Lion(groups, {"lr": optim.lr, "betas": optim.betas})
        kind = torch.optim.Adam if optim.kind == "adam" else torch.optim.AdamW
        return kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that no rule freezes; the first rule that matches a name counts."""
        rules = self.config.optim.rules

        def frozen(name: str) -> bool:
            return next((rule.freeze for rule in rules if fnmatch.fnmatchcase(name, rule.match)), False)

        return {name: parameter for name, parameter in self.parameters.items() if not frozen(name)}

    def train_step(self, batch: Batch, step: int) -> tuple[float, float]:
        """Update the parameters once; return the loss and the norm of the gradients before clipping."""
        loss, gradients = self.gradients(batch, step)
        for name, gradient in gradients.items():
            if self.config.optim.centralize and gradient.dim() > 1:
                gradients[name] = gradient - gradient.mean(dim=-1, keepdim=True)
            if self.config.train.clip_grad_value is not None:
                limit = self.config.train.clip_grad_value
                gradients[name] = gradients[name].clamp(-limit, limit)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        limit = self.config.train.clip_grad_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for name, parameter in self.trained().items():
            parameter.grad = gradients[name] * factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(self.config, step)
        self.optimizer.step()
        for name, bias in self.routing.biases.items():
            loads, rate = self.routing.loads[name], self.config.model.router_bias_rate or 0.0
            for e, load in enumerate(loads) if f"{name}.weight" in self.trained() else ():
                mean = sum(loads) / len(loads)
                bias[e] += rate * ((load < mean) - (load > mean))
        decay = self.config.optim.ema_decay
        for name, parameter in self.trained().items() if decay is not None else ():
            previous = self.averages.get(name, parameter)
            self.averages[name] = decay * previous + (1.0 - decay) * parameter
        return loss, norm

    def gradients(self, batch: Batch, step: int) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and its gradient with respect to every parameter, before clipping.

        The loss is the sum over the valid tokens of the global batch over their number. The gradient is also that of
        the losses of the routers, which are not part of it.
        """
        tokens, labels, mask = batch
        valid = mask.sum().to(self.wide)
        total = torch.zeros((), dtype=self.wide)
        sums = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.routing.loads = {}
        # Only 16 bits round so coarsely that the split into microbatches is part of the definition.
        rows = self.config.train.micro_batch if self.dtype is not self.wide else len(tokens)
        for first in range(0, len(tokens), rows):
            part = slice(first, first + rows)
            weights = {name: p.to(self.dtype).detach().requires_grad_() for name, p in self.parameters.items()}
            padding = ~mask[part] if self.config.data.rows == "documents" else None
            self.routing.mask, self.routing.balance, self.routing.z = mask[part], [], []
            formulas = self.formulas(weights, step, first, len(tokens))
            hidden = formulas.hidden(tokens[part], padding)
            loss = self.loss_sum(formulas.head(hidden), labels[part], mask[part])
            for k, logits in enumerate(formulas.logits_ahead(hidden, tokens[part]), start=1):
                share = self.config.loss.mtp / self.config.model.mtp_depth
                loss = loss + share * self.loss_sum(logits[:, :-k], labels[part, k:], mask[part, k:])
            loss = loss / valid
            scale = self.config.loss_scale.initial if self.dtype is torch.float16 else 1.0
            uneven = sum(self.routing.balance) * self.config.loss.load_balance / valid
            uneven = uneven + sum(self.routing.z) * self.config.loss.router_z / valid
            gradients = torch.autograd.grad((loss + uneven) * scale, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += gradient.to(self.wide) / scale
            total += loss.detach()
        return float(total), {name: sums[name] for name in self.trained()}

    # ---------------------------------------- the model

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the summed cross-entropy of the valid tokens, with label smoothing and z-loss."""
        smoothing = self.config.loss.label_smoothing
        log_z = torch.logsumexp(logits.to(self.wide), dim=-1)
        log_p = torch.log_softmax(logits.to(self.wide), dim=-1)  # [rows,T,V]
        target = labels.masked_fill(~mask, 0).unsqueeze(-1)
        nll = -log_p.gather(-1, target).squeeze(-1)
        losses = (1.0 - smoothing) * nll - smoothing * log_p.mean(dim=-1) + self.config.loss.z_loss * log_z**2
        return (losses * mask).sum()

    def logits(
        self,
        tokens: Tensor,
        weights: dict[str, Tensor] | None = None,
        step: int | None = None,
        first: int = 0,
        global_batch: int = 0,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [rows,T,V] of `tokens` [rows,T], which start at row `first` of the global batch.

        No other token sees one that is `padding`, bool [rows,T].

        Without `weights` the parameters are used; without `step` there is no dropout (evaluation).
        """
        return self.formulas(weights, step, first, global_batch).logits(tokens, padding)

    def formulas(
        self, weights: dict[str, Tensor] | None, step: int | None, first: int, global_batch: int
    ) -> reference_model.Formulas:
        """Return the model of `weights` for rows from `first` on of the global batch of `step`."""
        w = weights or {name: p.to(self.dtype) for name, p in self.parameters.items()}

        def drop(x: Tensor, site: str, rate: float, dims: int) -> Tensor:
            if step is None or rate == 0.0:
                return x
            mask = torch.ones(x.shape[:dims], dtype=x.dtype)
            mask = dropped(mask, rate, (self.config.seed, "dropout", site, step), first, global_batch)
            return x * mask.view(*mask.shape, *(1,) * (x.dim() - dims))

        return reference_model.Formulas(self.config.model, w, self.wide, drop, self.routing)
