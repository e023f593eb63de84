"""How the tensors of another program lie in ours: tables of names and layouts, bound to one model.

A table is data: a `Row` says of a logical name which of their tensors it is made of, and by which layout. A layout
is a rearrangement and nothing else: each number of ours is one of theirs. It is written down once, as views of blank
tensors, and read in both directions: their strided views fill boxes of our tensor, and the other way round. So any part
of one of ours is read as the few strided ranges of theirs that it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError
from megalm.models.build import build_stage
from megalm.zero.engine import kept_buffers, shard_of

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""A range of indices of each dim."""


@dataclass(frozen=True)
class Part:
    """Our indices from `at` on are the view (on the meta device) of their tensor number `index`."""

    index: int
    at: Shape
    view: Tensor


@dataclass(frozen=True)
class Layout:
    """Our tensor as boxes of theirs.

    `shape` is ours, each dim perhaps split into several; `theirs` are the shapes of their tensors; `parts` tile ours.
    """

    shape: Shape
    theirs: tuple[Shape, ...]
    parts: tuple[Part, ...]


MakeLayout = Callable[[ModelSection, Shape], Layout]


def _blank(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _joined(theirs: Sequence[Tensor], views: Sequence[tuple[int, Tensor]], dim: int) -> Layout:
    """Return views of their tensors, given by number, one behind the other along `dim`."""
    parts, at = [], 0
    for index, view in views:
        start = tuple(at if d == dim else 0 for d in range(view.dim()))
        parts.append(Part(index, start, view))
        at += view.shape[dim]
    shape = tuple(at if d == dim else size for d, size in enumerate(views[0][1].shape))
    return Layout(shape, tuple(tuple(their.shape) for their in theirs), tuple(parts))


def same(model: ModelSection, shape: Shape) -> Layout:
    """One tensor as it is."""
    their = _blank(*shape)
    return _joined([their], [(0, their)], 0)


def transposed(model: ModelSection, shape: Shape) -> Layout:
    """A matrix [in, out], as GPT-2 has them; a vector is as it is."""
    if len(shape) == 1:
        return same(model, shape)
    their = _blank(shape[1], shape[0])
    return _joined([their], [(0, their.t())], 0)


def stacked(model: ModelSection, shape: Shape) -> Layout:
    """As many tensors as ours has in dim 0: gate and value of an MLP."""
    theirs = [_blank(*shape[1:]) for _ in range(shape[0])]
    return _joined(theirs, [(index, their[None]) for index, their in enumerate(theirs)], 0)


def grouped(model: ModelSection, shape: Shape) -> Layout:
    """Queries, keys and values of all heads each; ours are by key/value head: its queries, its key, its value."""
    heads, groups, size = model.heads, model.key_value_heads, model.head_size
    theirs = [_blank(count * size, *shape[1:]) for count in (heads, groups, groups)]
    return _joined(theirs, [(index, their.unflatten(0, (groups, -1, size))) for index, their in enumerate(theirs)], 1)


def grouped_columns(model: ModelSection, shape: Shape) -> Layout:
    """One matrix [in, queries + keys + values], as GPT-2 has it, or its bias."""
    groups, size = model.key_value_heads, model.head_size
    their = _blank(*reversed(shape))
    whole = their.t() if len(shape) == 2 else their
    parts = whole.split([model.heads * size, groups * size, groups * size])
    return _joined([their], [(0, part.unflatten(0, (groups, -1, size))) for part in parts], 1)


def keys_values(model: ModelSection, shape: Shape) -> Layout:
    """The one key and the one value that all queries of a multi-query model share."""
    theirs = [_blank(shape[0] // 2, *shape[1:]) for _ in range(2)]
    return _joined(theirs, list(enumerate(theirs)), 0)


def gated_experts(model: ModelSection, shape: Shape) -> Layout:
    """Of each expert its gate and its value: ours are [experts, 2, features, in]."""
    theirs = [_blank(*shape[2:]) for _ in range(shape[0] * shape[1])]
    parts = [
        Part(index, (*divmod(index, shape[1]), *(0 for _ in shape[2:])), their[None, None])
        for index, their in enumerate(theirs)
    ]
    return Layout(shape, tuple(shape[2:] for _ in theirs), tuple(parts))


@dataclass(frozen=True)
class Row:
    """One line of a table: our logical name, the layout, their names.

    In names {n} is the layer, {x} is weight or bias, and of experts {e} their number.
    """

    ours: str
    layout: MakeLayout
    theirs: tuple[str, ...]

    def match(self, name: str) -> Mapping[str, str] | None:
        """Return what stands for the braces where the name is of this row."""
        pattern = re.escape(self.ours).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{x\}", "(?P<x>weight|bias)")
        found = re.fullmatch(pattern, name)
        return None if found is None else found.groupdict()

    def names(self, values: Mapping[str, str], count: int) -> tuple[str, ...]:
        """Return their names, `count` of them."""
        experts = range(count // len(self.theirs))
        return tuple(their.format(**values, e=expert) for expert in experts for their in self.theirs)


def row(ours: str, layout: MakeLayout, *theirs: str) -> Row:
    """Return a line of a table."""
    return Row(ours, layout, theirs)


@dataclass(frozen=True)
class Bound:
    """One of our tensors and all that it is made of."""

    spec: ShardSpec
    layout: Layout
    names: tuple[str, ...]

    def boxes(self, box: Box) -> Iterator[tuple[Box, Shape, Box]]:
        """Yield (the part of `box`, its shape with dims split as the layout's, the layout's box) of a box of ours."""
        dims = [
            list(_split(factors, *bounds))
            for factors, bounds in zip(_factors(self.spec.global_shape, self.layout.shape), box, strict=True)
        ]
        for pieces in product(*dims):
            inner = tuple(bounds for _, split in pieces for bounds in split)
            yield tuple(bounds for bounds, _ in pieces), tuple(stop - start for start, stop in inner), inner


def _factors(shape: Shape, split: Shape) -> list[Shape]:
    """Return the dims of `split` that each dim of `shape` has become."""
    rest = list(split)
    factors: list[Shape] = []
    for size in shape:
        own = [rest.pop(0)]
        while prod(own) < size:
            own.append(rest.pop(0))
        assert prod(own) == size, f"{split} does not split {shape}"
        factors.append(tuple(own))
    return factors


def _split(factors: Shape, start: int, stop: int) -> Iterator[tuple[tuple[int, int], Box]]:
    """Yield the range [start, stop) of a dim in pieces that are boxes of the dims that it is split into."""
    for box in flat_boxes(factors, start, stop):
        first = 0
        for (low, _), size in zip(box, factors, strict=True):
            first = first * size + low
        yield (first, first + prod(high - low for low, high in box)), box


def flat_boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Yield boxes of a tensor that together, in order, are the elements [start, stop) of it flattened."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    inner = prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if start == first * inner and stop == (last + 1) * inner:
        yield ((first, last + 1), *((0, size) for size in shape[1:]))
    elif first == last:
        for box in flat_boxes(shape[1:], start - first * inner, stop - first * inner):
            yield ((first, first + 1), *box)
    else:
        whole_from, whole_to = -(-start // inner) * inner, stop // inner * inner
        for low, high in ((start, whole_from), (whole_from, whole_to), (whole_to, stop)):
            yield from flat_boxes(shape, low, high)


def overlap(part: Part, box: Box) -> Box | None:
    """Return the indices that a part and a box of the layout have in common; None: there are none."""
    sizes = zip(part.at, part.view.shape, box, strict=True)
    common = tuple((max(at, low), min(at + size, high)) for at, size, (low, high) in sizes)
    return common if all(low < high for low, high in common) else None


def narrowed(tensor: Tensor, box: Box, origin: Sequence[int]) -> Tensor:
    """Return the box of a tensor whose first element has the indices `origin`."""
    return tensor[tuple(slice(low - at, high - at) for (low, high), at in zip(box, origin, strict=True))]


def bind(rows: Sequence[Row], model: ModelSection, vocab: int) -> dict[str, Bound]:
    """Return what each tensor of a model is made of, by logical name. Raises CheckpointError for one without a row."""
    bound = {}
    for name, spec in whole_tensors(model, vocab).items():
        matches = [(row, values) for row in rows if (values := row.match(name)) is not None]
        if len(matches) != 1:
            raise CheckpointError(f"{name}: {len(matches)} rows of the table of names are of it")
        ((found, values),) = matches
        layout = found.layout(model, spec.global_shape)
        bound[name] = Bound(spec, layout, found.names(values, len(layout.theirs)))
    return bound


def whole_tensors(model: ModelSection, vocab: int) -> dict[str, ShardSpec]:
    """Return the tensors of a whole model by logical name, from a model on the meta device."""
    kept: dict[str, Any] = {"kernels": "reference", "flash_attention": True}  # the fused ones ask for a device
    if model.position == "rotary":
        kept["sequence"] = 1  # no shape but the tables' depends on it
    training = {"train": {"steps": 1, "global_batch": 1, "micro_batch": 1}, "optim": {"lr": 1.0}}
    config = RunConfig.model_validate({**training, "model": model.model_dump()})
    config = config.model_copy(update={"model": model.model_copy(update=kept)})
    stage = build_stage(config, vocab, ParallelMesh.on_meta(RankLayout(), 0), document_start=0)
    specs = [shard_of(tensor) for tensor in (*stage.parameters(), *kept_buffers(stage))]
    return {spec.name: ShardSpec.whole(spec.name, spec.global_shape) for spec in specs}
