"""Sums over replicas run beside the last backward pass, in one order on all ranks, and change no bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.train import trainer as trainer_module
from megalm.zero import overlap
from megalm.zero.engine import chunks_of, shard_of
from megalm.zero.overlap import OverlappedSums, overlapped_buckets
from megalm.zero.replicated import ReplicatedEngine
from tests.parity.harness import Case, build_trainer
from tests.worker_pool import WorkerError, WorkerPool
from tests.zero.runs import run_steps

ON = {"overlap.gradients": True}
EXPERTS = {"model.experts": 4, "model.expert_ffn": 16, "parallel.expert": 2}
CHUNKS = {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2}


def test_buckets_go_from_the_last_parameter_to_the_first_and_hold_one_kind_each() -> None:
    tensors = [torch.empty(size) for size in (900, 5, 10, 20, 30, 40)]
    kinds = {5: "few", 40: "few"}
    found = list(overlapped_buckets(tensors, lambda tensor: kinds.get(tensor.numel(), "all")))
    assert [[tensor.numel() for tensor in bucket] for bucket in found] == [[30, 20, 10], [40, 5], [900]]
    assert not list(overlapped_buckets([], lambda tensor: "all"))


def test_a_small_model_has_eight_buckets_and_a_large_one_buckets_of_a_fixed_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overlap, "LARGEST_BUCKET", 1000)
    for count, size in ((64, 8), (9500, 1000)):
        found = [len(bucket) for bucket in overlapped_buckets([torch.empty(1)] * count, lambda tensor: "all")]
        assert set(found[:-1]) == {size} and sum(found) == count


@dataclass(frozen=True)
class Watched:
    """What happened on a rank in a step, in order: gradients by their names, and the elements of sums that began."""

    gradients: int
    microbatches: int
    events: list[str | int]
    kept: dict[str, Tensor]


def watch(mesh: ParallelMesh, config: Any, steps: int = 1) -> Watched:
    trainer = build_trainer(mesh, config)
    engine: Any = trainer.engine
    run_steps(trainer, steps - 1)
    events: list[str | int] = []

    def reduced(tensor: Tensor, *rest: Any, original: Any = dist.all_reduce, **options: Any) -> Any:
        if options.get("async_op"):
            events.append(tensor.numel())
        return original(tensor, *rest, **options)

    def came(weight: Tensor, name: str) -> None:
        events.append(name)

    weights = list(dict.fromkeys(engine.weights))
    handles = [w.register_post_accumulate_grad_hook(partial(came, name=shard_of(w).name)) for w in weights]
    # The engine's own hooks stand before these: a sum is noted before the gradient that it waited for.
    begun = engine.begin
    reduce, kept = engine.reduce, {}

    def reduce_and_keep() -> None:
        events.append("reduce")
        reduce()
        kept.update({f.shard.name: f.values.clone() for f in engine.gradients()})

    counts: list[int] = []
    engine.begin = lambda microbatches: (counts.append(microbatches), begun(microbatches))
    engine.reduce = reduce_and_keep
    with mock.patch.object(dist, "all_reduce", reduced):
        run_steps(trainer, 1)
    for handle in handles:
        handle.remove()
    return Watched(len(weights), counts[0], events, kept)


def check_order(found: Watched, passes: int) -> None:
    """Several sums begin before the last gradient is there, all behind the last microbatch's first."""
    gradients = [place for place, event in enumerate(found.events) if isinstance(event, str) and event != "reduce"]
    sums = [place for place, event in enumerate(found.events) if isinstance(event, int)]
    assert len(gradients) == passes
    early = [place for place in sums if place < gradients[-1]]
    assert len(early) >= len(sums) // 2 > 1, "most sums have something to run beside"
    before = [place for place in gradients if place < sums[0]]
    assert len(before) >= passes - found.gradients, "no sum begins before the step's last passes"


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        (Case(1, 2, 1, ON), None),
        (Case(1, 2, 1, {**ON, **EXPERTS}), None),
        (Case(1, 2, 1, {**ON, "parallel.schedule": "zb-h1"}), None),
        (Case(1, 2, 1, {**ON, **CHUNKS}), 1),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_sums_begin_while_gradients_are_still_made(
    pool: WorkerPool, case: Case, passes: int | None, precision: str
) -> None:
    """`passes`: how many parameters have gradients of two chunks."""
    ranks = pool.run(watch, case.config(precision=precision), 2, layout=case.layout)
    for found in ranks:
        assert found.microbatches == 2
        check_order(found, found.microbatches * (found.gradients + (passes or 0)))
    orders = [[event for event in found.events if isinstance(event, int)] for found in ranks]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        (RankLayout(data=2), {}),
        (RankLayout(data=2), {"precision": "fp16"}),
        (RankLayout(data=2), {"train.reduce_dtype": "bf16"}),
        (RankLayout(pipeline=2, data=2), {"parallel.schedule": "zb-v"}),
        (RankLayout(data=2, tensor=2), {"precision": "fp32", "parallel.sequence": True}),
    ],
)
def test_two_replicas_have_the_same_bits_with_and_without(
    pool: WorkerPool, layout: RankLayout, overrides: dict[str, Any]
) -> None:
    """A sum of two does not depend on its order, nor on zeros."""
    settings = {"precision": "bf16", **overrides}
    whole = [
        pool.run(
            watch, Case(layout.pipeline, layout.data, layout.tensor, {**settings, **on}).config(), 2, layout=layout
        )
        for on in ({}, ON)
    ]
    for off, on in zip(*whole, strict=True):
        assert off.kept.keys() == on.kept.keys() and off.kept
        for name, values in off.kept.items():
            assert torch.equal(values, on.kept[name]), name
        assert not [event for event in off.events if isinstance(event, int)]


