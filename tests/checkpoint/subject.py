"""A run with two checkpoints to be damaged, and every way in which megalm loads them held against what they held."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.commands import verify
from megalm.checkpoint.manager import latest_checkpoint
from megalm.checkpoint.names import CHECKPOINTS, find_checkpoints
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import RunConfig
from megalm.config.trained import trained_config
from megalm.data.corpus import Document, MemoryCorpus
from megalm.data.datasets import prepare
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError
from megalm.models.trained import load_trained
from megalm.train.pretrain import train
from megalm.zero.engine import shard_of
from tests.checkpoint.simulated import Logical, even_fragments, write_ranks, zero_fragments
from tests.train.recipes import small_recipe

Tensors = dict[tuple[str, str], Tensor]


def make_run(directory: Path, seed: int = 0) -> RunConfig:
    """Train `directory/run` for four steps; leave steps 2 and 4 as tensor 2 x data 2 would have written them.

    ZeRO 3 has cut one kind, and ZeRO 2 the others."""
    texts = [f"{word} {number} is not {word} {number + 1}. " * 5 for word in ("north", "south") for number in range(20)]
    corpus = MemoryCorpus("sentences", tuple(Document(text[:9], text) for text in texts))
    prepare(corpus, directory / "data", vocabulary=270, held_out=0.2)
    run = directory / "run"
    config = small_recipe(
        seed=seed,
        model={"layers": 1},
        train={"steps": 4},
        checkpoint={"every": 2},
        optim={"ema_decay": 0.5},
        evaluate={"sequences": 2},
        data={"path": str(directory / "data")},
        run={"dir": str(run), "preflight": False, "hang_timeout_s": 0},
    )
    with redirect_stdout(StringIO()):
        train(config)
    for path in find_checkpoints(run / CHECKPOINTS):
        with closing(CheckpointReader(path)) as reader:
            ranks: list[list[Fragment]] = [[] for _ in range(4)]
            for kind in reader.kinds():
                held = {name: Logical(read_whole(reader, kind, name)) for name in reader.names(kind)}
                split = {name: Logical(item.values, 0 if item.values.dim() else None) for name, item in held.items()}
                cut = even_fragments if kind == "exp_avg" else zero_fragments
                for rank, fragments in zip(ranks, cut(split, kind, 2, 2), strict=True):
                    rank += fragments
            shutil.rmtree(path)
            write_ranks(path.parent, reader.step, ranks, reader.state)
    return config


def read_whole(reader: CheckpointReader, kind: str, name: str) -> Tensor:
    """Return a whole logical tensor."""
    shape = reader.manifest.entries(kind, name)[0].piece.shard.global_shape
    return reader.read_local(ShardSpec.whole(name, shape), kind)


def read_all(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return all tensors of a checkpoint, by kind and name, and its state."""
    with closing(CheckpointReader(path)) as reader:
        return {key: read_whole(reader, *key) for key in reader.manifest.tensors}, reader.state


