"""Small training runs of the engines in any layout, stopped, saved to memory and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import DamagedCheckpoint
from megalm.train.narrow_state import NarrowState
from megalm.train.trainer import Trainer, TrainState
from tests.parity.harness import VOCAB, Case, build_trainer
from tests.parity.reference import Reference, parameter_shapes
from tests.shards import Store

SMALL: dict[str, Any] = {
    "model.hidden": 12, "model.heads": 2, "model.sequence": 4, "model.dropout": 0.1,
    "train.global_batch": 4, "train.micro_batch": 1, "lr_schedule.warmup_steps": 2, "optim.weight_decay": 0.1,
}  # fmt: skip
ADAMW: dict[str, Any] = {"optim.kind": "adamw", "optim.lr": 0.01}
SGD: dict[str, Any] = {"optim.kind": "sgd", "optim.lr": 0.1, "optim.momentum": 0.5}
OTHERS: dict[str, dict[str, Any]] = {
    "lion": {"optim.kind": "lion", "optim.lr": 1e-3},
    "rmsprop": {"optim.kind": "rmsprop", "optim.momentum": 0.5, "optim.lr": 1e-3},
    "adagrad": {"optim.kind": "adagrad", "optim.lr": 0.01},
    "adam": {"optim.kind": "adam", "optim.lr": 0.01, "optim.rules": [{"match": "*.qkv.*", "lr": 0.5}]},
}
PLACED: dict[str, dict[str, Any]] = {
    "adafactor": {"optim.kind": "adafactor", "optim.lr": 0.01, "optim.rules": [{"match": "*.bias", "lr": 0.5}]},
    "muon": {"optim.kind": "muon", "optim.lr": 0.01, "optim.rules": [{"match": "*.mlp.down.weight", "muon": False}]},
    "narrow adamw": {**ADAMW, "optim.state_dtype": "bf16"},
    "narrow sgd": {**SGD, "optim.state_dtype": "bf16"},
}
EIGHT_BITS: dict[str, Any] = {"optim.kind": "adamw8bit", "optim.lr": 0.01, "model.hidden": 64}
CHOSEN = {"adamw": ADAMW, "sgd": SGD, **OTHERS, **PLACED, "adamw8bit": EIGHT_BITS}
KINDS = {
    "adamw": {"weight", "exp_avg", "exp_avg_sq"},
    "adam": {"weight", "exp_avg", "exp_avg_sq"},
    "sgd": {"weight", "momentum_buffer"},
    "lion": {"weight", "exp_avg"},
    "rmsprop": {"weight", "momentum_buffer", "square_avg"},
    "adagrad": {"weight", "sum"},
    "muon": {"weight", "momentum_buffer", "exp_avg", "exp_avg_sq"},
    "adafactor": {"weight", "row_var", "col_var", "variance"},
    "adamw8bit": {"weight"} | {f"exp_avg{end}" for end in ("", "_codes", "_scales", "_sq", "_sq_codes", "_sq_scales")},
}
STEPS = 3
LOW_MEMORY = "low-memory-bf16"


@dataclass(frozen=True)
class Cell:
    """What an engine is told: a ZeRO stage or a DeepSpeed JSON's name (`path`: its file), a precision, an optimizer."""

    zero: str
    precision: str
    optimizer: str = "adamw"
    path: str | None = None

    def config(self, mesh: ParallelMesh, **overrides: Any) -> RunConfig:
        """Return the recipe for the mesh."""
        stage = int(self.zero.removeprefix("zero")[0])
        chosen = {"zero.stage": stage, "zero.config": self.path or self.zero, "precision": self.precision}
        layout = mesh.layout
        values = {**SMALL, "model.layers": layout.pipeline, **CHOSEN[self.optimizer], **chosen, **overrides}
        case = Case(layout.pipeline, layout.data, layout.tensor, values)
        return case.config()


