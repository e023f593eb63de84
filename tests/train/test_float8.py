"""Training with products in fp8, which torch computes on CPUs too: layouts, schedules, programs, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from megalm.config.load import load_recipe
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.world import check_device
from megalm.errors import ConfigError
from megalm.models import build
from megalm.models.build import build_executor, build_stage
from megalm.tensor_parallel.float8 import Float8Products
from megalm.tensor_parallel.linear import Linear
from megalm.train.metrics_file import read_metrics
from megalm.train.run_directory import check_run, open_run
from tests.end_to_end.workplace import make_workplace, megalm
from tests.parity.harness import LLAMA, Case, RandomText, RankReport, assemble, reference_run, train_rank
from tests.worker_pool import WorkerPool

pytest.importorskip("torchao")

STEPS = 20
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
BASE: dict[str, Any] = {
    "precision": "bf16",
    "model.layers": 2,
    "model.hidden": 64,
    "model.heads": 4,
    "model.init_std": 0.05,
    "train.steps": STEPS,
    "train.micro_batch": 4,
    "optim.lr": 0.003,
    "lr_schedule.warmup_steps": 2,
}


def fp8(recipe: str, **more: Any) -> dict[str, Any]:
    return {**BASE, "train.fp8": recipe, **more}


class FewSamples(RandomText):
    """Random text in which the same few samples come again, so that a model can learn them."""

    def _sample(self, number: int) -> Any:
        return super()._sample(number % 16)


def train(mesh: ParallelMesh, config: RunConfig, steps: int, emulate: bool = True) -> RankReport:
    """Train with fp32's products of the rounded operands: torch's own of fp8 take 20 ms each on a CPU, however small.

    That those are products of the rounded operands too is shown in `tests/tensor_parallel/test_float8.py`.
    """
    products = mock.patch.object(build, "Float8Products", partial(Float8Products, emulate=emulate))
    with products, mock.patch("tests.parity.harness.RandomText", FewSamples):
        return train_rank(mesh, config, steps)


class Runs:
    """What cases came to, each trained once."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.reports: dict[tuple[str, int], list[RankReport]] = {}

    def of(self, case: Case, steps: int = STEPS) -> list[RankReport]:
        if (case.name, steps) not in self.reports:
            self.reports[case.name, steps] = self.pool.run(train, case.config(), steps, layout=case.layout)
        return self.reports[case.name, steps]

    def losses(self, case: Case, steps: int = STEPS) -> list[float]:
        first, *others = [report.losses for report in self.of(case, steps)]
        assert all(other == first for other in others)
        return first


@pytest.fixture(scope="module")
def runs(pool: WorkerPool) -> Runs:
    return Runs(pool)


def apart(values: list[float], others: list[float]) -> float:
    return max(abs(value - other) / other for value, other in zip(values, others, strict=True))


SEQUENCE, CONTEXT = {"parallel.sequence": True}, {"parallel.context": 2}
HALVES: dict[str, Any] = {"parallel.schedule": "zb-h1", "model.kv_heads": 1, "model.head_dim": 32}
LATENT = {"model.kv_rank": 32, "model.q_rank": 16, "model.rope_head_dim": 16, **SEQUENCE}
ZERO: dict[str, Any] = {"zero.stage": 2, "model.mtp_depth": 1}


