"""The model of the reference: every choice of a recipe's `model` section as a formula over whole weights by name.

Shares no code with megalm but the recipe. Shapes: rows of T tokens, D hidden, H query heads, K key-value heads,
R = H/K query heads of a key-value head, E head size, F feed-forward, V vocabulary. A linear weight is [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from tests.parity import reference_experts
from tests.parity.reference_experts import Routing, mixture
from tests.parity.reference_latent import latent_heads, latent_shapes, latent_sizes
from tests.parity.reference_masks import visible

Weights = dict[str, Tensor]
HEADS_NORMS = ("q_norm.weight", "k_norm.weight", "latent_norm.weight")
"""The norms of heads and latents, which are RMSNorms whatever the recipe's norm is."""
Drop = Callable[[Tensor, str, float, int], Tensor]
"""(x, site, rate, dims) -> x with elements dropped; the mask has the first `dims` dims of x."""


def parameter_shapes(model: ModelSection, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every logical tensor of the model, by name."""
    width, feed_forward, size = model.hidden, model.feed_forward, model.head_size
    heads, groups = model.heads, model.key_value_heads
    queries = heads * (2 if model.attention_gate else 1)
    up = (2, feed_forward) if model.activation in ("swiglu", "geglu") else (feed_forward,)
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: tuple[int, ...], into: int, bias: bool = model.bias) -> None:
        shapes[f"{name}.weight"] = (*out, into)
        if bias:
            shapes[f"{name}.bias"] = out

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (width,)
        if model.norm == "layernorm" and model.bias:
            shapes[f"{name}.bias"] = (width,)

    shapes["embedding.weight"] = (vocab, width)
    if model.position == "learned":
        shapes["position.weight"] = (model.sequence, width)
    if model.embedding_norm:
        norm("embedding_norm")
    qkv_bias = model.bias if model.qkv_bias is None else model.qkv_bias
    out_bias = model.bias if model.out_bias is None else model.out_bias
    for i in range(model.layers + model.mtp_depth):
        attention = f"blocks.{i}.attention"
        norm(f"{attention}_norm")
        if model.kv_rank is not None:
            shapes |= latent_shapes(model, attention)
        elif groups == 1 and heads > 1:
            linear(f"{attention}.q", (2, heads * size) if model.attention_gate else (heads * size,), width, qkv_bias)
            linear(f"{attention}.kv", (2 * size,), width, qkv_bias)
        else:
            linear(f"{attention}.qkv", ((queries + 2 * groups) * size,), width, qkv_bias)
        if model.position == "t5" and _knows_positions(model, i):
            shapes[f"{attention}.relative.weight"] = (heads, model.relative_buckets)
        if model.qk_norm:
            shapes[f"{attention}.q_norm.weight"] = shapes[f"{attention}.k_norm.weight"] = (size,)
        if model.attention_sinks:
            shapes[f"{attention}.sinks"] = (heads,)
        values = heads * (size if model.kv_rank is None else latent_sizes(model)[2])
        linear(f"{attention}.out", (width,), values, out_bias)
        norm(f"blocks.{i}.mlp_norm")
        if model.experts is not None and i >= model.dense_layers:
            shapes |= reference_experts.shapes(model, f"blocks.{i}.mlp")
            if model.shared_experts:
                shared = model.shared_experts * model.expert_features
                linear(f"blocks.{i}.mlp.shared.up", (*up[:-1], shared), width)
                linear(f"blocks.{i}.mlp.shared.down", (width,), shared)
        else:
            linear(f"blocks.{i}.mlp.up", up, width)
            linear(f"blocks.{i}.mlp.down", (width,), feed_forward)
        if model.norm_place == "sandwich":
            norm(f"{attention}_out_norm")
            norm(f"blocks.{i}.mlp_out_norm")
    for i in range(model.layers, model.layers + model.mtp_depth):
        shapes[f"blocks.{i}.mtp.project.weight"] = (width, 2 * width)
        for which in ("hidden", "embedding", *(("final",) if model.norm_place != "post" else ())):
            norm(f"blocks.{i}.mtp.{which}_norm")
    if model.norm_place != "post":
        norm("final_norm")
    if not model.tie_embeddings:
        shapes["head.weight"] = (vocab, width)
    return shapes


def _knows_positions(model: ModelSection, layer: int) -> bool:
    return model.nope_every is None or (layer + 1) % model.nope_every > 0


class Formulas:
    """The forward pass; `wide` is the dtype of norms, scores and loss."""

    def __init__(
        self, model: ModelSection, w: Weights, wide: torch.dtype, drop: Drop, routing: Routing | None = None
    ) -> None:
        self.model, self.w, self.wide, self.drop = model, w, wide, drop
        self.routing = routing or Routing()
        self.padding: Tensor | None = None

    def logits(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return the logits [rows,T,V] of tokens [rows,T]; those that are `padding`, bool [rows,T], no other sees."""
        return self.head(self.hidden(tokens, padding))

    def hidden(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Return what the model gives its head."""
        model, w = self.model, self.w
        self.padding = padding
        length = tokens.shape[1]
        x = w["embedding.weight"][tokens] * model.embedding_scale
        if model.position == "learned":
            x = x + w["position.weight"][:length]
        if model.position == "sinusoidal":
            x = x + sinusoids(length, model.hidden).to(x.dtype)
        if model.embedding_norm:
            x = self.norm(x, "embedding_norm")
        x = self.drop(x, "embedding", model.dropout, x.dim())
        for layer in range(model.layers):
            x = self.block(x, layer, tokens)
        return x if model.norm_place == "post" else self.norm(x, "final_norm")

    def logits_ahead(self, x: Tensor, tokens: Tensor) -> list[Tensor]:
        """Return for k = 1, 2, ... what is predicted at i of token i + k + 1, from what the model gives its head.

        Where no token i + k is in the row, as at its end, any may stand in, as no other sees it: here the last. Routers
        count the tokens whose label counts at this depth. Source: DeepSeek-V3, 2024, section 2.2.
        """
        model, w, found, mask = self.model, self.w, [], self.routing.mask
        for k in range(1, model.mtp_depth + 1):
            name = f"blocks.{model.layers + k - 1}"
            later = torch.cat((tokens[:, k:], tokens[:, -1:].expand(-1, min(k, tokens.shape[1]))), dim=1)
            embedded = self.norm(w["embedding.weight"][later], f"{name}.mtp.embedding_norm")
            joined = torch.cat((self.norm(x, f"{name}.mtp.hidden_norm"), embedded), dim=-1)
            if mask is not None:
                self.routing.mask = torch.cat((mask[:, k:], torch.zeros_like(mask[:, :k])), dim=1)
            x = self.block(joined @ w[f"{name}.mtp.project.weight"].T, model.layers + k - 1, tokens)
            x = x if model.norm_place == "post" else self.norm(x, f"{name}.mtp.final_norm")
            found.append(self.head(x))
        self.routing.mask = mask
        return found

    def head(self, x: Tensor) -> Tensor:
        """Return the logits."""
        model, w = self.model, self.w
        logits = x @ w["embedding.weight" if model.tie_embeddings else "head.weight"].T
        if model.mup_base is not None:
            logits = logits * (model.mup_base / model.hidden)
        cap = model.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def block(self, x: Tensor, layer: int, tokens: Tensor) -> Tensor:
        """Return the residual stream after a block."""
        place, name = self.model.norm_place, f"blocks.{layer}"

        def half(x: Tensor, which: str) -> Tensor:
            """Return what attention or MLP adds."""
            h = x if place == "post" else self.norm(x, f"{name}.{which}_norm")
            h = self.attention(h, layer, tokens) if which == "attention" else self.transformed(h, layer)
            if place == "sandwich":
                h = self.norm(h, f"{name}.{which}_out_norm")
            rate = self.model.stochastic_depth * min(1.0, (layer + 1) / self.model.layers)
            h = self.drop(h * self.model.residual_scale, f"{name}.{which}.depth", rate, 1)
            return self.drop(h, f"{name}.{which}", self.model.dropout, h.dim())

        if self.model.parallel_residual:
            return x + half(x, "attention") + half(x, "mlp")
        for which in ("attention", "mlp"):
            x = x + half(x, which)
            x = self.norm(x, f"{name}.{which}_norm") if place == "post" else x
        return x

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Return LayerNorm or RMSNorm over the last dim."""
        wide = x.to(self.wide)
        if self.model.norm == "layernorm" and not f"{name}.weight".endswith(HEADS_NORMS):
            wide = wide - wide.mean(dim=-1, keepdim=True)
        wide = wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + self.model.norm_eps)
        weight = self.w[f"{name}.weight"].to(self.wide)
        around_zero = self.model.norm == "rmsnorm_zero_centered" and not f"{name}.weight".endswith(HEADS_NORMS)
        wide = wide * (1.0 + weight if around_zero else weight)
        if f"{name}.bias" in self.w:
            wide = wide + self.w[f"{name}.bias"].to(self.wide)
        return wide.to(x.dtype)

    def attention(self, x: Tensor, layer: int, tokens: Tensor) -> Tensor:
        """Return attention; query head h reads key-value head h // R."""
        model, name = self.model, f"blocks.{layer}.attention"
        rows, length, _ = x.shape
        turns = model.position == "rotary" and _knows_positions(model, layer)

        def turn(x: Tensor) -> Tensor:
            return rotated(x, model) if turns else x

        if model.kv_rank is not None:
            gate, (q, k, v) = None, latent_heads(self, x, name, turn)
        else:
            q, gate, k, v = self._projected(x, name)  # [rows,H,T,E], [rows,H,T,E] or None, [rows,K,T,E] twice
            if model.qk_norm:
                q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
            q, k = turn(q), turn(k)
        each = model.heads // model.key_value_heads
        k, v = k.repeat_interleave(each, dim=1), v.repeat_interleave(each, dim=1)
        places = torch.arange(length, dtype=self.wide)[:, None]
        if model.attention_pattern == "hierarchical":
            k, v, places = (summarised(x, model.block_size) for x in (k, v, places))  # T below grows by their number
        divisor = q.shape[-1] if model.scores_head_dim is None else model.scores_head_dim
        scores = (q @ k.transpose(-1, -2)).to(self.wide) / math.sqrt(divisor)  # [rows,H,T,T]
        if model.mup_base_head_dim is not None:  # sqrt(base) / size in all
            scores = scores * math.sqrt(model.mup_base_head_dim) / math.sqrt(q.shape[-1])
        if model.attention_softcap is not None:
            scores = torch.tanh(scores / model.attention_softcap) * model.attention_softcap
        distance = torch.arange(length)[:, None] - places[:, 0]
        if model.position == "alibi" and _knows_positions(model, layer):
            scores = scores - torch.tensor(slopes(model.heads), dtype=self.wide)[:, None, None] * distance.abs()
        if model.position == "t5" and _knows_positions(model, layer):
            buckets = [[bucket(max(0, int(d)), model) for d in row] for row in distance]
            scores = scores + self.w[f"{name}.relative.weight"][:, torch.tensor(buckets)].to(self.wide)
        scores = scores.masked_fill(~visible(model, layer, tokens, self.padding)[:, None], -math.inf)
        if model.attention_sinks:
            sink = self.w[f"{name}.sinks"].to(self.wide)[:, None, None].expand(rows, -1, length, 1)
            probabilities = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1].to(x.dtype)
        else:
            probabilities = torch.softmax(scores, dim=-1).to(x.dtype)
        rate = model.dropout if model.attention_dropout is None else model.attention_dropout
        mixed = self.drop(probabilities, f"{name}.probabilities", rate, 4) @ v
        if gate is not None:
            mixed = mixed * torch.sigmoid(gate)
        return self.linear(mixed.transpose(1, 2).reshape(rows, length, -1), f"{name}.out")

    def _projected(self, x: Tensor, name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        model = self.model
        rows, length, _ = x.shape
        heads, groups, size = model.heads, model.key_value_heads, model.head_size
        each, gate = heads // groups, None
        if groups == 1 and heads > 1:
            q = self.linear(x, f"{name}.q")  # with a gate [rows,T,2,H*E]: 0 the queries, 1 the gates
            if model.attention_gate:
                q, gate = q.unbind(dim=-2)
                gate = gate.view(rows, length, heads, size).transpose(1, 2)
            k, v = (part.unsqueeze(1) for part in self.linear(x, f"{name}.kv").chunk(2, dim=-1))
            return q.view(rows, length, heads, size).transpose(1, 2), gate, k, v
        # The rows of qkv go by key-value head: its R query heads, their gates, its key, its value.
        width = (2 if model.attention_gate else 1) * each + 2
        qkv = self.linear(x, f"{name}.qkv").view(rows, length, groups, width, size).permute(0, 2, 3, 1, 4)
        if model.attention_gate:
            gate = qkv[:, :, each : 2 * each].reshape(rows, heads, length, size)
        return qkv[:, :, :each].reshape(rows, heads, length, size), gate, qkv[:, :, -2], qkv[:, :, -1]

    def transformed(self, x: Tensor, layer: int) -> Tensor:
        """Return the feed-forward half: an MLP, or a mixture of experts."""
        model, name = self.model, f"blocks.{layer}.mlp"
        if model.experts is None or layer < model.dense_layers:
            return self.mlp(x, name)

        def expert(x: Tensor, e: int) -> Tensor:
            up, down = (self.w[f"{name}.experts.{which}.weight"][e] for which in ("up", "down"))
            h = (x @ up.reshape(-1, up.shape[-1]).T).view(*x.shape[:-1], *up.shape[:-1])
            return self.activated(h) @ down.T

        y = mixture(model, self.routing, x, self.w[f"{name}.router.weight"], self.wide, f"{name}.router", expert)
        return y + self.mlp(x, f"{name}.shared") if model.shared_experts else y

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """Return what an MLP makes of x."""
        return self.linear(self.activated(self.linear(x, f"{name}.up")), f"{name}.down")

    def activated(self, h: Tensor) -> Tensor:
        """Return the activation of h [rows,T,F]; with a gate [rows,T,2,F]: 0 the gate, 1 the value."""
        if self.model.activation in ("swiglu", "geglu"):
            gate, value = h.unbind(dim=-2)
            return (gate * torch.sigmoid(gate) if self.model.activation == "swiglu" else gelu(gate)) * value
        return ACTIVATIONS[self.model.activation](h)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Return x W^T + b; a weight [2,F,D] gives [rows,T,2,F]."""
        weight = self.w[f"{name}.weight"]
        y = (x @ weight.reshape(-1, weight.shape[-1]).T).view(*x.shape[:-1], *weight.shape[:-1])
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y


def gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh form."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "gelu": gelu,
    "gelu_erf": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "silu": lambda x: x * torch.sigmoid(x),
}


def summarised(x: Tensor, block: int) -> Tensor:
    """Put the mean of each whole block of [...,T,E] in front, the last block's first: [...,C+T,E]."""
    ends = range(x.shape[-2] // block * block, 0, -block)
    means = [x[..., end - block : end, :].mean(dim=-2, keepdim=True) for end in ends]
    return torch.cat((*means, x), dim=-2)


def sinusoids(length: int, width: int) -> Tensor:
    """Return sin and cos of t / 10000^(2j/D) in columns 2j and 2j + 1. Source: Vaswani et al. 2017, section 3.5."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for t in range(length):
        for column in range(width):
            angle = t / 10000.0 ** (2 * (column // 2) / width)
            table[t, column] = math.sin(angle) if column % 2 == 0 else math.cos(angle)
    return table


def slopes(heads: int) -> list[float]:
    """Return ALiBi's slopes. Source: Press et al. 2022, section 3, and the released code for odd numbers of heads."""
    if heads & (heads - 1) == 0:
        first = 2.0 ** (-8.0 / heads)
        return [first ** (head + 1) for head in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]


def bucket(distance: int, model: ModelSection) -> int:
    """Return T5's bucket of a distance to an earlier token. Source: Raffel et al. 2020, section 2.1, released code."""
    exact = model.relative_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(model.relative_distance / exact)
    return min(exact + int(share * (model.relative_buckets - exact)), model.relative_buckets - 1)


def rotated(x: Tensor, model: ModelSection) -> Tensor:
    """Turn pair (j, j + R/2) of position t (dim -2) by its angle, for the first R features. Source: Su et al. 2021."""
    length, size = x.shape[-2], int(x.shape[-1] * model.rotary_share) // 2 * 2
    theta = torch.tensor([frequency(j, size, model) for j in range(size // 2)], dtype=torch.float64)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), theta)  # [T,R/2]
    growth = 0.1 * math.log(model.rotary_factor) + 1.0 if model.rotary_scaling == "yarn" else 1.0
    cos, sin = (growth * angle.cos()).to(x.dtype), (growth * angle.sin()).to(x.dtype)
    first, second, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def frequency(pair: int, size: int, model: ModelSection) -> float:
    """Return the angle by which a pair turns from one token to the next."""
    base, factor, original = model.rotary_base, model.rotary_factor, model.rotary_original
    if model.rotary_scaling == "ntk":
        base *= factor ** (size / max(size - 2, 1))
    theta = base ** (-2.0 * pair / size)
    if model.rotary_scaling == "linear":
        return theta / factor
    if model.rotary_scaling == "yarn":
        assert original is not None
        low, high = (
            size * math.log(original / (turns * 2.0 * math.pi)) / (2.0 * math.log(base)) for turns in (32.0, 1.0)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
        slowed = min(max((pair - low) / max(high - low, 1e-3), 0.0), 1.0)
        return theta * (1.0 - slowed) + theta / factor * slowed
    if model.rotary_scaling == "llama3":
        assert original is not None
        wavelength = 2.0 * math.pi / theta
        if wavelength < original / 4.0:
            return theta
        if wavelength > original / 1.0:
            return theta / factor
        smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
        return (1.0 - smooth) * theta / factor + smooth * theta
    return theta
