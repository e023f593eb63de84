"""A GPT in plain torch, by its published formulas, and its weights as Megatron-LM lays them out over ranks.

Shares nothing with megalm: weights stand apart by head and by projection, and each layout is written from Megatron's
own definition (`megatron.core.transformer`: attention by query groups, `mlp.py`; `tensor_parallel/layers.py`).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's choices; `rows` of the vocabulary are stored, padding included."""

    layers: int = 4
    hidden: int = 16
    heads: int = 4
    groups: int = 4
    head: int = 4
    ffn: int = 12
    rows: int = 24
    positions: int = 16
    rms: bool = False
    swiglu: bool = False
    squared_relu: bool = False
    rope: bool = False
    rope_share: float = 1.0
    bias: bool = True
    qkv_bias: bool = True
    tied: bool = True
    qk_norm: bool = False
    gate: bool = False
    window: int | None = None
    fused_gelu: bool = True


def random_weights(shape: Shape, dtype: torch.dtype = torch.float64) -> Weights:
    """Return weights of every matrix by itself: q, gate [H, E, D], k, v [G, E, D], out [D, H, E], up, gate [F, D]."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std + mean).to(dtype)

    d, h, g, e, f = shape.hidden, shape.heads, shape.groups, shape.head, shape.ffn
    w: Weights = {"embedding": draw(shape.rows, d), "final.weight": draw(d, mean=1.0)}
    if not shape.rope:
        w["position"] = draw(shape.positions, d)
    if not shape.tied:
        w["head"] = draw(shape.rows, d)
    for n in range(shape.layers):
        for name, count in (("q", h), ("k", g), ("v", g), *((("gate", h),) if shape.gate else ())):
            w[f"{n}.{name}.weight"] = draw(count, e, d)
            if shape.qkv_bias:
                w[f"{n}.{name}.bias"] = draw(count, e)
        for name in ("norm1", "norm2"):
            w[f"{n}.{name}.weight"] = draw(d, mean=1.0)
        for name in ("qn", "kn") if shape.qk_norm else ():
            w[f"{n}.{name}.weight"] = draw(e, mean=1.0)
        w[f"{n}.out.weight"], w[f"{n}.down.weight"] = draw(d, h, e), draw(d, f)
        for name in ("left", "right") if shape.swiglu else ("left",):
            w[f"{n}.{name}.weight"] = draw(f, d)
            if shape.bias:
                w[f"{n}.{name}.bias"] = draw(f)
        if shape.bias:
            w[f"{n}.out.bias"], w[f"{n}.down.bias"] = draw(d), draw(d)
        if not shape.rms:
            w[f"{n}.norm1.bias"], w[f"{n}.norm2.bias"] = draw(d), draw(d)
    if not shape.rms:
        w["final.bias"] = draw(d)
    return w


def logits(shape: Shape, weights: Weights, tokens_T: Tensor) -> Tensor:
    """Return the logits [T, rows] of one row in fp64."""
    w = {name: value.double() for name, value in weights.items()}
    x = w["embedding"][tokens_T]
    if "position" in w:
        x = x + w["position"][: len(tokens_T)]
    for n in range(shape.layers):
        x = x + _attention(shape, w, n, _norm(shape, w, f"{n}.norm1", x))
        x = x + _mlp(shape, w, n, _norm(shape, w, f"{n}.norm2", x))
    return _norm(shape, w, "final", x) @ w["embedding" if shape.tied else "head"].T


def _norm(shape: Shape, w: Weights, name: str, x: Tensor) -> Tensor:
    if shape.rms or name.endswith("n"):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _attention(shape: Shape, w: Weights, n: int, x: Tensor) -> Tensor:
    def project(name: str) -> Tensor:
        y = torch.einsum("td,hed->the", x, w[f"{n}.{name}.weight"])
        return y + w[f"{n}.{name}.bias"] if shape.qkv_bias else y

    q, k, v = project("q"), project("k"), project("v")
    if shape.qk_norm:
        q, k = _norm(shape, w, f"{n}.qn", q), _norm(shape, w, f"{n}.kn", k)
    if shape.rope:
        q, k = _rotate(shape, q), _rotate(shape, k)
    k, v = (torch.repeat_interleave(y, shape.heads // shape.groups, dim=1) for y in (k, v))
    scores = torch.einsum("the,she->hts", q, k) / math.sqrt(shape.head)
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    hidden = (distance < 0) | (distance > (len(x) if shape.window is None else shape.window))
    out = torch.einsum("hts,she->the", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
    if shape.gate:
        out = out * project("gate").sigmoid()
    y = torch.einsum("the,dhe->td", out, w[f"{n}.out.weight"])
    return y + w[f"{n}.out.bias"] if shape.bias else y


def _rotate(shape: Shape, x: Tensor) -> Tensor:
    turned = int(shape.head * shape.rope_share)
    frequencies = 10000.0 ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequencies
    a, b = x[..., : turned // 2], x[..., turned // 2 : turned]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), x[..., turned:]), -1)


def _mlp(shape: Shape, w: Weights, n: int, x: Tensor) -> Tensor:
    def linear(name: str, y: Tensor) -> Tensor:
        return F.linear(y, w[f"{n}.{name}.weight"], w.get(f"{n}.{name}.bias"))

    left = linear("left", x)
    if shape.swiglu:
        left = F.silu(left) * linear("right", x)
    elif shape.squared_relu:
        left = F.relu(left) ** 2
    else:
        left = F.gelu(left, approximate="tanh" if shape.fused_gelu else "none")
    return linear("down", left)


def arguments(shape: Shape, tensor: int, pipeline: int, **others: Any) -> argparse.Namespace:
    """Return what Megatron-LM's argument parser leaves of such a model, with some that say nothing of it."""
    given = argparse.Namespace(
        num_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads, kv_channels=shape.head,
        ffn_hidden_size=shape.ffn, padded_vocab_size=shape.rows, max_position_embeddings=shape.positions,
        seq_length=shape.positions, group_query_attention=shape.groups != shape.heads,
        num_query_groups=shape.groups if shape.groups != shape.heads else 1,
        normalization="RMSNorm" if shape.rms else "LayerNorm", norm_epsilon=1e-5, swiglu=shape.swiglu,
        squared_relu=shape.squared_relu, openai_gelu=False, onnx_safe=None, bias_gelu_fusion=shape.fused_gelu,
        position_embedding_type="rope" if shape.rope else "learned_absolute", rotary_base=10000,
        rotary_percent=shape.rope_share, add_bias_linear=shape.bias, add_qkv_bias=shape.qkv_bias,
        untie_embeddings_and_output_weights=not shape.tied, qk_layernorm=shape.qk_norm,
        attention_output_gate=shape.gate, window_size=None if shape.window is None else (shape.window, 0),
        hidden_dropout=0.0, attention_dropout=0.0, num_experts=None, bf16=False, fp16=False,
        params_dtype=torch.float64, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
        consumed_train_samples=320, tokenizer_type="GPT2BPETokenizer",
    )  # fmt: skip
    vars(given).update(others)
    return given


