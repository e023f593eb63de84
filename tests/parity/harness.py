"""Runs one recipe in one layout on the pool's processes and holds it against the one-process reference.

What is compared: the gradient of every logical parameter at step 1, assembled from what the ranks hold and
the same wherever two ranks hold it; the loss and the gradient norm of every step. Tokens are random, and so
is the loss mask, so that data ranks and microbatches have different numbers of valid tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.data.loader import Batch
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.models.build import build_executor, build_stage
from megalm.train.compilation import compile_blocks
from megalm.train.optimizers import build_optimizer, freeze
from megalm.train.trainer import Trainer, TrainState
from megalm.zero.build import build_engine, partitioner
from tests.offloading import offloading_on_a_cpu
from tests.parity.reference import Reference
from tests.parity.reference_masks import DOCUMENT_START
from tests.worker_pool import WorkerPool, at_world_end

VOCAB = 67
"""Prime, so that no tensor size but 1 divides it."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


LLAMA: dict[str, Any] = {
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.position": "rotary",
    "model.kv_heads": 2,
    "model.bias": False,
    "model.tie_embeddings": False,
}
"""The overrides of a model of the other kind: everything that GPT-2 does not have."""


@dataclass(frozen=True)
class Case:
    """A recipe, as overrides of the base below, in a layout."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> RankLayout:
        """The layout of the ranks."""
        context, expert = (self.overrides.get(f"parallel.{axis}", 1) for axis in ("context", "expert"))
        return RankLayout(self.pipeline, self.data, self.tensor, context, expert)

    @property
    def name(self) -> str:
        """A name that tells cases apart."""
        rest = dict(self.overrides)
        words = []
        if LLAMA.items() <= rest.items():
            words.append("llama")
            rest = {key: value for key, value in rest.items() if key not in LLAMA}
        context = rest.pop("parallel.context", 1)
        words += [f"{key.split('.')[-1]}={str(value).replace(' ', '')}" for key, value in rest.items()]
        ranks = f"t{self.tensor}p{self.pipeline}" + f"c{context}" * (context > 1) + f"d{self.data}"
        return " ".join([ranks, *words])

    def config(self, **more: Any) -> RunConfig:
        """Return the whole recipe; `more` are sections' dotted keys with __ for the dot."""
        sections: dict[str, Any] = {
            "seed": 7,
            "model": {"layers": 4, "hidden": 32, "heads": 4, "sequence": 16, "init_std": 0.1},
            "parallel": {"tensor": self.tensor, "pipeline": self.pipeline},
            "train": {"steps": 30, "global_batch": 8, "micro_batch": 2, "clip_grad_norm": 0.5},
            "optim": {"lr": 1e-3, "kind": "adamw"},
            "lr_schedule": {"warmup_steps": 5},
            "precision": "fp64",
        }
        for key, value in {**self.overrides, **{k.replace("__", "."): v for k, v in more.items()}}.items():
            section, _, inner = key.partition(".")
            if inner:
                sections.setdefault(section, {})[inner] = value
            else:
                sections[section] = value
        zero = sections.get("zero", {})
        if zero.get("stage") == 3 and zero.get("config", "zero3") in ("zero3", "zero3-offload"):
            # The shipped ones leave small weights whole, so of the models here all.
            zero["config"] = str(Path(__file__).with_name(f"{zero.get('config', 'zero3')}-divided.json"))
        return RunConfig.model_validate(sections)


@dataclass
class RankReport:
    """What one rank saw: the losses and norms of all steps, the gradients of step 1, and what it held in bytes."""

    losses: list[float]
    norms: list[float]
    gradients: list[tuple[ShardSpec, int, Tensor]]
    held_bytes: dict[str, int]