def check_discarded(mesh: ParallelMesh, config: Any) -> list[float]:
    """A step that is dropped leaves no gradients, buckets or sums, and the next is as if it had not been."""
    norms = []
    for drops in (True, False):
        trainer = build_trainer(mesh, config)
        engine = trainer.engine
        assert isinstance(engine, ReplicatedEngine) and engine.overlapped is not None
        if drops:
            with mock.patch.object(trainer_module, "why_wrong", lambda *_: "a test"):
                assert trainer.train_step().wrong == "a test"
            assert all(master.grad is None for master in engine.masters)
            assert all(bucket._flat is None and bucket._sum is None for bucket in engine.overlapped._buckets)
            trainer.state.step = trainer.state.samples = 0
        norms.append(trainer.train_step().grad_norm)
    return norms


def test_a_step_that_is_dropped_leaves_nothing_under_way(pool: WorkerPool) -> None:
    case = Case(1, 2, 1, ON)
    for dropped, plain in pool.run(check_discarded, case.config(), layout=case.layout):
        assert dropped == plain


def one_too_many(mesh: ParallelMesh, config: Any) -> None:
    trainer = build_trainer(mesh, config)
    begin = trainer.engine.begin
    trainer.engine.begin = lambda microbatches: begin(microbatches - 1)  # type: ignore[method-assign]
    trainer.train_step()


def test_a_gradient_behind_its_sum_is_no_silent_loss(pool: WorkerPool) -> None:
    case = Case(1, 2, 1, ON)
    with pytest.raises(WorkerError, match="a gradient came after the last that was expected"):
        pool.run(one_too_many, case.config(), layout=case.layout)


def uses(mesh: ParallelMesh, config: Any) -> dict[str, int]:
    return {shard_of(p).name: chunks_of(p) for p in build_trainer(mesh, config).engine.module.parameters()}


@pytest.mark.parametrize(
    ("overrides", "twice"),
    [
        ({**CHUNKS}, ["embedding.weight"]),
        ({**CHUNKS, "model.tie_embeddings": False}, []),
        ({**CHUNKS, "model.tie_embeddings": False, "model.mtp_depth": 1}, ["embedding.weight"]),
        ({}, []),
    ],
)
def test_an_embedding_of_two_chunks_is_known(pool: WorkerPool, overrides: dict[str, Any], twice: list[str]) -> None:
    (found,) = pool.run(uses, Case(1, 1, 1, overrides).config(), layout=RankLayout())
    assert [name for name, count in found.items() if count > 1] == twice


def check_left_out(mesh: ParallelMesh) -> None:
    """A parameter without a gradient holds the buckets behind it up until the end, where zeros are summed."""
    engine = build_trainer(mesh, Case(1, 2, 1, ON).config()).engine
    assert isinstance(engine, ReplicatedEngine) and isinstance(engine.overlapped, OverlappedSums)
    engine.begin(1)
    used = engine.weights[:-1]
    torch.stack([weight.sum() for weight in used]).sum().backward()
    assert engine.overlapped._started == 0
    engine.reduce()
    for weight in engine.weights:
        assert weight.grad is not None and (weight.grad == (0.0 if weight is engine.weights[-1] else 2.0)).all()


def test_a_parameter_without_a_gradient_has_a_sum_of_zeros(pool: WorkerPool) -> None:
    pool.run(check_left_out, layout=RankLayout(data=2))
