"""A run's directory with data and a checkpoint of untrained weights, made in a second without training."""

from __future__ import annotations

from pathlib import Path

from megalm.checkpoint.writer import Fragment, write_checkpoint
from megalm.config.load import dump_yaml
from megalm.data.corpus import Document, MemoryCorpus
from megalm.data.datasets import prepare
from megalm.distributed.world import joined_mesh
from megalm.models.build import build_stage
from tests.train.recipes import small_recipe


def make_run(directory: Path) -> Path:
    """Return the directory of a run; its data lies beside it in `data`."""
    texts = [f"{word} {number} is not {word} {number + 1}. " * 5 for word in ("north", "south") for number in range(30)]
    corpus = MemoryCorpus("sentences", tuple(Document(text[:9], text) for text in texts))
    data = prepare(corpus, directory / "data", vocabulary=300, held_out=0.2)
    run = directory / "run"
    config = small_recipe(model={"init_std": 0.3}, data={"path": str(directory / "data")}, run={"dir": str(run)})
    with joined_mesh(config) as mesh:
        fragments = [
            Fragment(parameter.shard, "weight", 0, parameter.detach().flatten())  # type: ignore[attr-defined]
            for parameter in build_stage(config, data.vocabulary, mesh).parameters()
        ]
        write_checkpoint(run / "checkpoints", 5, fragments, {})
    data.tokenizer().save(run)
    (run / "config.yaml").write_text(dump_yaml(config))
    return run
