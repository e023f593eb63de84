"""Small training runs of the engines in any layout, stopped, saved to memory and resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment
from megalm.errors import MegalmError
from megalm.train.trainer import Trainer, TrainState
from tests.parity.harness import VOCAB, Case, build_trainer
from tests.parity.reference import parameter_shapes
from tests.shards import Store

SMALL: dict[str, Any] = {
    "model.hidden": 12, "model.heads": 2, "model.sequence": 4, "model.dropout": 0.1,
    "train.global_batch": 4, "train.micro_batch": 1, "lr_schedule.warmup_steps": 2, "optim.weight_decay": 0.1,
}  # fmt: skip
ADAMW: dict[str, Any] = {"optim.kind": "adamw", "optim.lr": 0.01}
SGD: dict[str, Any] = {"optim.kind": "sgd", "optim.lr": 0.1, "optim.momentum": 0.5}
KINDS = {"adamw": {"weight", "exp_avg", "exp_avg_sq"}, "sgd": {"weight", "momentum_buffer"}}
STEPS = 3


@dataclass(frozen=True)
class Cell:
    """What an engine is told: a ZeRO stage or the name of a DeepSpeed JSON, a precision, an optimizer."""

    zero: str
    precision: str
    optimizer: str = "adamw"

    def config(self, mesh: ParallelMesh, **overrides: Any) -> RunConfig:
        """Return the recipe for the mesh."""
        stage = int(self.zero.removeprefix("zero")[0])
        chosen = {"zero.stage": stage, "zero.config": self.zero, "precision": self.precision}
        optimizer = SGD if self.optimizer == "sgd" else ADAMW
        layout = mesh.layout
        values = {**SMALL, "model.layers": layout.pipeline, **optimizer, **chosen, **overrides}
        case = Case(layout.pipeline, layout.data, layout.tensor, values)
        return case.config()


def run_steps(trainer: Trainer, steps: int) -> list[float]:
    """Return the losses and gradient norms of some steps."""
    figures = []
    for _ in range(steps):
        result = trainer.train_step()
        figures += [trainer.mean_loss(result), result.grad_norm]
    return figures


def saved(trainer: Trainer) -> Store:
    """Return what all ranks' engines give to be saved, on every rank."""
    own = [Fragment(f.shard, f.kind, f.start, f.values.detach().clone()) for f in trainer.engine.state()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return Store(fragment for fragments in everyone for fragment in fragments)


def held_weights(trainer: Trainer) -> list[Tensor]:
    """Return the weights that this rank computes with; under stage 3 its partitions of them."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in trainer.engine.module.parameters()]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """Fail unless the two lists are the same, bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_state_is_whole(store: Store, config: RunConfig) -> None:
    """Fail unless every logical tensor of every kind is there, each element once, masters not narrower than fp32."""
    store.assert_tiled_once()
    assert store.kinds() == KINDS[config.optim.kind]
    shapes = parameter_shapes(config, VOCAB)
    for kind in store.kinds():
        assert {name for name, other in store.wholes if other == kind} == shapes.keys(), kind
    assert store.shapes == shapes
    wide = torch.float64 if config.precision == "fp64" else torch.float32
    assert {whole.dtype for whole in store.wholes.values()} == {wide}


def check_resume(mesh: ParallelMesh, cell: Cell, past_steps: int = 1) -> None:
    """Save after some steps, load into a trainer with other weights and another past, go on: the same bits."""
    config = cell.config(mesh)
    unbroken = build_trainer(mesh, config)
    run_steps(unbroken, STEPS)
    store, weights = saved(unbroken), held_weights(unbroken)
    check_state_is_whole(store, config)

    resumed = build_trainer(mesh, config.model_copy(update={"seed": 99}))
    run_steps(resumed, past_steps)
    resumed.config = config
    resumed.engine.load(store.read, sorted(store.kinds() - {"weight"}), STEPS)
    resumed.state = TrainState(**vars(unbroken.state))
    store.assert_same(saved(resumed))
    assert_equal(weights, held_weights(resumed))

    expected, found = run_steps(unbroken, STEPS), run_steps(resumed, STEPS)
    assert found == expected, f"losses and norms {found}, unbroken {expected}"
    saved(unbroken).assert_same(saved(resumed))
    assert_equal(held_weights(unbroken), held_weights(resumed))


def check_non_finite(mesh: ParallelMesh, cell: Cell, bad: float) -> None:
    """One data rank's loss is not finite: no rank updates, and the run goes on as if the step had not been."""
    config = cell.config(mesh)
    plain, hit = (build_trainer(mesh, config) for _ in range(2))
    for trainer in (plain, hit):
        run_steps(trainer, 1)
    before, weights = saved(hit), held_weights(hit)
    factor = hit.engine.loss_factor
    if mesh.coordinates.data == mesh.size("data") - 1:
        hit.engine.loss_factor = bad
    try:
        hit.train_step()
        raise AssertionError("a non-finite gradient went unnoticed")
    except MegalmError as error:
        assert "step 2: the gradient norm is" in str(error)
    hit.engine.loss_factor = factor
    assert hit.state.step == 1
    before.assert_same(saved(hit))
    assert_equal(weights, held_weights(hit))
    expected, found = run_steps(plain, 2), run_steps(hit, 2)
    assert found == expected, f"losses and norms {found}, without the step {expected}"
    saved(plain).assert_same(saved(hit))


def check_cells(mesh: ParallelMesh, check: Any, cells: list[Cell], *args: Any) -> None:
    """Run a check for each cell in this world; the error names the cell."""
    for cell in cells:
        try:
            check(mesh, cell, *args)
        except Exception as error:
            raise AssertionError(f"{cell}: {type(error).__name__}: {error}") from error
