"""The cluster that `local-cluster.sh` starts, and a training job on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megalm.launch.requeue import newest_step
from tests.end_to_end.workplace import ROOT, environment

PROGRAM = Path(__file__).with_name("local-cluster.sh")
NODES = 12
TIMEOUT_S = float(os.environ.get("MEGALM_TEST_TIMEOUT_S", "600"))
"""For one job to get somewhere; on an idle machine all takes a tenth of it."""
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")


def reason_against() -> str | None:
    """Return why no cluster can be started here, None if one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster of our own needs root"
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get to install it"
    if subprocess.run(["unshare", "-n", "-u", "-m", "true"], capture_output=True, check=False).returncode:
        return "this machine allows no new namespaces, of which the nodes are made"
    return None


class Cluster:
    """A running cluster. Two of them live side by side if their networks differ."""

    def __init__(self, directory: Path, nodes: int = NODES) -> None:
        self.directory = directory
        network = f"10.213.{20 + os.getpid() % 200}"
        self._environment = {**environment(), "CLUSTER_DIR": str(directory), "CLUSTER_NET": network}
        self._program("up", str(nodes))

    def _program(self, *arguments: str) -> None:
        done = subprocess.run([PROGRAM, *arguments], env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"local-cluster.sh {arguments}: {done.stdout} {done.stderr}"

    def down(self) -> None:
        """End the cluster and all that runs on it."""
        self._program("down")

    def crash(self, node: str) -> None:
        """Cut a node's power."""
        self._program("crash", node)

    def repair(self) -> None:
        """Boot the nodes that were crashed."""
        self._program("up")

    def cable(self, node: str) -> str:
        """Return the interface of this machine that leads to a node."""
        network = self._environment["CLUSTER_NET"].rpartition(".")[2]
        return f"ml{network}n{node.removeprefix('node')}"

    def inside(self, node: str, *command: str) -> None:
        """Run a program as root on a node, outside of Slurm; it must succeed."""
        process = (self.directory / f"run/{node}.pid").read_text().split()[0]
        self.ask("nsenter", f"--target={process}", "--mount", *command)

    def environment(self, **more: str) -> dict[str, str]:
        """Return what a user of the cluster has in the environment; `more` on top."""
        base = {**environment(), "SLURM_CONF": str(self.directory / "etc/slurm.conf"), "MEGALM_VENV": sys.prefix}
        path = f"{Path(sys.executable).parent}:{base['PATH']}"
        paths = {"PATH": path, "PYTHONPATH": f"{PROGRAM.with_name('injected')}:{ROOT}"}
        return {**base, **paths, "MEGALM_SLURM": str(ROOT / "slurm"), **more}

    def ask(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """Run a program as a user of the cluster and return what it prints; it must succeed."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment(**more), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def pretrain(self, workplace: Path, run: str, options: Sequence[str], *overrides: str, **more: str) -> Job:
        """Submit `slurm/pretrain.sbatch` in `workplace`, as a user does by hand."""
        recipe = ["recipe.yaml", f"run.dir={run}", "run.device=cpu", *overrides]
        return self.submit("pretrain", workplace, run, ["--signal=USR1@60", *options], *recipe, **more)

    def submit(self, script: str, workplace: Path, run: str, options: Sequence[str], *words: str, **more: str) -> Job:
        """Submit a script of `slurm/` in `workplace` with `words` as its arguments."""
        asked = ["--parsable", "--cpus-per-task=1", "--time=20", *options, str(ROOT / f"slurm/{script}.sbatch")]
        return Job(self, workplace, run, self.ask("sbatch", *asked, *words, cwd=workplace, **more))


class Job:
    """A submitted job that trains `workplace`/`run`."""

    def __init__(self, cluster: Cluster, workplace: Path, run: str, job_id: str) -> None:
        self.cluster, self.workplace, self.job_id = cluster, workplace, job_id
        self.run = workplace / run

    def facts(self, what: str) -> str:
        """Return what squeue says in one of its formats, such as %T, the state."""
        return self.cluster.ask("squeue", "--noheader", "--states=all", f"--jobs={self.job_id}", f"--format={what}")

    def nodes(self) -> list[str]:
        """Return the nodes that the job runs on, the one of the batch script first."""
        batch = self.facts("%B")
        others = self.cluster.ask("scontrol", "show", "hostnames", self.facts("%N")).split()
        return [batch, *(node for node in others if node != batch)]

    def starts(self) -> int:
        """Return how often the job's ranks have been started."""
        return len(re.findall(rf"^job {self.job_id}, start \d+: ", self.said(), re.MULTILINE))

    def log(self) -> Path:
        """Return the batch script's log."""
        names = [f"megalm-{self.job_id}.log", f"megalm-*-{self.job_id}.log"]
        found = [path for name in names for path in self.workplace.glob(name)]
        found += self.run.glob(f"jobs/*/job-{self.job_id}.log")
        return found[0] if found else self.workplace / "no.log"

    def said(self) -> str:
        """Return what the batch script has said, in all its starts."""
        return self.log().read_text(errors="replace") if self.log().exists() else ""

    def everything(self) -> str:
        """Return what is known of the job, for the message of a failed test."""
        folders = [self.workplace / "logs" / self.job_id, *self.run.glob("jobs/*/logs")]
        ranks = [path for folder in folders for path in sorted(folder.glob("rank-*.log"))]
        ends = [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in ranks]
        return "\n".join([self.facts("%T %r %N"), self.said(), *ends])

    def wait(self, condition: Callable[[], bool], poll_s: float = 0.2) -> None:
        """Return once the condition holds; fails if the job is over before, or after ten minutes."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"nothing after {TIMEOUT_S} s\n{self.everything()}"
            if self.facts("%T") in OVER:
                assert condition(), f"over too soon\n{self.everything()}"
                return
            time.sleep(poll_s)

    def wait_for_step(self, step: int) -> None:
        """Return once a step has been logged."""
        self.wait(lambda: newest_step(self.run) >= step)

    def finish(self) -> str:
        """Return the state in which the job ended, once it has."""
        self.wait(lambda: self.facts("%T") in OVER, poll_s=0.5)
        return self.facts("%T")

    def steps(self) -> list[int]:
        """Return the steps that stand in metrics.jsonl, in its order."""
        path = self.run / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [record["step"] for record in records if "train/loss" in record]
