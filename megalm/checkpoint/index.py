"""How a save's index comes together: what each rank tells of its pieces, and what rank 0 makes of it.

A rank's list of rows is large, and under ZeRO 3 those of thousands of ranks say the same: part k of N of every tensor.
So a rank writes these without k and its own number; lists that are equal then have one digest and travel once.

Owns: these lists, the joining of pieces to runs, and the check that every tensor is there exactly once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from megalm.checkpoint.geometry import Piece
from megalm.checkpoint.manifest import Entry
from megalm.checkpoint.names import file_name, parse_file_name
from megalm.errors import CheckpointError

Rows = list[dict[str, Any]]


class _Run(NamedTuple):
    """Ranks at even distances that have parts which follow each other: part + i is rank + i * stride's."""

    part: int
    rank: int
    number: int = 1
    stride: int = 0


def told(rank: int, rows: Rows) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Return what a rank tells of its entries (JSON values): for itself alone, and two lists of rows by their digests.

    Of the first list is `flat` [size]: elements [k * size, (k + 1) * size), where k is the rank's "part", the one that
    most rows have. The second has all other rows, with [start, stop]. Neither has the rank in "file".
    """
    spans = [(row["flat"][0], row["flat"][1] - row["flat"][0]) for row in rows]
    parts = Counter(start // size for start, size in spans if size and start % size == 0)
    part = min(parts, key=lambda number: (-parts[number], number), default=0)
    even: Rows = []
    others: Rows = []
    for row, (start, size) in zip(rows, spans, strict=True):
        named = {**row, "file": parse_file_name(row["file"])[1]}
        if size and start == part * size:
            even.append({**named, "flat": [size]})
        else:
            others.append(named)
    lists = {_digest(some): some for some in (even, others) if some}
    return {"rank": rank, "part": part, "lists": sorted(lists)}, lists


def _digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def collect(reports: Iterable[Mapping[str, Any]], lists: Mapping[str, Rows]) -> dict[tuple[str, str], Rows]:
    """Return the entries of all ranks by tensor (JSON values), from what they told; each tensor is there exactly once.

    Raises CheckpointError, naming the tensor, for a gap, for elements written twice, and for shapes or dtypes
    on which the ranks do not agree.
    """
    holders: dict[str, list[tuple[int, int]]] = {}
    for report in reports:
        for digest in report["lists"]:
            holders.setdefault(digest, []).append((report["part"], report["rank"]))
    tensors: dict[tuple[str, str], list[Entry]] = {}
    for digest, held in holders.items():
        runs = list(_runs(sorted(held)))
        for row in lists[digest]:
            entries = tensors.setdefault((row["kind"], row["name"]), [])
            some = runs if len(row["flat"]) == 1 else [_Run(0, rank) for _, rank in held]
            entries += [_entry(row, run) for run in some]
    for (kind, name), entries in tensors.items():
        problem = tiling_problem(entries)
        if problem:
            raise CheckpointError(f"tensor {name} ({kind}): {problem}; the ranks' fragments must tile each tensor once")
    return {key: [entry.to_json() for entry in _joined(entries)] for key, entries in tensors.items()}


def _runs(held: list[tuple[int, int]]) -> Iterator[_Run]:
    """Yield the runs in (part, rank), sorted."""
    at = 0
    while at < len(held):
        (part, rank), number, stride = held[at], 1, 0
        if at + 1 < len(held):
            stride = held[at + 1][1] - rank
        while stride > 0 and at + number < len(held) and held[at + number] == (part + number, rank + number * stride):
            number += 1
        yield _Run(part, rank, number, stride if number > 1 else 0)
        at += number


def _entry(row: dict[str, Any], run: _Run) -> Entry:
    """Return a row of a list as the entry of the ranks that hold it."""
    flat = row["flat"]
    if len(flat) == 1:
        (size,) = flat
        flat = [run.part * size, (run.part + run.number) * size, *([size, run.stride] if run.stride else [])]
    return Entry.from_json({**row, "file": file_name(run.rank, row["file"]), "flat": flat})


def _joined(entries: list[Entry]) -> list[Entry]:
    """Join pieces and runs that follow each other to runs; return them in order."""
    waiting: dict[Any, Entry] = {}  # the last one of each shard
    done: list[Entry] = []
    for entry in sorted(entries, key=_place):
        before = waiting.get(entry.piece.shard)
        both = before and before.followed_by(entry)
        if before and not both:
            done.append(before)
        waiting[entry.piece.shard] = both or entry
    return sorted([*done, *waiting.values()], key=_place)


def _place(entry: Entry) -> tuple[int, int, int, str]:
    return entry.piece.shard.start, entry.piece.start, entry.piece.stop, entry.file


def tiling_problem(entries: list[Entry]) -> str | None:
    """Return where the pieces of one tensor leave a gap, meet or do not agree; None where they tile it once."""
    shards = [entry.piece.shard for entry in entries]
    known: dict[str, set[Any]] = {
        "shape": {shard.global_shape for shard in shards},
        "dtype": {entry.dtype for entry in entries},
        "dim": {shard.dim for shard in shards},
    }
    for key, values in known.items():
        if len(values) > 1:
            return f"the ranks wrote {key} {' and '.join(sorted(map(json.dumps, values)))}"
    if shards[0].first_expert is None:
        return _shards_problem(entries)
    experts: dict[tuple[int, int], list[Entry]] = {}
    for entry, shard in zip(entries, shards, strict=True):
        experts.setdefault((shard.first_expert or 0, shard.local_shape[0]), []).append(entry)
    edges = [0, *(edge for first, count in sorted(experts) for edge in (first, first + count))]
    edges.append(shards[0].global_shape[0])
    for stop, following in list(pairwise(edges))[::2]:
        if stop != following:
            return f"experts {stop} to {following} are " + _verdict(stop, following, entries)
    return next(filter(None, map(_shards_problem, experts.values())), None)


def _shards_problem(entries: list[Entry]) -> str | None:
    """Return where the pieces, of the same experts if of any, leave a gap or meet; None where they tile."""
    shards: dict[tuple[int, int], list[Piece]] = {}
    for entry in sorted(entries, key=_place):
        shards.setdefault((entry.piece.shard.start, entry.piece.shard.length), []).append(entry.piece)
    for (start, _), pieces in shards.items():
        shard = pieces[0].shard
        edges = [0, *(edge for piece in pieces for edge in (piece.start, piece.stop))]
        edges.append(Piece(shard, 0, prod(shard.local_shape)).valid_stop)
        for stop, following in list(pairwise(edges))[::2]:
            if stop != following:
                where = f"in the shard at {start}, elements {stop} to {following} are "
                return where + _verdict(stop, following, entries)
    shard = entries[0].piece.shard
    if shard.dim is not None and 0 not in shard.global_shape:
        edges = [0, *(edge for start, length in sorted(shards) for edge in (start, start + length))]
        edges.append(shard.global_shape[shard.dim])
        for stop, following in list(pairwise(edges))[::2]:
            if stop != following:
                return f"indices {stop} to {following} of dim {shard.dim} are " + _verdict(stop, following, entries)
    return None


def _verdict(stop: int, following: int, entries: list[Entry]) -> str:
    names = ", ".join(sorted({entry.file for entry in entries})[:4])
    return ("missing" if following > stop else "written twice") + f" (files {names})"