def run_steps(trainer: Trainer, steps: int) -> list[float]:
    """Return the losses and gradient norms of some steps."""
    figures = []
    for _ in range(steps):
        result = trainer.train_step()
        figures += [result.loss, result.grad_norm]
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
    """Fail unless every logical tensor of every kind is there, each element once, in the dtype of the masters.

    Frozen weights are there as the model has them, and nothing else of them. Adafactor's means have other shapes.
    """
    store.assert_tiled_once()
    assert store.kinds() == KINDS[config.optim.kind] | ({"ema"} if config.optim.ema_decay else set())
    shapes = parameter_shapes(config, VOCAB)
    trained = Reference(config, VOCAB, torch.float64).trained().keys()
    wide = torch.float64 if config.precision == "fp64" else torch.float32
    wide = torch.bfloat16 if config.zero.config == LOW_MEMORY else wide
    if config.model.router_bias_rate is not None:  # kept with the weights, and trained by no optimizer
        routers = [name for name in shapes if name.endswith(".router.weight")]
        shapes |= {name.replace(".weight", ".bias"): shapes[name][:1] for name in routers}
    for kind in store.kinds():
        expected = {name for name in (shapes if kind == "weight" else trained) if has(config, name, kind)}
        own = {name: whole for (name, other), whole in store.wholes.items() if other == kind}
        if kind in ("weight", "ema") or config.optim.kind not in ("adafactor", "adamw8bit"):
            assert own.keys() == expected, kind
            assert {name: store.shapes[name, kind] for name in own} == {name: shapes[name] for name in expected}
            narrow = config.optim.state_dtype is not None and kind not in ("weight", "ema")
            found = {whole.dtype for name, whole in own.items() if name in trained}
            assert found == {torch.bfloat16 if narrow else wide}, kind
    for name in trained:  # each has some state, if not of each kind
        assert any(other == name and kind not in ("weight", "ema") for other, kind in store.wholes), name


def has(config: RunConfig, name: str, kind: str) -> bool:
    """Return whether a parameter has a state of a kind: under Muon either a momentum or AdamW's two."""
    if config.optim.kind != "muon" or kind in ("weight", "ema"):
        return True
    hidden = name.startswith("blocks.") and name.endswith((".qkv.weight", ".out.weight", ".up.weight"))
    return hidden == (kind == "momentum_buffer")


def load_damaged(mesh: ParallelMesh, trainer: Trainer, store: Store, reads: int) -> None:
    """Fail unless all ranks fail alike where the last one finds damage after some reads."""
    left = reads if mesh.rank == mesh.layout.world_size - 1 else -1

    def read(shard: ShardSpec, kind: str, start: int, stop: int, out: Tensor) -> None:
        nonlocal left
        if left == 0:
            raise DamagedCheckpoint("a block is not what it was")
        left -= 1
        store.read(shard, kind, start, stop, out)

    with pytest.raises(DamagedCheckpoint, match="a block is not"):
        trainer.engine.load(read, sorted(store.kinds() - {"weight"}), STEPS)


def check_resume(
    mesh: ParallelMesh, cell: Cell, past_steps: int = 1, overrides: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Save after some steps, load into a trainer with other weights and another past, go on: the same bits.

    A load that finds damage, as of a newer checkpoint, comes first.
    """
    config = cell.config(mesh, **overrides)
    unbroken = build_trainer(mesh, config)
    run_steps(unbroken, STEPS)
    store, weights = saved(unbroken), held_weights(unbroken)
    check_state_is_whole(store, config)

    resumed = build_trainer(mesh, config.model_copy(update={"seed": 99}))
    run_steps(resumed, past_steps)
    resumed.config = config
    engine: Any = resumed.engine
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(inner, NarrowState):
        inner._seed = config.seed
    load_damaged(mesh, resumed, store, reads=3)
    resumed.engine.load(store.read, sorted(store.kinds() - {"weight"}), STEPS)
    resumed.state = TrainState(**vars(unbroken.state))
    store.assert_same(saved(resumed))
    assert_equal(weights, held_weights(resumed))

    expected, found = run_steps(unbroken, STEPS), run_steps(resumed, STEPS)
    assert found == expected, f"losses and norms {found}, unbroken {expected}"
    saved(unbroken).assert_same(saved(resumed))
    assert_equal(held_weights(unbroken), held_weights(resumed))


def check_skipped(mesh: ParallelMesh, cell: Cell, bad: float | None) -> None:
    """A step goes wrong: no rank updates, and the run goes on as if the step had not been.

    `bad` is the factor of one data rank's loss, which makes gradients that are not finite, or whose norm is too large;
    None: the loss is a spike.
    """
    config = cell.config(mesh)
    plain, hit = (build_trainer(mesh, config) for _ in range(2))
    for trainer in (plain, hit):
        run_steps(trainer, 1)
    before, weights, state = saved(hit), held_weights(hit), vars(hit.state).copy()
    factor = hit.engine.loss_factor
    if bad is None:
        hit.state.losses = [1e-3] * config.stability.spike_window
    elif mesh.coordinates.data == mesh.size("data") - 1:
        hit.engine.loss_factor = bad
    result = hit.train_step()
    expected = "the gradient norm is" if bad is not None else "standard deviations above the mean 0.0010 of the last"
    assert result.wrong is not None and expected in result.wrong, result
    hit.engine.loss_factor = factor
    assert (hit.state.step, hit.state.skipped, hit.state.updates) == (2, 1, 1)
    before.assert_same(saved(hit))
    assert_equal(weights, held_weights(hit))
    hit.state = TrainState(**state)
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
