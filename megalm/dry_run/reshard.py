"""`megalm checkpoint reshard`: a checkpoint as the ranks of another layout would have written it, in one process.

Owns: which pieces each rank of a layout saves, told from the rank's model on the meta device, and the copy, which holds
no more than a file of each sort at a time. A run goes on from a checkpoint of any layout without this.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megalm.checkpoint.commands import of_newest
from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.index import Rows
from megalm.checkpoint.names import CHECKPOINTS, checkpoint_name, hidden
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.writer import RankWriter, encode_state, finish
from megalm.config.load import dump_yaml, load_values
from megalm.config.run import RunConfig
from megalm.config.storage import wide_dtype
from megalm.config.yaml_text import sealed
from megalm.data.tokenizer import FILE_NAME as TOKENIZER
from megalm.data.tokenizer import read_tokenizer_file
from megalm.distributed.layout import RankLayout
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.distributed.world import layout_of
from megalm.dry_run.stated import Stated
from megalm.dry_run.world import pretended_mesh
from megalm.errors import CheckpointError, ConfigError
from megalm.models.build import DTYPES, build_stage
from megalm.models.huggingface.companions import kept_companions
from megalm.models.imported import SOURCE_FILE, new_directory, require_free, write_beside
from megalm.models.sources import COMPANIONS
from megalm.train.optimizers import freeze
from megalm.train.run_directory import CONFIG_FILE
from megalm.train.run_identity import IDENTITY_FILE, SAVED, read_identity, run_identity
from megalm.zero.engine import counted_here, kept_buffers, replicas_of, shard_of
from megalm.zero.saving import saved_by_stage, saved_range

logger = logging.getLogger(__name__)

SECTIONS = ("parallel", "zero")
"""What of a recipe may be another: where the parts of the model lie, and"""
BATCH = ("train.global_batch", "train.micro_batch")
"""what must fit the number of data ranks."""


class Saved(NamedTuple):
    """Elements [start, stop) of a flattened local tensor, of which a rank saves the weight and every state."""

    shard: ShardSpec
    start: int
    stop: int


def reshard(source: Path, out: Path, overrides: list[str], ranks: int | None) -> dict[str, Any]:
    """Write the newest checkpoint at `source`, or that one, to the new run directory `out`; return what was done.

    `overrides` (of `SECTIONS` and `BATCH`) change the layout that the checkpoint's recipe says, and `ranks` is the size
    of the world (None: the smallest that the layout allows). Raises ConfigError or CheckpointError; nothing is left of
    `out` then.
    """
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name.partition(".")[0] not in SECTIONS and name not in BATCH:
            keys = ", ".join([*(f"{section}.*" for section in SECTIONS), *BATCH])
            raise ConfigError(f"{override} is no key of a layout; reshard changes {keys}")
    return of_newest(source, lambda reader: _reshard(reader, out, overrides, ranks))


def _reshard(reader: CheckpointReader, out: Path, overrides: list[str], ranks: int | None) -> dict[str, Any]:
    known = reader.state.get("config")
    if not isinstance(known, dict):
        raise CheckpointError(
            f"{reader.directory}: its state has no config, so its model is unknown; give one of a run"
        )
    config = load_values(known, f"config of {reader.directory}", [*overrides, f"run.dir={json.dumps(str(out))}"])
    layout = layout_of(config, ranks or config.parallel.least_ranks)
    require_free(out)
    texts = _texts(reader, config, layout)
    with new_directory(out) as (files, partial):
        _copy(files, reader, config, layout, partial)
        write_beside(files, partial, texts)
    path = out / CHECKPOINTS / checkpoint_name(reader.step)
    return {
        "path": str(path),
        "step": reader.step,
        "ranks": layout.world_size,
        "layout": describe_layout(config, layout),
        "files": len(list(path.iterdir())),
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
    }


def saved_pieces(config: RunConfig, layout: RankLayout, rank: int, vocab: int) -> Iterator[Saved]:
    """Yield what `rank` of a run of that layout saves of its parameters, in the order in which it does."""
    with pretended_mesh(layout, rank) as mesh:
        model = build_stage(config, vocab, mesh, document_start=0)
        freeze(config.optim, model.parameters())
        tied = model.tied_weight
        stated = Stated(config, model, mesh, tied)

        def divided(tensor: Tensor) -> Saved:
            """Return this rank's part of a tensor that ZeRO 3 divides."""
            size, index = tensor.numel(), mesh.index("replica")
            part = -(-size // mesh.size("replica"))
            return Saved(shard_of(tensor), *(min(edge * part, size) for edge in (index, index + 1)))

        pieces: list[tuple[Tensor, Saved]] = []  # of what is divided
        whole = kept_buffers(model)
        frozen = [parameter for parameter in stated.parameters if not parameter.requires_grad]
        if stated.stage == 0:
            whole = [*stated.parameters, *whole]
        elif stated.stage == 3:
            pieces = [(tensor, divided(tensor)) for tensor in (*stated.trained, *frozen)]
        else:
            whole = [*frozen, *whole]
            for group in stated.groups:  # DeepSpeed lays a group's parameters end to end and cuts it in equal parts
                first, offset = mesh.index(group.axis) * group.part, 0
                for tensor in group.tensors:
                    edges = (min(max(edge - offset, 0), tensor.numel()) for edge in (first, first + group.part))
                    pieces.append((tensor, Saved(shard_of(tensor), *edges)))
                    offset += tensor.numel()
        yield from (piece for tensor, piece in pieces if counted_here(tensor, mesh, tied) and piece.start < piece.stop)
        for tensor in whole:
            shard = shard_of(tensor)
            start, stop = saved_range(_as_saved(tensor, config), shard, replicas_of(shard), mesh)
            if saved_by_stage(tensor, mesh, tied) and start < stop:
                yield Saved(shard, start, stop)


def _as_saved(tensor: Tensor, config: RunConfig) -> Tensor:
    """Return the tensor in the number format in which it is saved: that of the master weights where it is trained."""
    return tensor.to(DTYPES[wide_dtype(config)]) if tensor.requires_grad else tensor


def describe_layout(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    """Return the layout that a checkpoint notes for people to read."""
    axes = {axis: getattr(layout, axis) for axis in ("tensor", "pipeline", "data", "context", "expert")}
    return {**axes, "zero_stage": config.zero.stage, "precision": config.precision}


def _copy(files: FileSystem, reader: CheckpointReader, config: RunConfig, layout: RankLayout, out: Path) -> None:
    """Write the checkpoint, rank by rank."""
    final = out / CHECKPOINTS / checkpoint_name(reader.step)
    partial = hidden(final, "partial")
    files.make_directory(partial)
    vocab = reader.manifest.entries("weight", "embedding.weight")[0].piece.shard.global_shape[0]
    state = {**reader.state, "config": config.model_dump(mode="json")}
    whole: dict[str, tuple[int, ...]] = {}
    reports: list[dict[str, Any]] = []
    lists: dict[str, Rows] = {}
    for rank in range(layout.world_size):
        pieces = list(saved_pieces(config, layout, rank, vocab))
        whole |= {piece.shard.name: tuple(piece.shard.global_shape) for piece in pieces}
        writer = RankWriter(files, partial, rank, reader.step)
        last = rank == layout.world_size - 1
        rest = _of_no_parameter(reader, whole) if last else iter(())
        writer.write(_fragments(reader, pieces, rest))
        report, rows = writer.report()
        reports.append(report)
        lists |= rows
        logger.info("rank %d of %d is written", rank, layout.world_size)
    finish(files, final, reader.step, encode_state(state), describe_layout(config, layout), reports, lists)


def _fragments(reader: CheckpointReader, pieces: list[Saved], rest: Iterator[Fragment]) -> Iterator[Fragment]:
    """Yield a rank's pieces of all kinds that are stored in the parameter's own shape, then the rest."""
    kinds = ["weight", *(kind for kind in reader.kinds() if kind != "weight")]
    for piece in pieces:
        for kind in kinds:
            if _stored_shape(reader, kind, piece.shard.name) == tuple(piece.shard.global_shape):
                yield Fragment(
                    piece.shard, kind, piece.start, reader.read_flat(piece.shard, kind, piece.start, piece.stop)
                )
    yield from rest


def _stored_shape(reader: CheckpointReader, kind: str, name: str) -> tuple[int, ...] | None:
    rows = reader.manifest.tensors.get((kind, name))
    return None if rows is None else tuple(rows[0]["shape"])


def _of_no_parameter(reader: CheckpointReader, whole: Mapping[str, tuple[int, ...]]) -> Iterator[Fragment]:
    """Yield, in the pieces that they have, states of other shapes: what optimizers keep by parameter."""
    for kind, name in sorted(reader.manifest.tensors):
        if _stored_shape(reader, kind, name) == whole.get(name):
            continue
        for piece in (one.piece for entry in reader.manifest.entries(kind, name) for one in entry.pieces()):
            yield Fragment(piece.shard, kind, piece.start, reader.read_flat(piece.shard, kind, piece.start, piece.stop))


def _texts(reader: CheckpointReader, config: RunConfig, layout: RankLayout) -> dict[str, bytes]:
    """Return, by name, the files beside the checkpoint: a run can be gone on with, imported weights are begun from.

    Raises ConfigError or CheckpointError for a checkpoint of neither.
    """
    run = reader.directory.parent.parent
    texts = {CONFIG_FILE: sealed(dump_yaml(config)).encode()}
    data, tokenizer = (reader.state.get(f"{name}_fingerprint") for name in ("data", "tokenizer"))
    if isinstance(data, str) and isinstance(tokenizer, str):
        parameters = sum(_elements(reader, name) for name in reader.names("weight"))
        # Weights that a run began from may be gone, and are nothing to who has a checkpoint.
        begun = {"init_from": {"path": config.train.init_from, "fingerprint": "unknown"}}
        before = {**(read_identity(run) or begun), SAVED: True}
        identity = run_identity(config, data, tokenizer, layout.world_size, parameters, before)
        texts[IDENTITY_FILE] = (json.dumps(identity, indent=1) + "\n").encode()
    elif "imported" in reader.state:
        texts[SOURCE_FILE] = (json.dumps(reader.state["imported"], indent=1) + "\n").encode()
    else:
        raise CheckpointError(
            f"{reader.directory}: its state says neither what data it was trained with nor where it was imported from; "
            "give one of a run"
        )
    if (run / TOKENIZER).is_file():
        texts[TOKENIZER] = read_tokenizer_file(run / TOKENIZER)
    return texts | {f"{COMPANIONS}/{name}": text for name, text in kept_companions(run).items()}


def _elements(reader: CheckpointReader, name: str) -> int:
    shape = _stored_shape(reader, "weight", name) or ()
    count = 1
    for size in shape:
        count *= size
    return count
