"""What the kernel benchmark and the tuner measure: operations, their sizes, what each costs at least.

An operation makes its inputs from a seed, calls our function, and has a plain formula, which in fp32 is what every
contestant is checked against. FLOPs and bytes are those that cannot be avoided: every input is read once, every output
written once; the flops of operations that are bound by memory count one for an arithmetic operation on an element and
only place them in the picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megalm.kernels import reference

Inputs = dict[str, Any]
"""Tensors, and lists of tensors, by name."""
Sizes = Mapping[str, int]
Call = Callable[[Inputs], Any]
"""Inputs -> one output tensor or a tuple of them."""
Work = tuple[float, float]
"""(FLOPs, bytes)"""

EPS = 1e-5
HALF = 2  # bytes of bf16 and fp16
MASK_SEED = 2**40 + 1


@dataclass(frozen=True)
class Operation:
    """One operation; `cost` gives the work of each pass that is measured: forward, backward or both in a row."""

    make: Callable[[Sizes, torch.Generator], Inputs]
    ours: Callable[[Sizes], Call]
    plain: Callable[[Sizes], Call]
    cost: Callable[[Sizes], dict[str, Work]]
    leaves: tuple[str, ...] = ()
    """The inputs that get gradients, where there are such inputs."""
    part: Callable[[Sizes, Inputs], Inputs] = lambda sizes, values: values
    """Picks from inputs, outputs (out0, ...) and gradients (d_ and the input's name) what the fp32 check can afford."""
    checked: Callable[[Sizes], Sizes] = lambda sizes: sizes
    """Sizes of the fp32 check."""


@dataclass(frozen=True)
class Case:
    """An operation at one size."""

    name: str
    op: str
    sizes: Sizes = field(hash=False)

    @property
    def operation(self) -> Operation:
        """The operation."""
        return OPERATIONS[self.op]

    def with_sizes(self, **sizes: int) -> Case:
        """Return the case with other sizes, or more of them."""
        return replace(self, sizes={**self.sizes, **sizes})

    def inputs(self, device: torch.device, seed: int, sizes: Sizes | None = None) -> Inputs:
        """Return inputs of a seed on a device."""
        generator = torch.Generator(device).manual_seed(seed)
        inputs = self.operation.make(self.sizes if sizes is None else sizes, generator)
        for name in self.leaves(inputs):
            inputs[name].requires_grad_()
        return inputs

    def leaves(self, inputs: Inputs) -> list[str]:
        """Return the names of the inputs that get gradients."""
        return [name for name in self.operation.leaves if name in inputs]


def tensors(inputs: Inputs) -> Iterator[Tensor]:
    """Yield the tensors of inputs."""
    for value in inputs.values():
        yield from value if isinstance(value, list) else [value]


def total_bytes(inputs: Inputs) -> int:
    """Return how many bytes inputs take."""
    return sum(t.numel() * t.element_size() for t in tensors(inputs))


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _kind(s: Sizes) -> torch.dtype:
    """Return the dtype of sizes, which are of bf16 if they say nothing: `bytes` (4 for fp32)."""
    return torch.float32 if s.get("bytes", HALF) == 4 else torch.bfloat16


def _drawn(s: Sizes, origin: tuple[int, int, int]) -> dict[str, Any]:
    """Return the options of dropout for sizes with `dropped` (percent), none for those without."""
    if "dropped" not in s:
        return {}
    return {"dropout": s["dropped"] / 100, "seed": MASK_SEED, "dropout_origin": origin}


# Attention. Sizes: B, T, H, G (key/value heads), E, W (window, 0 for none), D (equal documents in a row, 0 for none);
# bytes, dropped.


def _attention_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    q, k, v = (_normal(generator, s["B"], s["T"], heads, s["E"], dtype=_kind(s)) for heads in (s["H"], s["G"], s["G"]))
    inputs = {"q": q, "k": k, "v": v}
    if s["D"]:
        assert s["B"] == 1 and s["T"] % s["D"] == 0, f"{s}: documents of one length fill one row"
        inputs["documents"] = torch.arange(0, s["T"] + 1, s["T"] // s["D"], dtype=torch.int32, device=q.device)
    return inputs


def _attention_options(s: Sizes, inputs: Inputs) -> dict[str, Any]:
    masks = {"causal": True, "window": s["W"] or None, "cu_seqlens": inputs.get("documents")}
    return masks | _drawn(s, (0, 0, s["H"]))


def _attention_ours(s: Sizes) -> Call:
    from megalm.kernels.attention import flash_attention

    return lambda x: flash_attention(x["q"], x["k"], x["v"], **_attention_options(s, x))


def _attention_plain(s: Sizes) -> Call:
    # With the logsumexp the reference takes the plain formula in place of torch's fused attention.
    return lambda x: reference.flash_attention(
        x["q"], x["k"], x["v"], **_attention_options(s, x), return_lse=True
    )[0]  # fmt: skip


def visible(s: Sizes) -> int:
    """Return how many (query, key) pairs of one head and one row see each other."""
    length = s["T"] // (s["D"] or 1)
    window = min(s["W"] or length, length)
    return (s["D"] or 1) * (window * (window + 1) // 2 + (length - window) * window)


def _attention_cost(s: Sizes) -> dict[str, Work]:
    # Published figures count T * S / 2 pairs for causal attention, not the diagonal's half more; so do these.
    pairs = s["T"] ** 2 / 2 if not s["W"] and not s["D"] else visible(s)
    if s["D"]:
        pairs = s["T"] ** 2 / s["D"] / 2
    flops = 4.0 * s["B"] * s["H"] * s["E"] * pairs
    q, kv = (HALF * s["B"] * s["T"] * heads * s["E"] for heads in (s["H"], s["G"]))
    return {"forward": (flops, 2 * q + 2 * kv), "backward": (2.5 * flops, 4 * q + 4 * kv)}


def _attention_part(s: Sizes, values: Inputs) -> Inputs:
    """The first row's first key/value head with all query heads that read it."""
    queries = s["H"] // s["G"]
    heads = {"q": queries, "k": 1, "v": 1, "out0": queries, "d_q": queries, "d_k": 1, "d_v": 1}
    return {name: x[:1, :, : heads[name]] if name in heads else x for name, x in values.items()}


# Softmax over causal rows. Sizes: M (matrices), T (keys), Q (the last queries, by default all T).


def _softmax_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    return {"x": 4 * _normal(generator, s["M"], s.get("Q", s["T"]), s["T"])}


def _softmax_ours(s: Sizes) -> Call:
    from megalm.kernels.softmax import scaled_masked_softmax

    return lambda x: scaled_masked_softmax(x["x"], scale=s["E"] ** -0.5, causal=True)


def _softmax_plain(s: Sizes) -> Call:
    def call(x: Inputs) -> Tensor:
        scores = x["x"].float() * s["E"] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        future = future.triu(1 + scores.shape[-1] - scores.shape[-2])
        return torch.softmax(scores.masked_fill(future, -math.inf), dim=-1).to(x["x"].dtype)

    return call


def _softmax_cost(s: Sizes) -> dict[str, Work]:
    whole = float(s["M"] * s.get("Q", s["T"]) * s["T"])  # elements; half of them are zeros that need not be read
    return {"forward": (2.5 * whole, HALF * 1.5 * whole), "backward": (2 * whole, HALF * 2 * whole)}


# Norms. Sizes: N, D, R (1 with a residual); bytes, dropped (with a residual).


def _norm_inputs(bias: bool) -> Callable[[Sizes, torch.Generator], Inputs]:
    def make(s: Sizes, generator: torch.Generator) -> Inputs:
        rows = (1, s["N"], s["D"]) if "dropped" in s else (s["N"], s["D"])
        draw = functools.partial(_normal, generator, dtype=_kind(s))
        inputs = {"x": draw(*rows), "weight": 1 + 0.1 * draw(s["D"])}
        if bias:
            inputs["bias"] = draw(s["D"])
        if s["R"]:
            inputs["residual"] = draw(*rows)
        return inputs

    return make


def _layer_norm_ours(s: Sizes) -> Call:
    from megalm.kernels.layernorm import layer_norm

    drawn = _drawn(s, (0, 0, s["N"]))
    return lambda x: layer_norm(x["x"], x["weight"], x["bias"], eps=EPS, residual=x.get("residual"), **drawn)


def _rms_norm_ours(s: Sizes) -> Call:
    from megalm.kernels.rmsnorm import rms_norm

    drawn = _drawn(s, (0, 0, s["N"]))
    return lambda x: rms_norm(x["x"], x["weight"], eps=EPS, residual=x.get("residual"), **drawn)


def _norm_plain(name: str) -> Callable[[Sizes], Call]:
    def plain(s: Sizes) -> Call:
        def call(x: Inputs) -> Any:
            total = x["x"]
            if "dropped" in s:
                total = reference.dropout(total, residual=x["residual"], **_drawn(s, (0, 0, s["N"])))
            elif s["R"]:
                total = total + x["residual"]
            affine = (x["weight"], x["bias"]) if name == "layer_norm" else (x["weight"],)
            normed = getattr(torch.nn.functional, name)(total, total.shape[-1:], *affine, eps=EPS)
            return (normed, total) if s["R"] else normed

        return call

    return plain


def _norm_cost(s: Sizes) -> dict[str, Work]:
    elements = s["N"] * s["D"]
    if s["R"]:
        return {"forward": (8.0 * elements, HALF * 4 * elements), "backward": (14.0 * elements, HALF * 4 * elements)}
    return {"forward": (7.0 * elements, HALF * 2 * elements), "backward": (13.0 * elements, HALF * 3 * elements)}


# Losses, as means over the rows. Sizes: N, V, and D where the output layer belongs to it.


def _logits(s: Sizes, generator: torch.Generator) -> Inputs:
    targets = torch.randint(s["V"], (s["N"],), generator=generator, device=generator.device)
    return {"logits": 3 * _normal(generator, s["N"], s["V"]), "targets": targets}


def _cross_entropy_ours(s: Sizes) -> Call:
    from megalm.kernels.cross_entropy import cross_entropy

    return lambda x: cross_entropy(x["logits"], x["targets"]).mean()


def _cross_entropy_cost(s: Sizes) -> dict[str, Work]:
    elements = float(s["N"] * s["V"])
    return {
        "forward": (4 * elements, HALF * elements),
        "backward": (4 * elements, 2 * HALF * elements),
        "both": (8 * elements, 2 * HALF * elements),  # in one pass: read once, overwritten once
    }


def _hidden(s: Sizes, generator: torch.Generator) -> Inputs:
    targets = torch.randint(s["V"], (s["N"],), generator=generator, device=generator.device)
    weight = 0.03 * _normal(generator, s["V"], s["D"])
    return {"hidden": _normal(generator, s["N"], s["D"]), "weight": weight, "targets": targets}


def _linear_cross_entropy_ours(s: Sizes) -> Call:
    from megalm.kernels.linear_cross_entropy import linear_cross_entropy

    return lambda x: linear_cross_entropy(x["hidden"], x["weight"], x["targets"]).mean()


def _linear_cross_entropy_cost(s: Sizes) -> dict[str, Work]:
    flops = 3 * 2.0 * s["N"] * s["D"] * s["V"]
    return {"both": (flops, 2 * HALF * (s["N"] + s["V"]) * s["D"])}


# Rotary positions, SwiGLU, AdamW; C: how many tensors the P parameters are.


def _rotary_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    angles = torch.arange(s["T"], device=generator.device)[:, None] * 1e4 ** (
        -torch.arange(0, s["E"], 2, device=generator.device) / s["E"]
    )
    x = _normal(generator, s["B"], s["T"], s["H"] + s["G"], s["E"])
    return {"x": x, "cos": angles.cos().repeat(1, 2), "sin": angles.sin().repeat(1, 2)}


def _rotary_ours(s: Sizes) -> Call:
    from megalm.kernels.rotary import apply_rotary

    return lambda x: apply_rotary(x["x"], x["cos"], x["sin"])


def _rotary_cost(s: Sizes) -> dict[str, Work]:
    elements = float(s["B"] * s["T"] * (s["H"] + s["G"]) * s["E"])
    work = 3 * elements, 2 * HALF * elements
    return {"forward": work, "backward": work}


def _swiglu_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    return {name: _normal(generator, s["N"], s["F"]) for name in ("gate", "up")}


def _swiglu_ours(s: Sizes) -> Call:
    from megalm.kernels.activations import swiglu

    return lambda x: swiglu(x["gate"], x["up"])


def _swiglu_cost(s: Sizes) -> dict[str, Work]:
    elements = float(s["N"] * s["F"])
    return {"forward": (5 * elements, 3 * HALF * elements), "backward": (12 * elements, 5 * HALF * elements)}


# GELU with a bias (sizes N, F), dropout alone (sizes N, D).


def _bias_gelu_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    return {"x": _normal(generator, s["N"], s["F"]), "bias": _normal(generator, s["F"])}


def _bias_gelu_ours(s: Sizes) -> Call:
    from megalm.kernels.activations import bias_gelu

    return lambda x: bias_gelu(x["x"], x["bias"])


def _bias_gelu_cost(s: Sizes) -> dict[str, Work]:
    elements = float(s["N"] * s["F"])
    return {"forward": (9 * elements, 2 * HALF * elements), "backward": (18 * elements, 3 * HALF * elements)}


def _dropout_ours(s: Sizes) -> Call:
    from megalm.kernels.dropout import dropout

    return lambda x: dropout(x["x"], dropout=0.1, seed=MASK_SEED)


def _dropout_cost(s: Sizes) -> dict[str, Work]:
    elements = float(s["N"] * s["D"])
    return {"forward": (elements, 2 * HALF * elements), "backward": (elements, 2 * HALF * elements)}


# The rate is so high that an error of the update shows in the weights.
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _adamw_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    """C tensors of one size, a small odd one after each; bf16 weights and gradients if M (fp32 masters)."""
    shapes = [shape for _ in range(s["C"]) for shape in ((s["P"] // s["C"],), (4096 + 1,))]
    kind = torch.bfloat16 if s["M"] else torch.float32
    fp32 = [[torch.empty(shape, device=generator.device).normal_(0, 0.1, generator=generator) for shape in shapes]
            for _ in range(2)]  # fmt: skip
    inputs = {
        "weights": [w.to(kind) for w in fp32[0]],
        "gradients": [g.to(kind) for g in fp32[1]],
        "exp_avgs": [torch.zeros(shape, device=generator.device) for shape in shapes],
        "exp_avg_sqs": [torch.zeros(shape, device=generator.device) for shape in shapes],
    }
    if s["M"]:
        inputs["masters"] = [w.to(kind).float() for w in fp32[0]]
    return inputs


def _adamw(function: Callable[..., None]) -> Call:
    def call(x: Inputs) -> tuple[Tensor, ...]:
        lists = (x[name] for name in ("weights", "gradients", "exp_avgs", "exp_avg_sqs"))
        function(*lists, step=3, masters=x.get("masters"), **ADAMW)
        return (*x["weights"][:2], *x["exp_avg_sqs"][:2])

    return call


def _adamw_ours(s: Sizes) -> Call:
    from megalm.kernels.adamw import fused_adamw_

    return _adamw(fused_adamw_)


def _adamw_cost(s: Sizes) -> dict[str, Work]:
    # fp32: w, m, v read and written, g read; bf16 with masters: g 2, master 8, m 8, v 8, weight 2. Both are 28.
    elements = float(s["P"] + s["C"] * (4096 + 1))
    return {"forward": (12 * elements, 28 * elements)}


# The experts' products. Sizes: N (rows of all experts), E, D, F; bytes. Some experts have four times others' rows.


def _grouped_matmul_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    draw = functools.partial(_normal, generator, dtype=_kind(s))
    shares = 0.25 + 0.75 * torch.rand(s["E"], generator=generator, device=generator.device)
    chosen = torch.multinomial(shares, s["N"], replacement=True, generator=generator)
    weight = s["D"] ** -0.5 * draw(s["E"], s["F"], s["D"])
    return {"x": draw(s["N"], s["D"]), "weight": weight, "counts": torch.bincount(chosen, minlength=s["E"])}


def _grouped_matmul_ours(s: Sizes) -> Call:
    from megalm.kernels.grouped_matmul import grouped_matmul

    return lambda x: grouped_matmul(x["x"], x["weight"], x["counts"])


def _grouped_matmul_cost(s: Sizes) -> dict[str, Work]:
    flops = 2.0 * s["N"] * s["D"] * s["F"]
    rows, matrices = s["N"] * (s["D"] + s["F"]), s["E"] * s["D"] * s["F"]
    backward = HALF * (rows + s["N"] * s["D"] + 2 * matrices)
    return {"forward": (flops, HALF * (rows + matrices)), "backward": (2 * flops, float(backward))}


# The embedding's gradient (sizes N tokens, V, D) and the norm of all gradients (sizes P, C).


def _embedding_inputs(s: Sizes, generator: torch.Generator) -> Inputs:
    tokens = torch.randint(s["V"], (s["N"],), generator=generator, device=generator.device)
    return {"weight": _normal(generator, s["V"], s["D"]), "tokens": tokens}


def _embedding_ours(s: Sizes) -> Call:
    from megalm.kernels.embedding import embedding

    return lambda x: embedding(x["tokens"], x["weight"])


def _embedding_cost(s: Sizes) -> dict[str, Work]:
    read, table = float(s["N"] * s["D"]), float(s["V"] * s["D"])
    return {"forward": (read, 2 * HALF * read), "backward": (read, HALF * (read + table))}


def _grad_norm_ours(s: Sizes) -> Call:
    from megalm.kernels.grad_norm import grad_norm

    return lambda x: grad_norm(x["gradients"])


OPERATIONS: dict[str, Operation] = {
    "attention": Operation(
        _attention_inputs, _attention_ours, _attention_plain, _attention_cost, ("q", "k", "v"), _attention_part
    ),
    "softmax": Operation(_softmax_inputs, _softmax_ours, _softmax_plain, _softmax_cost, ("x",)),
    "layer_norm": Operation(
        _norm_inputs(True), _layer_norm_ours, _norm_plain("layer_norm"), _norm_cost, ("x", "weight", "bias", "residual")
    ),
    "rms_norm": Operation(
        _norm_inputs(False), _rms_norm_ours, _norm_plain("rms_norm"), _norm_cost, ("x", "weight", "residual")
    ),
    "cross_entropy": Operation(
        _logits,
        _cross_entropy_ours,
        lambda s: lambda x: reference.cross_entropy(x["logits"], x["targets"]).mean(),
        _cross_entropy_cost,
        ("logits",),
        checked=lambda s: {**s, "N": min(s["N"], 1024)},
    ),
    "linear_cross_entropy": Operation(
        _hidden,
        _linear_cross_entropy_ours,
        lambda s: lambda x: reference.linear_cross_entropy(x["hidden"], x["weight"], x["targets"]).mean(),
        _linear_cross_entropy_cost,
        ("hidden", "weight"),
        checked=lambda s: {**s, "N": min(s["N"], 4096)},
    ),
    "rotary": Operation(
        _rotary_inputs,
        _rotary_ours,
        lambda s: lambda x: reference.apply_rotary(x["x"], x["cos"], x["sin"]),
        _rotary_cost,
        ("x",),
    ),
    "swiglu": Operation(
        _swiglu_inputs,
        _swiglu_ours,
        lambda s: lambda x: reference.swiglu(x["gate"], x["up"]),
        _swiglu_cost,
        ("gate", "up"),
    ),
    "bias_gelu": Operation(
        _bias_gelu_inputs,
        _bias_gelu_ours,
        lambda s: lambda x: reference.bias_gelu(x["x"], x["bias"]),
        _bias_gelu_cost,
        ("x", "bias"),
    ),
    "dropout": Operation(
        lambda s, g: {"x": _normal(g, 1, s["N"], s["D"])},
        _dropout_ours,
        lambda s: lambda x: reference.dropout(x["x"], dropout=0.1, seed=MASK_SEED),
        _dropout_cost,
        ("x",),
    ),
    "adamw": Operation(
        _adamw_inputs,
        _adamw_ours,
        lambda s: _adamw(reference.fused_adamw_),
        _adamw_cost,
        checked=lambda s: {**s, "P": min(s["P"], 10_000_000), "C": min(s["C"], 4)},
    ),
    "embedding": Operation(
        _embedding_inputs,
        _embedding_ours,
        lambda s: lambda x: reference.embedding(x["tokens"], x["weight"]),
        _embedding_cost,
        ("weight",),
    ),
    "grouped_matmul": Operation(
        _grouped_matmul_inputs,
        _grouped_matmul_ours,
        lambda s: lambda x: reference.grouped_matmul(x["x"], x["weight"], x["counts"]),
        _grouped_matmul_cost,
        ("x", "weight"),
    ),
    "grad_norm": Operation(
        lambda s, g: {"gradients": [_normal(g, s["P"] // s["C"]) for _ in range(s["C"])]},
        _grad_norm_ours,
        lambda s: lambda x: reference.grad_norm(x["gradients"]),
        lambda s: {"forward": (2.0 * s["P"], HALF * float(s["P"]))},
    ),
}  # fmt: skip


def attention(
    name: str, *, B: int, T: int, H: int = 16, G: int | None = None, E: int = 128, W: int = 0, D: int = 0
) -> Case:
    """Return a case of causal attention."""
    return Case(name, "attention", {"B": B, "T": T, "H": H, "G": G or H, "E": E, "W": W, "D": D})


def cases(small: bool) -> list[Case]:
    """Return all cases; small ones to try the program with."""
    if small:
        return [
            attention("attention T=64", B=2, T=64, H=2, E=16),
            attention("attention GQA 2, window 16", B=2, T=64, H=4, G=2, E=16, W=16),
            attention("attention packed", B=1, T=64, H=2, E=16, D=4),
            Case("causal softmax", "softmax", {"M": 2, "T": 32, "E": 64}),
            Case("LayerNorm", "layer_norm", {"N": 32, "D": 64, "R": 0}),
            Case("LayerNorm with residual", "layer_norm", {"N": 32, "D": 64, "R": 1}),
            Case("RMSNorm with residual", "rms_norm", {"N": 32, "D": 64, "R": 1}),
            Case("cross-entropy", "cross_entropy", {"N": 16, "V": 100}),
            Case("linear cross-entropy", "linear_cross_entropy", {"N": 16, "D": 32, "V": 100}),
            Case("rotary", "rotary", {"B": 2, "T": 16, "H": 4, "G": 2, "E": 16}),
            Case("SwiGLU", "swiglu", {"N": 16, "F": 64}),
            Case("bias and GELU", "bias_gelu", {"N": 16, "F": 64}),
            Case("dropout", "dropout", {"N": 16, "D": 64}),
            Case("AdamW fp32", "adamw", {"P": 10_000, "C": 2, "M": 0}),
            Case("AdamW bf16 with masters", "adamw", {"P": 10_000, "C": 2, "M": 1}),
            Case("embedding", "embedding", {"N": 64, "V": 50, "D": 16}),
            Case("experts", "grouped_matmul", {"N": 48, "E": 4, "D": 16, "F": 24}),
            Case("gradient norm", "grad_norm", {"P": 10_000, "C": 2}),
        ]
    tokens = 16384
    by_length = [attention(f"attention D128 T={t}", B=tokens // t, T=t) for t in (1024, 2048, 4096, 8192, 16384)]
    return [
        *by_length,
        *(attention(f"attention D64 T={t}", B=tokens // t, T=t, H=32, E=64) for t in (2048, 8192)),
        attention("attention GQA 8 T=8192", B=2, T=8192, G=2),
        attention("attention window 1024 T=16384", B=1, T=16384, W=1024),
        attention("attention packed 8 x 2048", B=1, T=16384, D=8),
        Case("causal softmax", "softmax", {"M": 64, "T": 2048, "E": 128}),
        *(Case(f"LayerNorm{name}", "layer_norm", {"N": tokens, "D": 4096, "R": r}) for name, r in _RESIDUAL),
        *(Case(f"RMSNorm{name}", "rms_norm", {"N": tokens, "D": 4096, "R": r}) for name, r in _RESIDUAL),
        Case("cross-entropy", "cross_entropy", {"N": 8192, "V": 128256}),
        Case("linear cross-entropy", "linear_cross_entropy", {"N": 8192, "D": 4096, "V": 128256}),
        Case("rotary", "rotary", {"B": 2, "T": tokens // 2, "H": 32, "G": 8, "E": 128}),
        Case("SwiGLU", "swiglu", {"N": tokens, "F": 14336}),
        Case("bias and GELU", "bias_gelu", {"N": tokens, "F": 16384}),
        Case("dropout", "dropout", {"N": tokens, "D": 4096}),
        Case("AdamW fp32", "adamw", {"P": 1_000_000_000, "C": 100, "M": 0}),
        Case("AdamW bf16 with masters", "adamw", {"P": 1_000_000_000, "C": 100, "M": 1}),
        Case("embedding", "embedding", {"N": tokens, "V": 128256, "D": 4096}),
        Case("8 experts, D4096 F14336", "grouped_matmul", {"N": tokens, "E": 8, "D": 4096, "F": 14336}),
        Case("128 experts, D2048 F768", "grouped_matmul", {"N": 4 * tokens, "E": 128, "D": 2048, "F": 768}),
        Case("gradient norm", "grad_norm", {"P": 1_000_000_000, "C": 100}),
    ]


_RESIDUAL = (("", 0), (" with residual", 1))
