"""Muon against torch's own, what counts as a matrix, and which parameters are its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.load import load_recipe
from megalm.config.optim import OptimSection
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.errors import ConfigError
from megalm.models.build import build_stage
from megalm.train.muon import _interleaved, iteration_dtype, matrices, newton_schulz, update_scale
from megalm.train.optimizers import build_optimizer, treatment
from megalm.zero.engine import shard_of
from megalm.zero.parts import Part, place
from tests.train.test_optimizers import section

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
STEPS = 20
SHAPES = {
    "blocks.0.attention.out.weight": (8, 12), "blocks.1.mlp.down.weight": (30, 7), "embedding.weight": (11, 8),
    "blocks.0.mlp.down.bias": (8,), "blocks.0.attention.relative.weight": (2, 8),
}  # fmt: skip
HIDDEN = ("blocks.0.attention.out.weight", "blocks.1.mlp.down.weight")
ORIGINAL: dict[str, Any] = {"muon_adjust_lr_fn": "original", "adamw_lr": 3e-3}

Held = list[tuple[ShardSpec, Tensor]]


def alone(device: str = "cpu") -> ParallelMesh:
    return replace(ParallelMesh.on_meta(RankLayout(), 0), device=torch.device(device))


def start(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Held:
    generator = torch.Generator().manual_seed(1)
    values = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return [(ShardSpec.whole(name, SHAPES[name]), value.to(device, dtype)) for name, value in values.items()]


def give_gradients(held: Held, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, (_, tensor) in enumerate(held):
        tensor.grad = (torch.randn(tensor.shape, generator=generator) * 10.0 ** (index - 2)).to(tensor)


def placed(config: OptimSection, held: Held) -> torch.optim.Optimizer:
    optimizer = build_optimizer(config, held)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    mesh = alone(held[0][1].device.type)
    place(optimizer, {t: [Part(spec, 0, 0, t.numel(), True)] for spec, t in held}, mesh, divided=False)
    return optimizer


def torchs(config: OptimSection, held: Held) -> list[torch.optim.Optimizer]:
    """Return torch's Muon for the hidden matrices and its AdamW for the rest, as its documentation has it."""
    decays = {spec.name: config.weight_decay if spec.name.endswith("weight") else 0.0 for spec, _ in held}
    groups = {spec.name: {"params": [tensor], "weight_decay": decays[spec.name]} for spec, tensor in held}
    muon = torch.optim.Muon(
        [groups[name] for name in HIDDEN],
        lr=config.lr,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_ns_steps,
        adjust_lr_fn=config.muon_adjust_lr_fn,
    )
    rest = [group for name, group in groups.items() if name not in HIDDEN]
    return [muon, torch.optim.AdamW(rest, lr=config.adamw_lr or config.lr, betas=config.betas, eps=config.eps)]


