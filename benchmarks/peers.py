"""Who else computes the operations of the kernel benchmark. A peer is built for a case; one that cannot do it says why.

cuDNN and FlashAttention 2 come with torch (scaled_dot_product_attention), as do FlexAttention, torch.compile of the
plain formula and fused AdamW. liger-kernel, quack-kernels and flash-attn-4 are used where they are installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import ADAMW, EPS, Call, Case, Inputs
from torch import Tensor

OURS = "megalm"


class Unavailable(Exception):
    """A peer does not do this case; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    """`build` returns the call for a case; ImportError and `Unavailable` mean that there is none."""

    build: Callable[[Case], Call]
    passes: tuple[str, ...] = ("forward", "backward", "both")
    """What of it can be timed: one that computes gradients in its forward pass has no fair forward time."""
    joined: Callable[[Any], Any] = lambda result: result
    """Makes of its result what the others return, for the check; not timed."""


def contestants(case: Case, device: torch.device) -> dict[str, Peer]:
    """Return our own kernel and all peers of the case's operation, by name."""
    ours = {OURS: Peer(lambda case: case.operation.ours(case.sizes))}
    plain = {"torch": Peer(_plain)}
    if device.type != "cuda":
        return ours | plain
    if case.op not in ("attention", "adamw", "grad_norm"):
        plain["torch.compile"] = Peer(_compiled)
    return ours | (plain if case.op != "attention" else {}) | PEERS.get(case.op, {})


def _plain(case: Case) -> Call:
    return case.operation.plain(case.sizes)


def _compiled(case: Case) -> Call:
    return torch.compile(case.operation.plain(case.sizes), dynamic=False)


def _refuse(case: Case, *names: str) -> None:
    """Raise Unavailable if the case has one of these attention features."""
    meaning = {"W": "windows", "D": "packed documents"}
    for name in names:
        if case.sizes[name]:
            raise Unavailable(f"has no {meaning[name]}")


