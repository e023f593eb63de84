"""The layers of a block as formulas over whole weights by logical name, in float64: what the layers are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalm.config.run import ModelSection
from megalm.distributed.random import key, uniform_slice
from megalm.nn.dropout import DropoutKeys

Weights = dict[str, Tensor]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """Return x W^T + b, or without b where there is none."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(x: Tensor, w: Weights, name: str, config: ModelSection) -> Tensor:
    """Return the norm over the last dim."""
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rotate(x_TE: Tensor, base: float) -> Tensor:
    """Return every row t with its pairs (j, j + E/2), taken as complex numbers, turned by t * base^(-2j/E)."""
    half = x_TE.shape[1] // 2
    angles = torch.outer(
        torch.arange(len(x_TE), dtype=torch.float64),
        base ** (-torch.arange(half, dtype=torch.float64) / half),
    )
    pairs = torch.complex(x_TE[:, :half], x_TE[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=1)


def dropout_scale(keys: DropoutKeys | None, site: str, rate: float, shape: tuple[int, ...]) -> Tensor:
    """Return the multipliers of a site for samples first_sample ..., cut from the mask of all samples before them."""
    if keys is None or rate == 0.0:
        return torch.ones(shape, dtype=torch.float64)
    whole = (keys.first_sample + shape[0], *shape[1:])
    stream = key(keys.seed, "dropout", site, keys.step)
    drawn = uniform_slice(stream, whole, [0] * len(whole), whole, torch.device("cpu"))
    return (drawn[keys.first_sample :] >= rate).double() / (1.0 - rate)


def attention(x_BTD: Tensor, w: Weights, name: str, config: ModelSection, keys: DropoutKeys | None) -> Tensor:
    """Return causal attention, one row and one head at a time."""
    rows, tokens, _ = x_BTD.shape
    size, queries = config.head_size, config.heads // config.key_value_heads
    scale = dropout_scale(keys, f"{name}.probabilities", config.dropout, (rows, config.heads, tokens, tokens))
    projected = linear(x_BTD, w, f"{name}.qkv")
    results = []
    for row in range(rows):
        heads = []
        for head in range(config.heads):
            group, place = divmod(head, queries)
            first = group * (queries + 2)
            q, k, v = (
                projected[row][:, (first + at) * size : (first + at + 1) * size] for at in (place, queries, queries + 1)
            )
            if config.position == "rotary":
                q, k = rotate(q, config.rotary_base), rotate(k, config.rotary_base)
            weights = torch.exp(q @ k.T / math.sqrt(size)) * torch.ones(tokens, tokens, dtype=torch.float64).tril()
            heads.append(weights / weights.sum(1, keepdim=True) * scale[row, head] @ v)
        results.append(torch.cat(heads, dim=1))
    return linear(torch.stack(results), w, f"{name}.out")


def mlp(x_BTD: Tensor, w: Weights, name: str, config: ModelSection) -> Tensor:
    """Return the feed-forward half."""
    if config.activation == "swiglu":
        gate, value = (
            linear(x_BTD, {key.replace(f"{name}.up", "part"): tensor[at] for key, tensor in up.items()}, "part")
            for up in [{key: tensor for key, tensor in w.items() if key.startswith(f"{name}.up")}]
            for at in (0, 1)
        )
        return linear(gate / (1.0 + torch.exp(-gate)) * value, w, f"{name}.down")
    h = linear(x_BTD, w, f"{name}.up")
    h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3)))
    return linear(h, w, f"{name}.down")


def block(x_BTD: Tensor, w: Weights, name: str, config: ModelSection, keys: DropoutKeys | None) -> Tensor:
    """Return the residual stream after a block."""
    shape = tuple(x_BTD.shape)
    attended = attention(norm(x_BTD, w, f"{name}.attention_norm", config), w, f"{name}.attention", config, keys)
    x_BTD = x_BTD + attended * dropout_scale(keys, f"{name}.attention", config.dropout, shape)
    transformed = mlp(norm(x_BTD, w, f"{name}.mlp_norm", config), w, f"{name}.mlp", config)
    return x_BTD + transformed * dropout_scale(keys, f"{name}.mlp", config.dropout, shape)