def tensor_rank(shape: Shape, w: Weights, rank: int, size: int) -> dict[str, Tensor]:
    """Return the tensors of one tensor rank by the names of megatron.core, of all layers."""

    def share(x: Tensor, dim: int = 0) -> Tensor:
        return x.chunk(size, dim=dim)[rank]

    found = {
        "embedding.word_embeddings.weight": share(w["embedding"]),
        "decoder.final_layernorm.weight": w["final.weight"],
    }
    if "position" in w:
        found["embedding.position_embeddings.weight"] = w["position"]
    if "head" in w:
        found["output_layer.weight"] = share(w["head"])
    if "final.bias" in w:
        found["decoder.final_layernorm.bias"] = w["final.bias"]
    for n in range(shape.layers):
        own, at = f"decoder.layers.{n}", f"{n}"
        for kind in ("weight", "bias"):
            if f"{at}.q.{kind}" in w:
                found[f"{own}.self_attention.linear_qkv.{kind}"] = share(query_groups(shape, w, n, kind))
            if f"{at}.left.{kind}" in w:
                halves = [share(w[f"{at}.{half}.{kind}"]) for half in ("left", "right") if f"{at}.{half}.{kind}" in w]
                found[f"{own}.mlp.linear_fc1.{kind}"] = torch.cat(halves)
            for ours, theirs in (("norm1", "input_layernorm"), ("norm2", "pre_mlp_layernorm")):
                if f"{at}.{ours}.{kind}" in w:
                    found[f"{own}.{theirs}.{kind}"] = w[f"{at}.{ours}.{kind}"]
        for ours, theirs in (("qn", "q_layernorm"), ("kn", "k_layernorm")):
            if f"{at}.{ours}.weight" in w:
                found[f"{own}.self_attention.{theirs}.weight"] = w[f"{at}.{ours}.weight"]
        found[f"{own}.self_attention.linear_proj.weight"] = share(w[f"{at}.out.weight"].flatten(1), 1)
        found[f"{own}.mlp.linear_fc2.weight"] = share(w[f"{at}.down.weight"], 1)
        if shape.bias:
            found[f"{own}.self_attention.linear_proj.bias"] = w[f"{at}.out.bias"]
            found[f"{own}.mlp.linear_fc2.bias"] = w[f"{at}.down.bias"]
    return {name: tensor.clone() for name, tensor in found.items()}