def same(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are the same to the bit."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


class Listener(logging.Handler):
    """Keeps the warnings of megalm."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening() -> Iterator[Listener]:
    """Keep megalm's warnings from the console, inside, and give them."""
    logger, listener = logging.getLogger("megalm"), Listener()
    before = logger.propagate
    logger.propagate = False
    logger.addHandler(listener)
    try:
        yield listener
    finally:
        logger.removeHandler(listener)
        logger.propagate = before


CAUGHT, TRUE, SILENT, NAMELESS = "caught", "true", "SILENT", "NAMELESS"
"""What became of a load: an error that names what is damaged; what was saved, to the bit; something else; an error
that does not say where."""


@dataclass
class Subject:
    """The run with its two checkpoints, a copy that has the newer one alone, and what both hold."""

    config: RunConfig
    run: Path
    alone: Path
    newest: str
    truth: Tensors
    state: dict[str, Any]
    older: Tensors

    @classmethod
    def make(cls, directory: Path) -> Subject:
        """Train the run in `directory`."""
        config = make_run(directory)
        run, alone = directory / "run", directory / "alone"
        newest, older = find_checkpoints(run / CHECKPOINTS)
        shutil.copytree(run, alone)
        shutil.rmtree(alone / CHECKPOINTS / older.name)
        truth, state = read_all(newest)
        return cls(config, run, alone, newest.name, truth, state, read_all(older)[0])

    @property
    def trained(self) -> RunConfig:
        """The recipe as evaluation reads it from the copy of the run."""
        return trained_config(self.alone, [])

    def places(self) -> list[Path]:
        """Return the two directories of the newer checkpoint."""
        return [run / CHECKPOINTS / self.newest for run in (self.run, self.alone)]

    def outcomes(self, names: tuple[str, ...], mesh: ParallelMesh, choose: random.Random) -> dict[str, str]:
        """Load the damaged checkpoint in every way; `names`: an error must have one of them."""
        loads = {
            "resume": self._resume,
            "verify": self._verify,
            "whole": self._whole,
            "part": partial(self._part, choose=choose),
            "evaluate": partial(self.reads_weights, mesh=mesh),
        }
        return {way: self._outcome(load, names) for way, load in loads.items()}

    def _outcome(self, load: Any, names: tuple[str, ...]) -> str:
        with listening() as listener:
            try:
                good = load()
            except CheckpointError as error:
                listener.said.append(str(error))
                good = None
        said = [line for line in listener.said if any(name in line for name in names) and "\n" not in line]
        if said and good is not False:
            return CAUGHT
        return TRUE if good else SILENT if good is False else NAMELESS

    def _resume(self) -> bool | None:
        """Return True for the newer checkpoint as it was, None for the older one."""
        read: dict[tuple[str, str], Tensor] = {}

        def load(reader: CheckpointReader) -> None:
            with closing(reader):
                read.update({(kind, name): read_whole(reader, kind, name) for kind, name in self.truth})

        reader = latest_checkpoint(self.run, load)
        assert reader is not None
        truth = self.truth if reader.step == 4 else self.older
        good = read.keys() == truth.keys() and all(same(read[key], values) for key, values in truth.items())
        if reader.step != 4:
            return None if good else False
        return good and reader.state == self.state

    def _verify(self) -> bool:
        """Return True: it found nothing to say."""
        verify(self.places()[0])
        return True

    def _whole(self) -> bool:
        tensors, state = read_all(self.places()[0])
        alike = tensors.keys() == self.truth.keys() and state == self.state
        return alike and all(same(tensors[key], values) for key, values in self.truth.items())

    def _part(self, choose: random.Random) -> bool:
        """Read a random range of a random tensor, as a rank of two does."""
        with closing(CheckpointReader(self.places()[0])) as reader:
            (kind, name), values = choose.choice(sorted(self.truth.items()))
            shard, local = ShardSpec.whole(name, tuple(values.shape)), values
            if values.dim() and values.shape[0] % 2 == 0:
                half = choose.randrange(2)
                shard = ShardSpec.split(name, tuple(values.shape), 0, half, 2)
                local = values.chunk(2)[half]
            start, stop = sorted(choose.randrange(local.numel() + 1) for _ in range(2))
            return same(reader.read_flat(shard, kind, start, stop), local.flatten()[start:stop])

    def reads_weights(self, mesh: ParallelMesh) -> bool:
        """Load the weights as evaluation does."""
        trained = load_trained(self.alone, self.config, mesh=mesh, vocab=self._vocabulary())
        weights = {shard_of(parameter).name: parameter.detach() for parameter in trained.model.parameters()}
        return all(same(values, self.truth["weight", name]) for name, values in weights.items())

    def evaluates(self, config: RunConfig, mesh: ParallelMesh) -> bool:
        """Return False, where another recipe than the run's loads its weights: a wrong one, in silence."""
        load_trained(self.alone, config, mesh=mesh, vocab=self._vocabulary())
        return False

    def _vocabulary(self) -> int:
        return self.truth["weight", "embedding.weight"].shape[0]