@pytest.mark.parametrize(
    ("recipe", "pipeline", "data", "tensor", "more"),
    [
        ("tensorwise", 1, 1, 1, {}),
        ("tensorwise", 1, 1, 2, LLAMA),
        ("tensorwise", 2, 1, 1, HALVES),
        ("rowwise", 1, 1, 2, SEQUENCE),
        ("rowwise", 1, 2, 1, ZERO),
        ("rowwise", 1, 1, 2, LATENT),
        ("rowwise_with_gw_hp", 2, 1, 1, {}),
        ("rowwise_with_gw_hp", 1, 1, 1, CONTEXT),
    ],
)
def test_layouts_train_near_bf16_and_near_one_process(
    runs: Runs, recipe: str, pipeline: int, data: int, tensor: int, more: dict[str, Any]
) -> None:
    """Losses of 20 steps, in which they fall by a half: 2% off at most, of whatever layout and recipe.

    The layouts differ in fp8 as two seeds of its rounding would: what sums in another order changes in the last bit of
    bf16 is enough to round a number up that was rounded down.
    """
    case = Case(pipeline, data, tensor, fp8(recipe, **more))
    plain = {key: value for key, value in more.items() if not key.startswith(("parallel.", "zero."))}
    found, alone = runs.losses(case), runs.losses(Case(overrides=fp8(recipe, **plain)))
    sixteen = runs.losses(Case(overrides=fp8("none", **plain)))
    assert found[-1] < 0.6 * found[0]
    assert apart(found, sixteen) < 0.03
    assert apart(found, alone) < 0.03
    assert found != sixteen


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_off_by_as_much_as_eight_bits_are(runs: Runs, recipe: str) -> None:
    """A number is off by 3% at most, in the mean, and passes four blocks; bf16's gradients here are off by 1%."""
    plain = Case(overrides={**BASE, **LLAMA, "precision": "fp64"})
    with mock.patch("tests.parity.harness.RandomText", FewSamples):
        gradients, _, _ = reference_run(plain.config(), 1)
    for layout in ((1, 1, 1), (1, 1, 2)):
        reports = runs.of(Case(*layout, fp8(recipe, **LLAMA)), 1)
        found = assemble([replace(r, gradients=[(s, at, v.float()) for s, at, v in r.gradients]) for r in reports])
        off = sorted(float((found[name].double() - g).norm() / g.norm()) for name, g in gradients.items())
        assert 0.05 < off[len(off) // 2] < 0.15
        assert off[-1] < 0.25


@pytest.mark.parametrize(
    "more",
    [{"parallel.schedule": "zb-h1"}, *({"train.recompute": how} for how in ("full", "selective"))],
    ids=str,
)
def test_what_is_computed_later_or_again_is_the_same(runs: Runs, more: dict[str, Any]) -> None:
    plain = {"train.steps": 4}
    assert runs.losses(Case(2, 1, 1, fp8("rowwise", **plain, **more)), 4) == runs.losses(
        Case(2, 1, 1, fp8("rowwise", **plain)), 4
    )


def train_traced(mesh: ParallelMesh, config: RunConfig, steps: int) -> RankReport:
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")):
        return train(mesh, config, steps, emulate=False)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_blocks_program_computes_the_same(runs: Runs, recipe: str) -> None:
    """What is traced, taken apart and joined with its backward pass is compared, and not what Inductor makes of it.

    Its C++ for a CPU, where no run gets, has faults with fp8 (torch 2.13.0: some kernels are no C++, others leave bytes
    of a transposed operand unwritten).
    """
    case = Case(1, 1, 2, fp8(recipe, **LLAMA))
    program = Case(1, 1, 2, fp8(recipe, **LLAMA, **{"train.compile": True}))
    found = runs.pool.run(train_traced, program.config(), 3, layout=case.layout)
    plain = runs.pool.run(train, case.config(), 3, False, layout=case.layout)
    for report, eager in zip(found, plain, strict=True):
        assert report.losses == eager.losses
        for (_, _, gradient), (_, _, wanted) in zip(report.gradients, eager.gradients, strict=True):
            assert torch.equal(gradient, wanted)


def in_fp8(config: RunConfig) -> dict[str, bool]:
    """Return of each linear layer whether its products are in fp8."""
    model = build_stage(config, 64, ParallelMesh.on_meta(RankLayout(), 0))
    build_executor(config, model, ParallelMesh.on_meta(RankLayout(), 0))
    layers = {name: layer.linear for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert isinstance(model.head, nn.Module) and not isinstance(model.head, Linear)
    found = {}
    for name, linear in layers.items():
        products = linear.keywords.get("products") if isinstance(linear, partial) else getattr(linear, "__self__", None)
        found[name] = isinstance(products, Float8Products)
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_the_blocks_projections_are_in_fp8_and_nothing_else_is(schedule: str) -> None:
    chosen = fp8("rowwise", **{"model.mtp_depth": 1, "parallel.schedule": schedule, "model.layers": 1})
    assert in_fp8(Case(overrides=chosen).config()) == {
        **{f"blocks.{n}.attention.project.qkv": True for n in range(2)},
        **{f"blocks.{n}.{name}": True for n in range(2) for name in ("attention.out", "mlp.up", "mlp.down")},
        "joins.1": False,
    }
    assert not any(in_fp8(Case(overrides={**chosen, "train.fp8": "none"}).config()).values())
    multi = in_fp8(Case(overrides={**chosen, "model.kv_heads": 1}).config())
    assert multi["blocks.0.attention.project"] and not multi["joins.1"]
    latent = in_fp8(Case(overrides={**chosen, "model.kv_rank": 32, "model.rope_head_dim": 16}).config())
    assert latent["blocks.0.attention.project"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("precision=fp32", "precision=fp32 does not go with it: what is not rounded to fp8 is in bf16; use precision="),
        ("run.device=cpu", "run.device=cpu has no products in fp8; use a GPU that has them, or train.fp8=none"),
        ("zero.stage=3", "zero.stage=3 does not go with it: DeepSpeed's own linear layer, which lets go of gathered"),
        ("model.experts=4", "model.experts=4 does not go with it: the products of experts, most of the work, have no"),
        ("model.ffn=328", "multiples of 16, and these are not: mlp.down=328; use other sizes, or train."),
        ("parallel.tensor=8", "and these, divided over parallel.tensor=8, are not: "),
        ("train.micro_batch=1 model.sequence=72", "a rank's 72 tokens of a microbatch, over which weights' gradients"),
        (
            "parallel.tensor=2 overlap.tensor_chunks=3",
            "tokens of a microbatch, in 3 chunks (overlap.tensor_chunks), over",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, said: str) -> None:
    base = ["train.fp8=rowwise", "precision=bf16", "model.ffn=320", "model.heads=8", "model.kv_heads=8"]
    base += ["model.hidden=128", "train.global_batch=8"]
    assert load_recipe("gpt-tiny", base).train.fp8 == "rowwise"
    with pytest.raises(ConfigError) as caught:
        load_recipe("gpt-tiny", [*base, *override.split()])
    message = str(caught.value)
    assert said in message and "train.fp8=rowwise" in message and "\n" not in message


def test_tokens_are_no_matter_where_weights_gradients_are_in_bf16() -> None:
    load_recipe(
        "gpt-tiny",
        ["train.fp8=rowwise_with_gw_hp", "precision=bf16", "train.micro_batch=1", "model.sequence=72"],
    )


GPU = {"name": "Some GPU", "gcnArchName": ""}


@pytest.mark.parametrize(
    ("gpu", "hip", "said"),
    [
        (SimpleNamespace(major=8, minor=9, **GPU), None, None),
        (SimpleNamespace(major=12, minor=0, **GPU), None, None),
        (SimpleNamespace(major=8, minor=0, **GPU), None, "GPU 0 here, Some GPU, is of compute capability 8.0; use"),
        (SimpleNamespace(major=9, minor=0, name="MI250", gcnArchName="gfx90a:sramecc+"), "6", "MI250, is of gfx90a;"),
        (SimpleNamespace(major=9, minor=4, name="MI300X", gcnArchName="gfx942:sramecc+"), "6", None),
    ],
)
def test_a_gpu_without_fp8_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpu: Any, hip: str | None, said: str | None
) -> None:
    config = load_recipe("gpt-tiny", ["train.fp8=tensorwise", "precision=bf16"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.fp8=tensorwise needs a GPU .*computes on cpu; use train\.fp8=none"):
        check_device(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    if said is None:
        check_device(config)
        return
    with pytest.raises(ConfigError) as caught:
        check_device(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_goes_on_with_the_products_it_began_with(tmp_path: Path) -> None:
    begun = [f"run.dir={tmp_path}", "precision=bf16"]
    open_run(load_recipe("gpt-tiny", [*begun, "train.fp8=rowwise"]), "data", "tokenizer", 1, 1).claim()
    check_run(load_recipe("gpt-tiny", [*begun, "train.fp8=rowwise", "train.compile=true"]), "data", "tokenizer")
    with pytest.raises(ConfigError, match=r'train\.fp8="rowwise" there, "none" here'):
        check_run(load_recipe("gpt-tiny", begun), "data", "tokenizer")


def train_by_command(place: Path, run: str, *chosen: str) -> list[float]:
    """Return the losses of 40 steps of a small model, as `megalm train` has them on this machine's device."""
    model = (
        "model.hidden=256",
        "model.heads=4",
        "model.dropout=0",
        "model.sequence=64",
        "precision=bf16",
        "optim.lr=5e-4",
    )
    done = megalm(place, "train", "recipe.yaml", f"run.dir={run}", "checkpoint.every=0", *model, *chosen)
    assert done.returncode == 0, done.stderr
    return [line["train/loss"] for line in read_metrics(place / run / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("program", ["train.compile=false", "train.compile=true"])
def test_a_gpu_trains_near_bf16(tmp_path: Path, program: str) -> None:
    place = make_workplace(tmp_path / "place")
    sixteen = train_by_command(place, "bf16")
    assert len(sixteen) == 40 and sixteen[-1] < 0.7 * sixteen[0]
    for recipe in RECIPES:
        found = train_by_command(place, recipe, f"train.fp8={recipe}", program)
        assert found != sixteen and apart(found, sixteen) < 0.02
