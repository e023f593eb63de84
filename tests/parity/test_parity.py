"""Layouts compute what one plain process computes: gradients, losses, gradient norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.config.choices import CHOICES
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from tests.parity import options
from tests.parity.__main__ import markdown
from tests.parity.cases import (
    CASES,
    DROPOUT,
    FUSED_HEAD,
    LATENT,
    OPTIMIZERS,
    OUR_ADAMW,
    REPRESENTATIVE,
    SEQUENCE,
    UNFUSED_ATTENTION,
    misses,
)
from tests.parity.harness import LLAMA, Case, Difference, run_case, train_rank
from tests.worker_pool import WorkerPool

STEPS = 6
"""As many as see the learning rate's warm-up end; `make parity` trains longer."""


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=lambda case: case.name)
@pytest.mark.parametrize(("precision", "optimizer"), [("fp64", "adamw"), ("fp32", "sgd")])
def test_layout_equals_one_process(pool: WorkerPool, case: Case, precision: str, optimizer: str) -> None:
    difference, _ = run_case(pool, case, STEPS, precision=precision, **OPTIMIZERS[optimizer])
    assert not misses(difference, precision)


@pytest.mark.parametrize("case", options.each_value_once(), ids=lambda case: case.name)
def test_options_equal_their_formulas(pool: WorkerPool, case: Case) -> None:
    difference, _ = run_case(pool, case, options.STEPS, precision="fp64")
    assert not misses(difference, "fp64")


def test_each_two_options_that_may_meet_do_so_in_the_covering_array() -> None:
    cases = options.covering_array()
    assert len({case.name for case in cases}) == len(cases) >= 60
    assert not list(options.missing_pairs(options._rows()))
    assert len(options.each_value_once()) < len(cases) / 4


def test_cases_cover_every_axis_and_feature() -> None:
    configs: list[RunConfig] = [case.config() for case in CASES]
    layouts: list[RankLayout] = [case.layout for case in CASES]
    assert len({case.name for case in CASES}) == len(CASES) >= 24
    assert max(layout.world_size for layout in layouts) == 8
    assert {layout.tensor for layout in layouts} >= {1, 2, 4}
    assert {layout.pipeline for layout in layouts} >= {1, 2, 3, 4}
    assert {layout.data for layout in layouts} >= {1, 2, 4}
    assert {config.zero.stage for config in configs} == {0, 1, 2, 3}
    assert {config.parallel.schedule for config in configs} == set(CHOICES["schedule"])
    assert {config.parallel.sequence for config in configs} == {True, False}
    assert {config.model.tie_embeddings for config in configs} == {True, False}
    assert any(config.parallel.partition for config in configs)
    assert any(config.model.dropout > 0 for config in configs)
    assert len({config.train.global_batch // config.train.micro_batch for config in configs}) >= 3


@pytest.mark.parametrize(
    "features",
    [
        DROPOUT,
        {**LLAMA, **SEQUENCE},
        {**FUSED_HEAD, **OUR_ADAMW, **UNFUSED_ATTENTION},
        {**LATENT, **SEQUENCE},
    ],
    ids=str,
)
def test_a_model_of_fused_kernels_equals_one_plain_process(pool: WorkerPool, features: dict[str, Any]) -> None:
    """Interpreted on a CPU: the masks of dropout, the tensor axis and the update are those of plain torch."""
    case = Case(1, 1, 2, {**features, "model.kernels": "fused", "model.layers": 2, "train.global_batch": 4})
    difference, _ = run_case(pool, case, 2, precision="fp32")
    assert not misses(difference, "fp32")


@pytest.mark.parametrize(("stage", "kind"), [(0, "1f1b"), (1, "1f1b"), (2, "1f1b"), (0, "zb-v"), (2, "dualpipe-v")])
def test_bf16_follows_the_reference_through_a_pipeline(pool: WorkerPool, stage: int, kind: str) -> None:
    """bf16 rounds by 2^-9, so curves part by about that; a gradient that is wrong, not rounded, moves them more."""
    overrides = {"zero.stage": stage, "precision": "bf16", "train.micro_batch": 1, "parallel.schedule": kind}
    case = Case(2, 2, 2, overrides)
    difference, _ = run_case(pool, case, 10)
    assert difference.gradient < 0.05
    assert difference.loss < 2e-3
    assert difference.norm < 2e-2


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("bf16", 2), ("fp16", 1)])
def test_split_backwards_give_the_bits_of_whole_ones(pool: WorkerPool, precision: str, stage: int) -> None:
    """With the same layers on each stage the same numbers are added in the same order, whatever the precision."""
    found = []
    for kind in ("1f1b", "zb-h1", "zb-h2"):
        case = Case(2, 2, 1, {"parallel.schedule": kind, "zero.stage": stage, "train.recompute": "full", **DROPOUT})
        config = case.config(precision=precision, train__micro_batch=1)
        reports = pool.run(train_rank, config, 4, layout=case.layout)
        found.append((reports[0].losses, reports[0].norms, [g for report in reports for *_, g in report.gradients]))
    for losses, norms, gradients in found[1:]:
        assert losses == found[0][0] and norms == found[0][1]
        assert all(torch.equal(one, other) for one, other in zip(gradients, found[0][2], strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_holds_what_zero_promises(pool: WorkerPool, stage: int) -> None:
    data = 4
    shape = {"model.hidden": 64, "model.layers": 4}
    _, replicated = run_case(pool, Case(1, data, 1, shape), 2, precision="fp32")
    _, reports = run_case(pool, Case(1, data, 1, {**shape, "zero.stage": stage}), 2, precision="fp32")
    whole = replicated[0].held_bytes
    for report in reports:
        held = report.held_bytes
        for name, from_stage in (("optimizer", 1), ("gradients", 2), ("weights", 3)):
            share = data if stage >= from_stage else 1
            limit = 1.05 * whole[name] / share
            assert held[name] <= limit, f"stage {stage}: {name} {held[name]} of {whole[name]} bytes, at most {limit}"


def test_the_page_of_a_run_has_the_largest_differences_of_each_recipe() -> None:
    small, large = Difference(1e-15, "w", 2e-16, 1e-15), Difference(3e-15, "w", 1e-16, 2e-15)
    page = markdown({"t1": [("fp64", small), ("fp64", large), ("fp32", small)], "t2": [("fp64", None)]}, "a total")
    assert "| t1 | 3e-15 | 1e-15 | 2e-16 | 2e-16 | 1e-15 |" in page
    assert "| t2 | failed |  | failed |  |  |" in page
    assert "**a total**" in page
