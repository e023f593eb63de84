"""One cluster for all tests here, and a directory with data and a recipe for each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.workplace import make_workplace, megalm
from tests.slurm.cluster import Cluster, reason_against

UNBROKEN = ("train.steps=100", "checkpoint.every=0", "parallel.tensor=2")
"""What the runs that are interrupted have in common with the one that is not."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Give a cluster of twelve nodes, two pretended GPUs and eight pretended cores each."""
    reason = reason_against()
    if reason is not None:
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="megalm-cluster-", dir="/tmp"))  # a short path, for munge's socket
    running = Cluster(directory)
    yield running
    running.down()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("slurm") / "prepared")


@pytest.fixture(scope="module")
def place(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with data and recipe."""
    return Path(shutil.copytree(prepared, tmp_path_factory.mktemp("place") / "place"))


@pytest.fixture(scope="session")
def unbroken(prepared: Path) -> Path:
    """Give the run that nothing interrupted, on this machine."""
    done = megalm(prepared, "train", "recipe.yaml", "run.dir=unbroken", *UNBROKEN, timeout_s=600)
    assert done.returncode == 0, done.stderr
    return prepared / "unbroken"
