"""train.compile: the blocks as programs compute what the formulas say, in every layout, and are made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.train.compilation import compile_blocks
from megalm.train.metrics_file import read_events, read_metrics
from tests.end_to_end.workplace import make_workplace, megalm
from tests.parity.cases import misses
from tests.parity.harness import LLAMA, Case, RankReport, build_trainer, compare, reference_run, train_rank
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerPool

COMPILED = {"train.compile": True}
STEPS = 3


def train_and_count(mesh: ParallelMesh, case: Case) -> tuple[RankReport, int, int]:
    """Return what this rank saw, the number of programs made in the first step, and of those made later."""
    torch._dynamo.reset()
    counters.clear()
    made: list[int] = []

    def count(trainer: Any) -> None:
        trainer.before_update.append(lambda _: made.append(counters["stats"]["unique_graphs"]))

    report = train_rank(mesh, case.config(), STEPS, count)
    assert not counters["graph_break"], counters["graph_break"]
    return report, made[0], made[-1] - made[0]


@pytest.mark.parametrize(
    ("case", "programs"),
    [
        (Case(2, 1, 2, {**COMPILED, **LLAMA, "parallel.sequence": True, "model.dropout": 0.1}), 1),
        (
            Case(
                1,
                2,
                1,
                {
                    **COMPILED,
                    "zero.stage": 2,
                    "zero.config": "zero2-offload",
                    "train.recompute": "full",
                    "train.offload_activations": True,
                    "model.activation": "relu",
                },
            ),
            1,
        ),
        (
            Case(
                2,
                2,
                1,
                {
                    **COMPILED,
                    "zero.stage": 1,
                    "train.recompute": "selective",
                    "model.dropout": 0.1,
                    "model.attention_dropout": 0.0,
                    "model.document_mask": True,
                    "model.position": "alibi",
                    "model.norm_place": "sandwich",
                },
            ),
            1,
        ),
        (
            Case(
                1,
                1,
                2,
                {
                    **COMPILED,
                    "model.window": 5,
                    "model.window_pattern": "SSL",
                    "model.kv_heads": 1,
                    "model.position": "t5",
                    "model.activation": "geglu",
                    "model.attention_sinks": True,
                    "model.attention_gate": True,
                },
            ),
            2,  # windows
        ),
        (
            Case(
                2,
                1,
                2,
                {
                    **COMPILED,
                    "parallel.sequence": True,
                    "model.position": "rotary",
                    "model.kv_rank": 12,
                    "model.q_rank": 10,
                    "model.value_head_dim": 5,
                    "model.mtp_depth": 1,
                },
            ),
            1,
        ),
        (Case(1, 1, 1, {**COMPILED, "model.stochastic_depth": 0.4}), 4),  # each block has a rate of its own
    ],
    ids=lambda value: f"{value.layout}" if isinstance(value, Case) else None,
)
def test_compiled_layouts_equal_one_process_and_are_compiled_in_the_first_step(
    pool: WorkerPool, case: Case, programs: int
) -> None:
    answers = pool.run(train_and_count, case, layout=case.layout)
    difference = compare([report for report, _, _ in answers], reference_run(case.config(), STEPS))
    assert not misses(difference, "fp64")
    assert [(first, later) for _, first, later in answers] == [(programs, 0)] * case.layout.world_size


def test_a_run_tells_how_long_it_compiled_and_resumes_bit_for_bit(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = make_workplace(tmp_path_factory.mktemp("compiled") / "place")
    for run, *stops in (("whole", 4), ("parts", 2, 4)):
        for stop in stops:
            settings = ("train.compile=true", "train.steps=4", f"train.stop_at={stop}", "evaluate.every=3")
            done = megalm(place, "train", "recipe.yaml", *settings, f"run.dir={run}")
            assert done.returncode == 0, done.stderr
    first, second = read_events(place / "whole" / "metrics.jsonl")
    assert (first["step"], first["event"]) == (1, "compiled") and first["seconds"] > 0.0
    assert (second["step"], second["event"]) == (4, "compiled") and second["seconds"] > 0.0, "for evaluation"
    assert all(step_s > 0.001 for step_s in step_times(place / "whole")), "the evaluation's was left out once"
    assert step_times(place / "whole")[0] < first["seconds"]
    weights = [sorted((place / run / "checkpoints/step-00000004").glob("*.safetensors")) for run in ("whole", "parts")]
    assert weights[0] and [a.read_bytes() for a in weights[0]] == [b.read_bytes() for b in weights[1]]


def step_times(run: Path) -> list[float]:
    """Return the seconds of each step, as its rate counts them."""
    return [record["time/step_s"] for record in read_metrics(run / "metrics.jsonl") if "time/step_s" in record]


def test_an_optimizer_that_compiles_its_update_is_told_and_left_out_of_the_rate(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    place = make_workplace(tmp_path / "place")
    done = megalm(place, "train", "recipe.yaml", "optim.kind=adamw8bit", "train.steps=2")
    assert (done.returncode, done.stderr) == (0, ""), "torchao tells of kernels that it cannot load"
    (event,) = read_events(place / "run" / "metrics.jsonl")
    assert (event["step"], event["event"]) == (1, "compiled")
    assert step_times(place / "run")[0] < event["seconds"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"zero": {"stage": 3}}, "train.compile=true does not work with zero.stage=3: DeepSpeed gathers weights by"),
        ({"model": {"dropout": 0.1, "kernels": "fused"}}, "does not work with dropout and fused kernels: they are"),
        ({"model": {"dropout": 0.1}, "run": {"device": "cuda"}}, "use model.kernels=reference, or train.compile=false"),
        ({"inspect": {"every": 2}}, "inspect.every=2 looks into the blocks, which train.compile=true makes programs"),
    ],
)
def test_what_cannot_be_compiled_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_recipe(train={"compile": True}, **sections)
    assert said in str(caught.value)


def check_a_missing_compiler(mesh: ParallelMesh) -> str:
    trainer: Any = build_trainer(mesh, Case().config())
    with pytest.MonkeyPatch.context() as patch:
        from torch._inductor import cpp_builder, exc

        def missing() -> str:
            raise exc.InvalidCxxCompiler

        patch.setattr(cpp_builder, "get_cpp_compiler", missing)
        with pytest.raises(ConfigError) as caught:
            compile_blocks(trainer.engine.module)
    return str(caught.value)


def test_a_missing_compiler_is_named(pool: WorkerPool) -> None:
    (said,) = pool.run(check_a_missing_compiler, layout=Case().layout)
    assert said.startswith("train.compile=true needs a C++ compiler and finds none; install g++")


def check_fused_kernels(mesh: ParallelMesh, case: Case) -> RankReport | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        try:
            return train_and_count(mesh, case)[0]
        except ConfigError as error:
            return str(error)


def test_kernels_stay_in_the_program_and_their_dropout_is_refused(pool: WorkerPool) -> None:
    fused = {**COMPILED, **LLAMA, "model.kernels": "fused", "model.layers": 2, "model.document_mask": True}
    case = Case(1, 1, 1, {**fused, "precision": "fp32"})
    (report,) = pool.run(check_fused_kernels, case, layout=case.layout)
    assert isinstance(report, RankReport), report
    assert not misses(compare([report], reference_run(case.config(), STEPS)), "fp32")
    refused = Case(1, 1, 1, {**fused, "model.document_mask": False, "model.dropout": 0.1})
    (said,) = pool.run(check_fused_kernels, refused, layout=refused.layout)
    assert isinstance(said, str) and said.startswith("train.compile=true does not work with dropout and fused kernels")
