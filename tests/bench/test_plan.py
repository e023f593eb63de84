"""Which points a scaling run has, what each computes, and what is refused before anything is started."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megalm.bench.plan import Point, batch_of, make_plan, point_recipe, read_plan
from megalm.cli import main
from megalm.config.load import load_recipe
from megalm.errors import LaunchError
from tests.bench.points import make_run
from tests.end_to_end.workplace import make_workplace
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.hostile_names import CANARY, HOSTILE

ON_NODES = ("--nodes=1,2,4", "--gpus-per-node=1", "--steps=20", "train.global_batch=8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("bench") / "prepared")


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a directory with data and recipe, which is the current one."""
    shutil.copytree(prepared, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm.on_path(tmp_path / "fake", monkeypatch)


def test_strong_scaling_keeps_the_batch_and_weak_scaling_lets_it_grow_with_the_ranks() -> None:
    assert [batch_of(12, ranks, 2, "strong") for ranks in (2, 4, 8)] == [12, 12, 12]
    assert [batch_of(12, ranks, 2, "weak") for ranks in (2, 4, 8)] == [12, 24, 48]
    assert batch_of(12, 6, 4, "weak") == 18


def test_each_point_is_a_run_of_its_own_that_stops_early_and_saves_nothing(place: Path) -> None:
    points = [Point(1, 0), Point(2, 0)]
    plan, configs = make_plan("recipe.yaml", ["model.layers=3"], points, "weak", 20, place / "a b")
    assert [point.global_batch for point in plan.points] == [4, 8]
    for config, point in zip(configs, points, strict=True):
        assert config.run.dir == str(place / f"a b/points/ranks-{point.ranks}")
        assert (config.train.stop_at, config.train.steps, config.log.every) == (20, 40, 1)
        assert (config.checkpoint.every, config.checkpoint.at_end, config.evaluate.every) == (0, False, 0)
        assert (config.model.layers, config.train.global_batch) == (3, point.global_batch)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--nproc=1,2,3"], "the point of 3 ranks: train.global_batch=4 is not divisible by train.micro_batch=2 x 3"),
        (["--nproc=1,2", "parallel.tensor=2"], "the point of 1 rank: parallel.tensor=2"),
        (["--nodes=1,3", "--gpus-per-node=2"], "the point of 3 nodes, 6 ranks: train.global_batch=4"),
        (["--nproc=3,6", "--weak"], "the point of 3 ranks: train.global_batch=4 is not divisible"),
        (["--nproc=1,1"], "--nproc=1,1 names a number twice"),
        (["--nproc=1", "--steps=41"], "--steps=41 is more than train.steps=40; use at most 40, or add train.steps=41"),
        (["--nproc=1", "run.dir=x"], "run.dir is set for each point; use --out instead"),
        (["--nproc=1", "checkpoint.every=5"], "checkpoint.every is 0 in each point; leave it out"),
        (["--nproc=1", "data.path=nowhere"], "nowhere"),
        (["--nproc=1", "--time=5"], "--time belongs to --nodes"),
        (["--nproc=0"], "'0' is no whole number from 1 on"),
        (["--nproc=1,"], "'' is no whole number from 1 on"),
        (["--nproc=1", "--nodes=1"], "not allowed with argument"),
        (["--nproc=1", "--weak", "--strong"], "not allowed with argument"),
        ([], "one of the arguments --nproc --nodes is required"),
        (["--nproc=1", "--steps=4"], "'4' is no whole number from 5 on"),
        ([*ON_NODES, "--partition=a b"], "--partition='a b' is no name"),
        ([*ON_NODES, "--time=soon"], "--time='soon' is no time"),
        ([*ON_NODES, "--exclude=node[3"], "malformed"),
        ([*ON_NODES, "--out=a%b"], "%"),
        (["--nproc=1", "--out=recipe.yaml"], "recipe.yaml is no directory"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_started(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    before = sorted(place.iterdir())
    steps = [] if any(word.startswith("--steps") for word in arguments) else ["--steps=20"]
    assert main(["bench", "scaling", "recipe.yaml", *steps, *arguments]) == 2
    told = capsys.readouterr()
    assert reason in told.err and told.err.count("\n") == 1 and told.out == ""
    assert fake.calls() == [] and sorted(place.iterdir()) == before


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    from megalm.bench.here import check_gpus

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config, two = load_recipe("recipe.yaml"), {"gpus": 2}
    check_gpus(config, 2, two)
    check_gpus(config, 8, {"gpus": 0})
    check_gpus(load_recipe("recipe.yaml", ["run.device=cpu"]), 4, two)
    for visible, most in ((None, 2), ("1", 1)):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(LaunchError, match=f"use at most {most}, or run.device=cpu"):
            check_gpus(config, 4, two)


def test_a_dry_run_prints_the_commands_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", "recipe.yaml", "--nproc=2,1", "--steps=20", "--dry-run"]) == 0
    first, second = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    recipe = str(place / "runs/scaling/points/ranks-1.yaml")
    assert first == [sys.executable, "-m", "megalm", "train", recipe, "--nproc=1", "--fresh"]
    assert "--nproc=2" in second
    assert main(["bench", "scaling", "recipe.yaml", *ON_NODES, "--weak", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["points"] == [{"ranks": n, "global_batch": 8 * n} for n in (1, 2, 4)]
    assert [command[0] for command in told["commands"]] == ["sbatch"] * 4
    assert not (place / "runs").exists()


def test_the_points_are_submitted_one_after_the_other_and_then_collected(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    options = ["--partition=gpu", "--time=10", "--out=sc", "--json"]
    assert main(["bench", "scaling", "recipe.yaml", *ON_NODES, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["job_ids"], told["collect_job_id"]) == (["101", "102", "103"], "104")
    assert told["picture"] == str(place / "sc/scaling.png")
    *calls, last = fake.calls("sbatch")
    for number, call in enumerate(calls):
        nodes = 2**number
        assert call[-2:] == [str(place / "sc/jobs/scaling.sbatch"), str(place / f"sc/points/ranks-{nodes}.yaml")]
        assert {"--parsable", f"--nodes={nodes}", "--ntasks-per-node=1", "--partition=gpu", "--time=10"} <= set(call)
        after = [word for word in call if word.startswith("--dependency")]
        assert after == ([f"--dependency=afterany:{100 + number}"] if number else [])
    assert {"--nodes=1", "--partition=gpu", "--dependency=afterany:103"} <= set(last)
    assert not any(word.startswith(("--time", "--gpus", "--ntasks")) for word in last)
    assert last[-2:] == [str(place / "sc/jobs/collect.sbatch"), str(place / "sc")]
    environment = fake.environment()
    assert environment["MEGALM_LOGS"] == str(place / "sc/jobs/logs")
    assert "SLURM_JOB_ID" not in environment and "MEGALM_POINT" not in environment
    plan = read_plan(place / "sc")
    assert (plan.job_ids(), [point.nodes for point in plan.points]) == (["101", "102", "103", "104"], [1, 2, 4])
    recipe = load_recipe(str(point_recipe(place / "sc", plan.points[2])))
    assert (recipe.train.stop_at, recipe.run.dir) == (20, str(place / "sc/points/ranks-4"))
    assert json.loads((place / "sc/jobs/code.json").read_text())["packages"]["torch"]


def test_another_scaling_run_is_kept_unless_fresh_and_never_while_its_jobs_live(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(place / "sc", [Point(1, 4, 1, "77")])
    arguments = ["bench", "scaling", "recipe.yaml", *ON_NODES, "--out=sc"]
    assert main(arguments) == 2
    assert "holds the scaling run of 2026-01-01T00:00:00+00:00; choose another, or --fresh" in capsys.readouterr().err
    fake.answers("squeue", "77|RUNNING|None|1:05|n1\n")
    assert main([*arguments, "--fresh"]) == 2
    assert "jobs of the scaling run there are not over; wait, or: scancel 77" in capsys.readouterr().err
    fake.answers("squeue", "77|COMPLETED|None|1:05|n1\n")
    assert main([*arguments, "--fresh"]) == 0
    assert read_plan(place / "sc").job_ids() == ["101", "102", "103", "104"]
    (place / "sc/plan.json").unlink()
    assert main([*arguments, "--fresh"]) == 2
    assert "holds points, jobs but no plan.json, so whose they are is unknown" in capsys.readouterr().err


def test_a_refusal_of_sbatch_leaves_nothing_behind(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers("sbatch", "sbatch: error: invalid partition specified: x\n", code=1)
    assert main(["bench", "scaling", "recipe.yaml", *ON_NODES, "--out=sc", "--partition=x"]) == 2
    assert capsys.readouterr().err == "error: sbatch refused the job: sbatch: error: invalid partition specified: x\n"
    assert list((place / "sc").iterdir()) == []


def test_slurm_must_be_there_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["bench", "scaling", "recipe.yaml", *ON_NODES]) == 2
    assert capsys.readouterr().err.startswith("error: sbatch is not installed on this machine; ")
    assert not (place / "runs").exists()


def test_hostile_names_are_refused_or_passed_literally(
    place: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalm.bench import plan
    from megalm.launch import records

    for module in (plan, records):
        monkeypatch.setattr(
            module, "code_identity", lambda: ({"megalm": "0", "revision": None, "python": "3", "packages": {}}, b"")
        )
    submitted = 0
    for number, name in enumerate(HOSTILE[::3]):
        out = f"runs/{number}{name}"
        status = main(["bench", "scaling", "recipe.yaml", *ON_NODES, f"--out={out}"])
        assert status in (0, 2), name
        if status == 0:
            submitted += 1
            assert fake.calls("sbatch")[-1][-1] == str(place / out)
    assert submitted > 10
    assert not list(place.rglob(CANARY))