class RandomText:
    """Random tokens and masks, functions of the sample's number; the loader's interface.

    With rows of `documents` the masks say what is padding, whose tokens are random too: nothing may depend on them.
    """

    def __init__(self, vocab: int, config: RunConfig, data_rank: int, data_size: int) -> None:
        self.vocab, self.sequence, self.rows = vocab, config.model.sequence, config.data.rows
        self.data_rank, self.data_size = data_rank, data_size

    def batch(self, first_sample: int, global_batch: int, rows: int) -> Batch:
        """Return this data rank's rows; those behind the end of the global batch have tokens too, and no loss."""
        first = first_sample + self.data_rank * rows
        samples = zip(*map(self._sample, range(first, first + rows)), strict=True)
        batch = Batch(*(torch.stack(parts) for parts in samples))
        batch.loss_mask_BT[max(0, first_sample + global_batch - first) :] = False
        return batch

    def _sample(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + number)
        tokens = torch.randint(self.vocab, (self.sequence + 1,), generator=generator)
        if self.rows == "documents":
            mask = torch.arange(self.sequence) < torch.randint(1, self.sequence + 1, (), generator=generator)
        else:
            mask = torch.rand(self.sequence, generator=generator) < (0.3 + 0.6 * (number % 3) / 2)
            mask[number % self.sequence] = True  # a batch of one sample has a loss too
        return tokens[:-1], tokens[1:], mask


def train_rank(
    mesh: ParallelMesh, config: RunConfig, steps: int, fault: Callable[[Trainer], None] | None = None
) -> RankReport:
    """Train this rank for some steps; `fault` may break the trainer first."""
    trainer = build_trainer(mesh, config)
    if fault is not None:
        fault(trainer)
    report = RankReport([], [], [], {})
    reduce = trainer.engine.reduce

    def reduce_and_look() -> None:
        reduce()
        if trainer.state.step == 0:
            held: list[Fragment] = list(trainer.engine.gradients())
            factor = trainer.loss_factors()[1]
            report.gradients = [(f.shard, f.start, f.values.detach() * factor) for f in held]
        if trainer.state.step == steps - 1:
            report.held_bytes = vars(trainer.engine.held_bytes())

    trainer.engine.reduce = reduce_and_look  # type: ignore[method-assign]
    for _ in range(steps):
        result = trainer.train_step()
        report.losses.append(result.loss)
        report.norms.append(result.grad_norm)
    return report


def build_trainer(mesh: ParallelMesh, config: RunConfig) -> Trainer:
    """Return a trainer over random text, built from the parts that `megalm train` uses."""
    torch.use_deterministic_algorithms(True)
    with offloading_on_a_cpu():
        model = build_stage(config, VOCAB, mesh, partitioner(config, mesh), DOCUMENT_START)
    freeze(config.optim, model.parameters())
    make_optimizer = partial(build_optimizer, config.optim, width_factor=config.model.width_factor, seed=config.seed)
    if config.train.compile:
        compile_blocks(model)
    engine = build_engine(config, model, mesh, make_optimizer, model.tied_weight)
    if config.zero.stage > 0:
        from megalm.zero.deepspeed_engine import forget_world

        if forget_world not in at_world_end:
            at_world_end.append(forget_world)
    executor = build_executor(config, engine.module, mesh)
    text = RandomText(VOCAB, config, mesh.coordinates.data, mesh.size("data"))
    return Trainer(config, mesh, executor, engine, text, TrainState())  # type: ignore[arg-type]


Expected = tuple[dict[str, Tensor], list[float], list[float]]
"""The reference's gradients of step 1, its losses, its gradient norms."""


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the reference: relative, the worst over parameters or steps."""

    gradient: float
    worst_parameter: str
    loss: float
    norm: float


def reference_run(config: RunConfig, steps: int) -> Expected:
    """Return the reference's gradients of step 1 and its losses and norms."""
    reference = Reference(config, VOCAB, DTYPES[config.precision])
    text = RandomText(VOCAB, config, 0, 1)
    gradients: dict[str, Tensor] = {}
    losses, norms = [], []
    for step, (first_sample, batch_size, length) in zip(range(steps), steps_data(config), strict=False):
        batch = text.batch(first_sample, batch_size, batch_size)
        whole = (batch.tokens_BT, batch.labels_BT, batch.loss_mask_BT)
        tokens, labels, mask = (torch.stack([p for row in part for p in row.split(length)]) for part in whole)
        parts = (tokens, labels, mask)
        if step == 0:
            gradients = reference.gradients(parts, 0)[1]
        loss, norm = reference.train_step(parts, step)
        losses.append(loss)
        norms.append(norm)
    return gradients, losses, norms


