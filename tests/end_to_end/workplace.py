"""A directory with tiny prepared data and a recipe, and the real command line run in it as a process of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from megalm.data.corpus import Document, MemoryCorpus
from megalm.data.datasets import prepare

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = [sys.executable, "-m", "megalm"]
RECIPE = """\
seed: 7
model: {layers: 2, hidden: 16, heads: 2, sequence: 16, dropout: 0.1}
train: {steps: 40, global_batch: 4, micro_batch: 2}
optim: {lr: 3e-3}
data: {path: data}
checkpoint: {every: 2}
run: {dir: run}
"""


def make_data(directory: Path, seed: int = 0, vocabulary: int = 280) -> None:
    """Prepare some thousand tokens of made-up sentences; another seed makes other sentences."""
    words = random.Random(seed).choices(["north", "south", "east", "west", "wind", "sea", "the", "of", "and"], k=4000)
    texts = [" ".join(words[at : at + 20]) for at in range(0, len(words), 20)]
    corpus = MemoryCorpus("sentences", tuple(Document(f"sentence {n}", text) for n, text in enumerate(texts)))
    prepare(corpus, directory, vocabulary=vocabulary, held_out=0.1)


def make_workplace(directory: Path) -> Path:
    """Return `directory`, made, with `data/` and `recipe.yaml` in it."""
    directory.mkdir(parents=True, exist_ok=True)
    make_data(directory / "data")
    (directory / "recipe.yaml").write_text(RECIPE)
    return directory


def environment() -> dict[str, str]:
    """Return this process's environment as a shell would have it: nothing of a launcher, one thread a process."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def megalm(workplace: Path, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in `workplace` to its end."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=workplace,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
