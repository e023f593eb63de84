"""A drawn pipeline says which layers lie where and what each stage does when."""

from __future__ import annotations

import pytest

from megalm.cli import main
from megalm.pipeline_parallel.drawing import COLUMNS, step_cost
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import simulate


def shown(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    size = ["model.layers=8", "train.global_batch=8", "train.micro_batch=2"]
    assert main(["config", "show", "gpt-tiny", "--pipeline", *size, *overrides]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_fold_is_drawn_with_both_ends_of_the_model_on_the_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "parallel.pipeline=2", "parallel.schedule=zb-v") == [
        "zb-v: 2 stages of 2 chunks, 4 microbatches a step on one data rank",
        "stage 0: layers embedding, 0-1, 6-7, head",
        "stage 1: layers 2-3, 4-5",
        "bubble 4.0%, where a backward takes twice as long as a forward and messages no time",
        "activations held at once, in those of a microbatch on a whole stage: 2, 2",
        "",
        "FFFfiwfiwFIWfiwIWfiwIWIW",
        ".FfFfiwFIWfiwFIWfiwIiIWwW",
        "F forward, B backward, I its gradient of the input, W those of the weights, . waits; small letters: not the "
        "first chunk",
    ]


def test_blocks_of_further_tokens_stand_behind_the_head(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "parallel.pipeline=2", "model.mtp_depth=1")
    assert "stage 1: layers 4-7, head, further tokens" in lines


def test_a_long_step_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "parallel.pipeline=2", "train.global_batch=100")
    assert "stage 1: layers 4-7, head" in lines and "FF..BBFBBFBB" in lines[-3]
    assert [len(line) for line in lines[-3:-1]] == [104, 104] and lines[-2].endswith(" ...")


@pytest.mark.parametrize(("batch", "microbatches"), [(1, "1 microbatch"), (5, "3 microbatches")])
def test_a_batch_that_is_filled_up_is_drawn_with_all_its_microbatches(
    capsys: pytest.CaptureFixture[str], batch: int, microbatches: str
) -> None:
    first = shown(capsys, f"train.global_batch={batch}", "train.pad_batch=true")[0]
    assert first == f"1f1b: 1 stage of 1 chunk, {microbatches} a step on one data rank"


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_a_long_step_costs_what_its_whole_simulation_says(schedule: str) -> None:
    kind, shortened = SCHEDULES.get(schedule), 0
    for stages in (1, 3, 16):
        for chunks in (2, 3) if kind.fixed_chunks is None else (kind.fixed_chunks,):
            for microbatches in (11 * stages + 101, 13 * stages + 99):
                short, cost = step_cost(kind, stages, microbatches, chunks)
                schedule_of_all = kind(stages, microbatches, chunks)
                whole = simulate(schedule_of_all, float(chunks), 2.0 * chunks)
                shortened += short.microbatches < microbatches
                for figure in ("makespan", "busy", "spans", "peak_live", "bubble"):
                    assert getattr(cost, figure) == getattr(whole, figure), (figure, stages, chunks, microbatches)
                for stage in range(stages):
                    begins = [
                        [(a, at) for a, at in zip(s.actions(stage), c.starts[stage], strict=True) if at < COLUMNS]
                        for s, c in ((short, cost), (schedule_of_all, whole))
                    ]
                    assert begins[0] == begins[1], (stages, chunks, microbatches, stage)
    assert shortened >= 6


def test_a_step_of_very_many_microbatches_is_drawn_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "parallel.pipeline=4", "train.global_batch=2000000")
    assert lines[0] == "1f1b: 4 stages of 1 chunk, 1000000 microbatches a step on one data rank"
    assert "bubble 0.0%, where" in "\n".join(lines) and lines[-2].endswith(" ...")