def query_groups(shape: Shape, w: Weights, n: int, kind: str) -> Tensor:
    """Return the fused projection: of each group of queries its queries, their gates, its key, its value."""
    each = shape.heads // shape.groups
    rows = []
    for group in range(shape.groups):
        for name in ("q", "gate") if shape.gate else ("q",):
            rows += [w[f"{n}.{name}.{kind}"][group * each + i] for i in range(each)]
        rows += [w[f"{n}.{name}.{kind}"][group] for name in ("k", "v")]
    return torch.cat(rows)


TE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
LEGACY = {
    "decoder.": "encoder.",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors by names in which some words are others."""
    found = {}
    for name, tensor in tensors.items():
        for word, other in names.items():
            name = name.replace(word, other)
        found[name] = tensor
    return found


def stage_of(
    tensors: dict[str, Tensor], shape: Shape, stage: int, stages: int, virtual: int = 1
) -> list[dict[str, Tensor]]:
    """Return the chunks of one stage, layers counted from 0 in each: chunk c of stage s has run c * stages + s."""
    each = shape.layers // (stages * virtual)
    chunks = []
    for chunk in range(virtual):
        first = (chunk * stages + stage) * each
        own: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            words = name.split(".")
            if "layers" in words:
                at = words.index("layers") + 1
                number = int(words[at]) - first
                if 0 <= number < each:
                    own[".".join([*words[:at], str(number), *words[at + 1 :]])] = tensor
            elif name.startswith(("embedding", "language_model.embedding")):
                if first == 0:
                    own[name] = tensor
            elif first + each == shape.layers:
                own[name] = tensor
        if shape.tied and stages * virtual > 1 and first + each == shape.layers:
            own["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]
        chunks.append(own)
    return chunks


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the GPT of before megatron.core saves: mappings in mappings down to the layers' own names."""
    model: dict[str, Any] = {"embedding": {}, "encoder": {}}
    found: dict[str, Any] = {"language_model": model}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first == "embedding":
            table, _, kind = rest.partition(".")
            model["embedding"].setdefault(table, {})[kind] = tensor
        elif first == "encoder":
            model["encoder"][rest] = tensor
        elif name == "output_layer.weight" and "embedding.word_embeddings.weight" not in tensors:
            found["word_embeddings_for_head"] = {"weight": tensor}
        else:
            model["output_layer"] = {"weight": tensor}
    return found


def save_megatron(
    directory: Path,
    shape: Shape,
    weights: Weights,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    names: dict[str, str] | None = None,
    step: int = 40,
    version: float = 3.0,
    **others: Any,
) -> Path:
    """Write a checkpoint as Megatron-LM's format torch has it, and return its directory."""
    (directory / f"iter_{step:07d}").mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text(str(step))
    for rank in range(tensor):
        tensors = tensor_rank(shape, weights, rank, tensor)
        for stage in range(pipeline):
            chunks = [renamed(chunk, names or {}) for chunk in stage_of(tensors, shape, stage, pipeline, virtual)]
            saved: dict[str, Any] = {
                "args": arguments(shape, tensor, pipeline, **others),
                "checkpoint_version": version,
                "iteration": step,
                "rng_state": [{"random_rng_state": (3, (1, 2), None), "cuda": torch.zeros(16, dtype=torch.uint8)}],
                "opt_param_scheduler": {"max_lr": 1e-3},
            }
            for number, chunk in enumerate(chunks):
                key = "model" if virtual == 1 else f"model{number}"
                saved[key] = nested(chunk) if names is LEGACY else chunk
            if names is TE:
                saved["model" if virtual == 1 else "model0"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            path = directory / f"iter_{step:07d}" / name / "model_optim_rng.pt"
            path.parent.mkdir()
            torch.save(saved, path)
    return directory