@pytest.mark.parametrize("options", [{}, ORIGINAL, {"muon_nesterov": False, "muon_momentum": 0.5, "muon_ns_steps": 3}])
def test_twenty_steps_are_those_of_torchs(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """In float64, where torch's would be in bf16. Gradients have many scales."""
    config, ours, theirs = section("muon", lr=0.02, **options), start(), start()
    optimizer, references = placed(config, ours), torchs(config, theirs)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        for reference in references:
            reference.step()
        for (spec, own), (_, other) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12, msg=f"{spec.name}, step {step}")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_twenty_steps_in_bf16_are_near_those_of_torchs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Where both iterate in bf16, they part by its rounding: of what twenty steps move, some hundredths."""
    config, ours, theirs = section("muon", lr=0.02), start(torch.float32, device), start(torch.float32, device)
    if device == "cpu":
        monkeypatch.setattr("megalm.train.muon.iteration_dtype", lambda weights, mesh: torch.bfloat16)
    optimizer, references = placed(config, ours), torchs(config, theirs)
    for step in range(STEPS):
        for held in (ours, theirs):
            give_gradients(held, step)
        for each in (optimizer, *references):
            each.step()
    for (spec, own), (_, other), (_, first) in zip(ours, theirs, start(torch.float32, device), strict=True):
        assert float((own - other).norm()) < 0.05 * float((own - first).norm()), spec.name


def test_the_iteration_is_in_fp64_where_weights_are_in_fp32_on_a_cpu_and_in_bf16_on_a_gpu() -> None:
    cpu, gpu = alone(), alone("cuda")
    assert iteration_dtype(torch.float64, gpu) is torch.float64
    assert iteration_dtype(torch.float32, cpu) is iteration_dtype(torch.bfloat16, cpu) is torch.float32
    assert iteration_dtype(torch.float32, gpu) is torch.bfloat16


@pytest.mark.parametrize("shape", [(40, 40), (60, 20), (20, 60)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    stacked = torch.stack([torch.randn(shape, generator=generator, dtype=torch.float64) * size for size in (1e-3, 50)])
    made = newton_schulz(stacked, 5)
    for before, after in zip(stacked, made, strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        inner = left.mT @ after @ right.mT
        assert float((inner - inner.diag().diag()).abs().max()) < 1e-10
        large = torch.linalg.svdvals(before) > 0.02 * torch.linalg.matrix_norm(before)
        assert bool((inner.diag()[large] > 0.65).all()) and bool((inner.diag() < 1.25).all())


def test_nothing_to_go_by_moves_nothing() -> None:
    assert not newton_schulz(torch.zeros(1, 4, 6), 5).any()
    assert float(newton_schulz(torch.full((1, 4, 6), 1e-12), 5).norm()) < 0.1


def test_scales_are_the_papers() -> None:
    assert update_scale("original", 400, 100) == 2.0 and update_scale("original", 100, 400) == 1.0
    assert update_scale("match_rms_adamw", 400, 100) == update_scale("match_rms_adamw", 100, 400) == 0.2 * 20.0
    orthogonal = torch.linalg.qr(torch.randn(400, 100, dtype=torch.float64)).Q
    size = float((update_scale("match_rms_adamw", 400, 100) * orthogonal).square().mean().sqrt())
    assert size == pytest.approx(0.2, rel=1e-9)


def test_a_fused_projection_is_its_matrices_and_back() -> None:
    """Two key/value heads of 2 features, three queries each: q0 q1 q2 k v, twice."""
    spec = ShardSpec("blocks.0.attention.qkv.weight", (20, 3), (20, 3), interleaved=(6, 2, 2))
    whole = torch.arange(60.0).view(20, 3)
    q, k, v = matrices(spec, whole)
    assert q[:, 0].div(3).tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert k[:, 0].div(3).tolist() == [6, 7, 16, 17] and v[:, 0].div(3).tolist() == [8, 9, 18, 19]
    assert torch.equal(_interleaved(spec, [q, k, v]), whole)
    plain = ShardSpec.whole("blocks.0.attention.out.weight", (20, 3))
    assert len(matrices(plain, whole)) == 1 and torch.equal(_interleaved(plain, [whole]), whole)


MODELS = {
    "model.heads=4": {".qkv.weight": [(32, 32)] * 3},
    "model.kv_heads=2": {".qkv.weight": [(32, 32), (16, 32), (16, 32)]},
    "model.attention_gate=true": {".qkv.weight": [(32, 32)] * 4},
    "model.kv_heads=1": {".q.weight": [(32, 32)], ".kv.weight": [(8, 32)] * 2},
    "model.kv_rank=12": {".q.weight": [(16, 32), (32, 32)], ".kv_up.weight": [(32, 12)] * 2},
    "model.kv_rank=20": {".kv_down.weight": [(20, 32), (4, 32)]},
    "model.activation=swiglu": {".up.weight": [(128, 32)]},
}


@pytest.mark.parametrize("option", MODELS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_matrices_are_those_that_a_layer_applies_in_every_layout(option: str, tensor: int) -> None:
    sizes = ["model.hidden=32", "model.heads=4", "model.vocab=67", f"parallel.tensor={tensor}"]
    config = load_recipe("gpt-124m", ["model.layers=1", "model.ffn=128", *sizes, option])
    model = build_stage(config, 67, ParallelMesh.on_meta(RankLayout(tensor=tensor), tensor - 1))
    for end, shapes in MODELS[option].items():
        (spec,) = [shard_of(p) for p in model.parameters() if shard_of(p).name.endswith(end)]
        whole = torch.empty(spec.global_shape[-2:], device="meta")
        assert [tuple(matrix.shape) for matrix in matrices(spec, whole)] == shapes
        assert spec.global_shape[:-2] == ((2,) if option.endswith("swiglu") else ())


def test_hidden_matrices_are_muons_but_for_what_a_rule_says() -> None:
    names = {
        "blocks.0.mlp.up.weight": (2, 16, 8), "blocks.0.attention.kv.weight": (4, 8), "embedding.weight": (67, 8),
        "head.weight": (67, 8), "position.weight": (16, 8), "blocks.0.attention.relative.weight": (2, 8),
        "blocks.0.mlp.router.weight": (4, 8), "blocks.0.mlp.up.bias": (2, 16), "blocks.0.mlp_norm.weight": (8,),
    }  # fmt: skip
    specs = [ShardSpec.whole(name, shape) for name, shape in names.items()]
    rules = [{"match": "*.kv.*", "lr": 0.5, "muon": False}]
    config = section("muon", **{**ORIGINAL, "lr": 0.02}, rules=rules)
    found = {spec.name: treatment(config, spec) for spec in specs}
    assert [name for name, how in found.items() if how.muon] == ["blocks.0.mlp.up.weight"]
    assert found["blocks.0.mlp.up.weight"] == (0.2, 1.0, True)
    assert found["blocks.0.attention.kv.weight"].lr == pytest.approx(0.5 * 3e-3 / 0.02)
    assert found["embedding.weight"] == (0.2, 3e-3 / 0.02, False)
    assert found["blocks.0.mlp_norm.weight"] == (0.0, 3e-3 / 0.02, False)
    shared = section("muon", lr=0.02)
    assert treatment(shared, specs[0]).lr == treatment(shared, specs[2]).lr == 1.0


def test_of_a_wider_model_by_mup_only_adamws_matrices_learn_slower() -> None:
    config = section("muon", **{**ORIGINAL, "lr": 0.02}, rules=[{"match": "*.kv.*", "muon": False}])
    wide = ShardSpec.whole("blocks.0.mlp.up.weight", (16, 8))
    assert treatment(config, wide, width_factor=4.0) == treatment(config, wide)
    adamws = ShardSpec.whole("blocks.0.attention.kv.weight", (16, 8))
    assert treatment(config, adamws, width_factor=4.0).lr == treatment(config, adamws).lr / 4.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.muon_adjust_lr_fn=original"], "original needs optim.adamw_lr, the rate of all but hidden matrices"),
        (["model.mup_base=64"], "match_rms_adamw has what a hidden matrix gives move by the root of the width; use"),
        (["optim.state_dtype=bf16"], "optim.kind=muon, which works on whole matrices, not on pieces"),
        (["optim.momentum=0.9"], "optim.momentum=0.9 has no effect without optim.kind=sgd or rmsprop"),
        (["optim.muon_ns_steps=0"], "optim.muon_ns_steps=0 is too small"),
        (["optim.kind=adamw", "optim.adamw_lr=0.1"], "optim.adamw_lr=0.1 has no effect without optim.kind=muon"),
        (
            ["optim.kind=adamw", "optim.rules=[{match: a, muon: false}]"],
            "optim.rules: muon=false of 'a' has no effect with optim.kind=adamw; leave it out",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("gpt-tiny", ["optim.kind=muon", *overrides])
    assert message in str(caught.value)
