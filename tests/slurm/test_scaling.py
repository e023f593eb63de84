"""`megalm bench scaling --nodes` on a real cluster, and the job of the kernel benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.workplace import ROOT
from tests.launch.hostile_names import CANARY
from tests.slurm.cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
RECIPE = ("recipe.yaml", "run.device=cpu", "train.global_batch=8")
SIZE = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=20", "--steps=12")
ONE_RANK = ("--ntasks-per-node=1", "--gpus-per-node=1")


def scale(cluster: Cluster, place: Path, out: str, *arguments: str, **more: str) -> tuple[list[Job], Job]:
    """Start a scaling run and return the jobs of its points and the one that collects."""
    command = [sys.executable, "-m", "megalm", "bench", "scaling", *RECIPE, *SIZE, f"--out={out}", *arguments]
    told: dict[str, Any] = json.loads(cluster.ask(*command, "--json", cwd=place, MEGALM_SLURM="", **more))
    assert told["picture"] == str(place / out / "scaling.png")
    jobs = [Job(cluster, place, out, job_id) for job_id in told["job_ids"]]
    return jobs, Job(cluster, place, out, told["collect_job_id"])


def log(job: Job) -> str:
    """Return what the batch script has said."""
    return next(job.run.rglob(f"job-{job.job_id}.log")).read_text()


def test_one_two_and_four_nodes_end_with_their_picture_and_table(cluster: Cluster, place: Path) -> None:
    jobs, collecting = scale(cluster, place, "runs/scaling", "--nodes=4,1,2")
    assert collecting.finish() == "COMPLETED", collecting.everything()
    assert [job.facts("%T %D") for job in jobs] == ["COMPLETED 1", "COMPLETED 2", "COMPLETED 4"]
    starts = [job.facts("%S") for job in (*jobs, collecting)]
    assert starts == sorted(starts)
    out = place / "runs/scaling"
    result = json.loads((out / "scaling.json").read_text())
    points = result["points"]
    assert [(point["nodes"], point["ranks"], point["state"]) for point in points] == [
        (1, 1, "measured"), (2, 2, "measured"), (4, 4, "measured")
    ]  # fmt: skip
    assert all(point["tokens_per_s"] > 0 and point["measured_steps"] == 9 for point in points)
    assert [machine["host"] for machine in result["machines"]] == [job.nodes()[0] for job in jobs]
    for point in points:
        run = Path(point["run"])
        assert json.loads((run / "run.json").read_text())["world"] == point["ranks"]
        assert not (run / "checkpoints").exists()
    table = (out / "scaling.md").read_text()
    assert "| ranks | nodes | global batch |" in table and "100.0%" in table
    assert table in log(collecting)
    assert (out / "scaling.png").stat().st_size > 10_000


def test_a_point_that_fails_is_a_row_and_the_others_are_measured(cluster: Cluster, place: Path) -> None:
    out = f"a b;$(touch {CANARY})"
    jobs, collecting = scale(cluster, place, out, "--nodes=1,2", "--weak", MEGALM_TEST_FAIL="1")
    assert collecting.finish() == "FAILED", collecting.everything()
    assert [job.facts("%T") for job in jobs] == ["COMPLETED", "FAILED"]
    first, second = json.loads((place / out / "scaling.json").read_text())["points"]
    assert (first["state"], second["state"], second["global_batch"]) == ("measured", "failed", 16)
    assert "RuntimeError: planted: this rank cannot compute" in second["why"]
    assert second["why"].endswith("(points/ranks-2/logs/rank-1.log)")
    assert "failed: 0 of 12 steps: " in (place / out / "scaling.md").read_text()
    assert "without figures, 1 of 2 points: 2 ranks: 0 of 12 steps: " in log(collecting)
    assert (place / out / "scaling.png").exists() and not list(place.rglob(CANARY))


def test_points_submitted_by_hand_are_collected_too(cluster: Cluster, place: Path) -> None:
    # The script's 50 steps are more than the recipe's 40, and what the script says comes last.
    refused = cluster.submit("scaling", place, "runs/scaling", ["--nodes=2", *ONE_RANK], *RECIPE)
    assert refused.finish() == "FAILED" and "train.stop_at=50" in refused.said(), refused.everything()
    (place / "by-hand").mkdir()
    for name in ("data", "recipe.yaml"):
        (place / "by-hand" / name).symlink_to(place / name)
    words = [*RECIPE, "train.steps=60"]
    point = cluster.submit("scaling", place / "by-hand", "runs/scaling", ["--nodes=2", *ONE_RANK], *words)
    after = f"--dependency=afterany:{point.job_id}"
    collecting = cluster.submit("collect", place / "by-hand", "runs/scaling", ["--nodes=1", after], "runs/scaling")
    assert collecting.finish() == "COMPLETED", collecting.everything()
    (only,) = json.loads((collecting.run / "scaling.json").read_text())["points"]
    assert (only["ranks"], only["measured_steps"]) == (2, 40)
    assert "# Strong scaling of scaling" in collecting.said()


def test_the_kernel_benchmark_job_starts_and_ends(cluster: Cluster, place: Path) -> None:
    """Without a GPU it is refused, or tries its program on the CPU."""
    for words, state, said in (
        ([], "FAILED", "error: --device cuda: torch sees no GPU"),
        (["--device", "cpu", "--only", "swiglu"], "COMPLETED", "done"),
    ):
        output = f"--output={place}/megalm-kernels-%j.log"
        job = cluster.submit("kernels", ROOT, "none", [output], *words, MEGALM_LOGS=str(place / f"kernels-{state}"))
        job.workplace = place
        assert job.finish() == state, job.everything()
        assert said in job.said(), job.everything()