def _fused_attention(backend: str) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        _refuse(case, "W", "D")
        chosen = getattr(SDPBackend, backend)
        grouped = case.sizes["H"] != case.sizes["G"]

        def call(x: Inputs) -> Tensor:
            q, k, v = (x[name].transpose(1, 2) for name in "qkv")
            with sdpa_kernel([chosen]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

        return call

    return build


def _flex_attention(case: Case) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens, window = case.sizes["T"], case.sizes["W"] or case.sizes["T"]
    length = tokens // (case.sizes["D"] or 1)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (t - s < window) & (t // length == s // length)

    mask = create_block_mask(sees, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.sizes["H"] != case.sizes["G"]

    def call(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        return compiled(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return call


def _flash_attention_4(case: Case) -> Call:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    window, length = case.sizes["W"], case.sizes["T"] // (case.sizes["D"] or 1)
    options: dict[str, Any] = {"causal": True}
    if window:
        options["window_size"] = (window - 1, 0)

    def call(x: Inputs) -> Tensor:
        if "documents" in x:
            packed = {f"{name}_{side}": value for side in "qk" for name, value in
                      (("cu_seqlens", x["documents"]), ("max_seqlen", length))}  # fmt: skip
            out = flash_attn_varlen_func(x["q"][0], x["k"][0], x["v"][0], **packed, **options)
            return (out[0] if isinstance(out, tuple) else out)[None]
        out = flash_attn_func(x["q"], x["k"], x["v"], **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def _liger(build: Callable[[Any, Case], Call]) -> Callable[[Case], Call]:
    def with_functions(case: Case) -> Call:
        from liger_kernel.transformers import functional

        return build(functional, case)

    return with_functions


def _liger_layer_norm(functions: Any, case: Case) -> Call:
    if case.sizes["R"]:
        raise Unavailable("has no LayerNorm with a residual")
    return lambda x: functions.liger_layer_norm(x["x"], x["weight"], x["bias"], EPS)


def _liger_rms_norm(functions: Any, case: Case) -> Call:
    # Not in place: the gradient that it would overwrite is that of all contestants.
    if case.sizes["R"]:
        return lambda x: functions.liger_fused_add_rms_norm(x["x"], x["residual"], x["weight"], EPS, in_place=False)
    return lambda x: functions.liger_rms_norm(x["x"], x["weight"], EPS, in_place=False)


def _liger_rotary(functions: Any, case: Case) -> Call:
    heads = case.sizes["H"], case.sizes["G"]

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        q, k = (part.transpose(1, 2) for part in x["x"].split(heads, dim=2))
        return functions.liger_rope(q, k, x["cos"][None], x["sin"][None])  # turns them in place

    return call


def _join_heads(parts: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(parts, dim=1).transpose(1, 2)


def _quack_rms_norm(case: Case) -> Call:
    from quack.rmsnorm import rmsnorm

    if case.sizes["R"]:
        return lambda x: rmsnorm(x["x"], x["weight"], residual=x["residual"], eps=EPS, prenorm=True)
    return lambda x: rmsnorm(x["x"], x["weight"], eps=EPS)


def _quack_cross_entropy(case: Case) -> Call:
    from quack.cross_entropy import cross_entropy

    return lambda x: cross_entropy(x["logits"], x["targets"], inplace_backward=True)


def _quack_linear_cross_entropy(case: Case) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: chunked_linear_cross_entropy(x["hidden"], x["weight"], x["targets"])


def _quack_rotary(case: Case) -> Call:
    from quack.rotary import apply_rotary_emb

    half = case.sizes["E"] // 2

    def call(x: Inputs) -> Tensor:
        if "halves" not in x:
            x["halves"] = [x[name][:, :half].contiguous() for name in ("cos", "sin")]
        return apply_rotary_emb(x["x"], *x["halves"])

    return call


def _fused_adamw(case: Case) -> Call:
    """torch's own, on the fp32 weights or masters; with masters its step has the casts that it needs."""

    def optimizer(x: Inputs) -> torch.optim.AdamW:
        weights = x.get("masters", x["weights"])
        parameters = [torch.nn.Parameter(w, requires_grad=False) for w in weights]  # they share the inputs' memory
        built = torch.optim.AdamW(parameters, fused=True, **ADAMW)
        for parameter, m, v in zip(parameters, x["exp_avgs"], x["exp_avg_sqs"], strict=True):
            step = torch.full((), 2.0, device=parameter.device)
            built.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        return built

    def call(x: Inputs) -> tuple[Tensor, ...]:
        if "optimizer" not in x:
            x["optimizer"] = optimizer(x)
        parameters = x["optimizer"].param_groups[0]["params"]
        gradients = [g.float() for g in x["gradients"]] if "masters" in x else x["gradients"]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        x["optimizer"].step()
        for parameter in parameters:
            parameter.grad = None
        if "masters" in x:
            torch._foreach_copy_(x["weights"], x["masters"])
        return (*x["weights"][:2], *x["exp_avg_sqs"][:2])

    return call


def _loop_of_products(case: Case) -> Call:
    """A product an expert, with counts that the host knows beforehand, as no training step does."""

    def call(x: Inputs) -> Tensor:
        if "rows" not in x:
            x["rows"] = x["counts"].tolist()
        parts = x["x"].split(x["rows"])
        return torch.cat([rows @ matrix.t() for rows, matrix in zip(parts, x["weight"].unbind(), strict=True)])

    return call


def _torch_grouped(case: Case) -> Call:
    if not hasattr(torch, "_grouped_mm"):
        raise Unavailable(f"torch {torch.__version__} has no _grouped_mm")

    def call(x: Inputs) -> Tensor:
        ends = x["counts"].cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(x["x"], x["weight"].transpose(1, 2), offs=ends)

    return call


def _no(reason: str) -> Peer:
    def build(case: Case) -> Call:
        raise Unavailable(reason)

    return Peer(build)


_GRADIENTS_AT_ONCE = functools.partial(Peer, passes=("both",))

PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "cuDNN": Peer(_fused_attention("CUDNN_ATTENTION")),
        "FA2": Peer(_fused_attention("FLASH_ATTENTION")),
        "FlexAttention": Peer(_flex_attention),
        "FA4": Peer(_flash_attention_4),
    },
    "softmax": {"Liger": _no("has no causal softmax"), "QuACK": _no("has no causal softmax")},
    "layer_norm": {"Liger": Peer(_liger(_liger_layer_norm)), "QuACK": _no("has no LayerNorm with gradients")},
    "rms_norm": {"Liger": Peer(_liger(_liger_rms_norm)), "QuACK": Peer(_quack_rms_norm)},
    "cross_entropy": {
        "Liger": _GRADIENTS_AT_ONCE(_liger(lambda f, case: lambda x: f.liger_cross_entropy(x["logits"], x["targets"]))),
        "QuACK": Peer(_quack_cross_entropy),
    },
    "linear_cross_entropy": {
        "Liger": _GRADIENTS_AT_ONCE(
            _liger(lambda f, case: lambda x: f.liger_fused_linear_cross_entropy(x["hidden"], x["weight"], x["targets"]))
        ),
        "QuACK": _GRADIENTS_AT_ONCE(_quack_linear_cross_entropy),
    },
    "rotary": {"Liger": Peer(_liger(_liger_rotary), joined=_join_heads), "QuACK": Peer(_quack_rotary)},
    "swiglu": {
        "Liger": Peer(_liger(lambda f, case: lambda x: f.liger_swiglu(x["gate"], x["up"]))),
        "QuACK": _no("has SwiGLU only as part of a matrix product"),
    },
    "grouped_matmul": {"loop": Peer(_loop_of_products), "_grouped_mm": Peer(_torch_grouped)},
    "adamw": {"torch fused": Peer(_fused_adamw)},
}