def steps_data(config: RunConfig) -> Iterator[tuple[int, int, int]]:
    """Yield each step's first sample, number of samples, and the length into which they are cut."""
    ramp, warmup = config.batch_ramp, config.sequence_warmup
    first, size, length = 0, ramp.start or config.train.global_batch, warmup.start or config.model.sequence
    for step in itertools.count(1):
        yield first, size, length
        first += size
        if ramp.every and step % ramp.every == 0:
            size = min(config.train.global_batch, size + (ramp.increment or ramp.start or 0))
        if warmup.every and step % warmup.every == 0:
            length = min(config.model.sequence, 2 * length)


def compare(reports: Sequence[RankReport], expected: Expected) -> Difference:
    """Return the differences of all ranks from the reference.

    A gradient's difference is relative to its own norm, or to 1e-6 of the global norm where that is larger.
    """
    gradients, losses, norms = expected
    global_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    worst, worst_name = 0.0, ""
    for name, values in assemble(reports).items():
        wanted = gradients[name].double()
        scale = max(float(wanted.norm()), 1e-6 * global_norm)
        difference = float((values.double() - wanted).norm()) / scale
        if not difference <= worst:
            worst, worst_name = difference, name
    missing = gradients.keys() - assemble(reports).keys()
    assert not missing, f"no rank holds a gradient of {sorted(missing)}"
    return Difference(
        gradient=worst,
        worst_parameter=worst_name,
        loss=max(_worst(report.losses, losses) for report in reports),
        norm=max(_worst(report.norms, norms) for report in reports),
    )


def _worst(values: Sequence[float], expected: Sequence[float]) -> float:
    differences = [abs(v - e) / abs(e) for v, e in zip(values, expected, strict=True)]
    return max((d if math.isfinite(d) else math.inf) for d in differences)


def assemble(reports: Sequence[RankReport]) -> dict[str, Tensor]:
    """Return whole logical tensors from all ranks' fragments; what two ranks hold must be equal to 1e-12."""
    locals_: dict[tuple[str, int, int | None], tuple[ShardSpec, Tensor]] = {}
    for report in reports:
        for spec, start, values in report.gradients:
            key = (spec.name, spec.start, spec.first_expert)
            if key not in locals_:
                whole = torch.full((math.prod(spec.local_shape),), math.nan, dtype=values.dtype)
                locals_[key] = (spec, whole)
            part = locals_[key][1][start : start + values.numel()]
            known = ~part.isnan()
            tolerance = 1e-12 if values.dtype == torch.float64 else 1e-5
            scale = values.abs().max().clamp_min(1e-30) if values.numel() else 1.0
            apart = ((part - values).abs()[known] / scale).max() if known.any() else torch.zeros(())
            assert apart <= tolerance, f"{spec.name}: two ranks hold different gradients, {float(apart):.1e} apart"
            part.copy_(values)
    tensors: dict[str, Tensor] = {}
    for spec, flat in locals_.values():
        assert not flat.isnan().any(), f"{spec.name}: no rank holds a part of its gradient"
        local = flat.view(spec.local_shape)
        if spec.dim is None:
            tensors[spec.name] = local
            continue
        whole = tensors.setdefault(spec.name, torch.full(spec.global_shape, math.nan, dtype=flat.dtype))
        if spec.first_expert is not None:
            whole = whole.narrow(0, spec.first_expert, spec.local_shape[0])
        whole.narrow(spec.dim, spec.start, spec.length).copy_(local.narrow(spec.dim, 0, spec.length))
        padding = local.narrow(spec.dim, spec.length, spec.local_shape[spec.dim] - spec.length)
        assert not padding.any(), f"{spec.name}: padding has a gradient"
    return tensors


def run_case(
    pool: WorkerPool, case: Case, steps: int, limit_s: float | None = None, **more: Any
) -> tuple[Difference, list[RankReport]]:
    """Train the case on the pool and compare it with the reference."""
    config = case.config(**more)
    reports = pool.run(train_rank, config, steps, layout=case.layout, timeout_s=limit_s)
    return compare(reports, reference_run(config, steps)), reports
