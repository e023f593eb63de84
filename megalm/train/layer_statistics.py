"""What happens in each layer, sampled each `inspect.every` steps into the run's `inspect.jsonl`.

Numbers are those of the whole model and the whole batch, whatever the layout: sums of squares and counts of what each
rank holds once are added over the world, the largest values of a feed-forward unit over the replicas. Between samples
nothing is hooked, and no sample changes what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.collectives import all_reduce_max
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.places import Places, select, whole
from megalm.distributed.sharding import Fragment
from megalm.models.transformer import Transformer
from megalm.nn.context import Context
from megalm.nn.entropy import head_entropy
from megalm.train.layer_report import INSPECT_FILE, layer_names
from megalm.train.metrics_file import MetricsFile
from megalm.train.trainer import StepResult, Trainer
from megalm.zero.engine import kept_buffers, shard_of

DEAD = 0.01
"""A feed-forward unit is dead at a step where it stays below this share of its layer's root mean square."""

_SUMS = ("weight", "gradient", "update", "activation", "activations", "unit", "units", "entropy", "dead", "widths")
"""Columns of the table that is summed over the world: squares of the first four and `unit`, counts in the plurals."""


class LayerStatistics:
    """Measures the layers at the steps that are due; every rank calls, rank 0 writes.

    A callback whose `before_step` and `before_update` the trainer must call too. A sampled step holds a copy of this
    rank's share of the master weights until its update is done.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh, model: Transformer, resume_step: int) -> None:
        self.config, self.mesh, self.model = config, mesh, model
        self.every = config.inspect.every
        self._names = layer_names(config.model.blocks)
        writes = self.every > 0 and mesh.rank == 0
        self._file = MetricsFile(Path(config.run.dir), resume_step, INSPECT_FILE) if writes else None
        self._written = resume_step
        self._undo: list[Callable[[], None]] = []
        self._sums: Tensor | None = None
        """[layers, _SUMS] of this rank, float64; None: the step is not due."""
        self._largest_F: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []
        self._padded = config.data.rows == "documents" or config.train.pad_batch
        self._mask_BT: Tensor | None = None
        """Of the block that is running: false for padding, of which nothing is measured. None: there is none."""
        self._own: Places = ()
        """Of the block that is running: this context rank's tokens."""

    def before_step(self, trainer: Trainer) -> None:
        """Look into this rank's blocks, if the step that begins is due."""
        self._stop()
        step = trainer.state.step + 1
        if self.every and step % self.every == 0:
            shape = len(self._names), len(_SUMS)
            self._sums = torch.zeros(shape, dtype=torch.float64, device=self.mesh.device)
            for index in map(int, self.model.blocks):
                self._look_into(index, head=(step // self.every + index) % self.config.model.heads)

    def _stop(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._sums = None
        self._largest_F, self._entropy, self._weights = {}, {}, []

    def _look_into(self, index: int, head: int) -> None:
        block: Any = self.model.blocks[str(index)]
        self._undo.append(block.register_forward_pre_hook(self._see_context).remove)
        if self.model.sequence or self.mesh.coordinates.tensor == 0:  # else all tensor ranks hold the same tokens
            self._undo.append(block.register_forward_hook(partial(self._see_output, index)).remove)
        if not block.has_experts:  # whose units see different tokens each
            self._undo.append(block.mlp.down.register_forward_pre_hook(partial(self._see_units, index)).remove)
        attention, own = block.attention, head - block.attention.first_head
        if self.mesh.coordinates.data == 0 and 0 <= own < attention.heads:
            self._undo.append(partial(setattr, attention, "attend", attention.attend))
            attention.attend = partial(self._attend, index, own, attention.attend)

    def _see_context(self, block: Any, inputs: tuple[Tensor, Context]) -> None:
        self._mask_BT = inputs[1].loss_mask_BT if self._padded else None
        self._own = whole(inputs[1].tokens)
        if self.model.context is not None:
            self._own = self.model.context.places(inputs[1].tokens)

    def _see_output(self, index: int, block: Any, inputs: tuple[Tensor, Context], x: Tensor) -> None:
        x, count = self._measured(x.detach(), inputs[1].held)
        self._add(1 + index, "activation", _square(x))
        self._add(1 + index, "activations", count)

    def _measured(self, x_BTX: Tensor, places: Places) -> tuple[Tensor, Tensor | float]:
        """Return x, of the tokens `places`, with zeros for padding, and how many numbers are of others."""
        if self._mask_BT is None:
            return x_BTX, x_BTX.numel()
        mask_BT = select(self._mask_BT, places)
        return x_BTX * mask_BT[..., None], mask_BT.sum() * x_BTX.shape[-1]

    def _see_units(self, index: int, down: Any, inputs: tuple[Tensor, ...]) -> None:
        h_BTF, count = self._measured(inputs[0].detach(), self._own)
        h_NF = h_BTF.flatten(0, -2)
        self._add(1 + index, "unit", _square(h_NF))
        self._add(1 + index, "units", count)
        low_F, high_F = torch.aminmax(h_NF, dim=0)
        largest_F = torch.maximum(high_F, -low_F)
        self._largest_F[index] = torch.maximum(largest_F, self._largest_F.get(index, largest_F))

    def _attend(
        self, index: int, head: int, attend: Any, q_BTHE: Tensor, k_BTGE: Tensor, *v: Tensor, **how: Any
    ) -> Any:
        """Attend, and see a head's entropy in the first row of the step's batch, which comes first."""
        if index not in self._entropy:
            queries = None if self._mask_BT is None else int(self._mask_BT[0].sum())
            q_1THE, k_1TGE = (self._whole_rows(x[:1]) for x in (q_BTHE, k_BTGE))
            bias_HTS = how.get("bias_HTS")
            if bias_HTS is not None and bias_HTS.shape[1] < q_1THE.shape[1]:
                bias_HTS = self._whole_rows(bias_HTS.detach())
            self._entropy[index] = head_entropy(q_1THE, k_1TGE, head, queries=queries, **how | {"bias_HTS": bias_HTS})
            if self.mesh.index("context") == 0:
                self._add(1 + index, "entropy", self._entropy[index])
        return attend(q_BTHE, k_BTGE, *v, **how)

    def _whole_rows(self, x_BTX: Tensor) -> Tensor:
        """Return all tokens, in their order, of which each context rank has some."""
        context = self.model.context
        return x_BTX if context is None else context.whole_rows(x_BTX)

    def before_update(self, trainer: Trainer) -> None:
        """See the gradients, and keep the weights until they are updated."""
        if self._sums is not None:
            for fragment in trainer.engine.counted_gradients():
                self._add(self._row(fragment), "gradient", _square(fragment.values))
            self._weights = [fragment.values.clone() for fragment in _weights(trainer)]

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Put together what all ranks saw, and write it; a step that made no update is left out."""
        if self._sums is not None and result.updated:
            for before, fragment in zip(self._weights, _weights(trainer), strict=True):
                self._add(self._row(fragment), "weight", _square(fragment.values))
                self._add(self._row(fragment), "update", _square(before.sub_(fragment.values)))
            record = self._record(trainer.state.step, self._sums)
            if self._file is not None:
                if trainer.state.step <= self._written:  # the run went back
                    self._file.rewind(trainer.state.step - 1)
                self._file.write(record)
                self._written = trainer.state.step
        self._stop()

    def at_end(self, trainer: Trainer) -> None:
        """Bring what was written to the disk."""
        if self._file is not None:
            self._file.close()

    def _record(self, step: int, sums: Tensor) -> dict[str, float]:
        dist.all_reduce(sums, group=world_group())
        columns = sums.unbind(1)
        unit_rms = (columns[_SUMS.index("unit")] / columns[_SUMS.index("units")]).sqrt()
        counts = torch.zeros_like(sums)
        for index, largest_F in sorted(self._largest_F.items()):
            largest_F = all_reduce_max(largest_F, self.mesh.group("replica"))
            if self.mesh.index("replica") == 0:
                counts[1 + index, _SUMS.index("dead")] = (largest_F < DEAD * unit_rms[1 + index]).sum()
                counts[1 + index, _SUMS.index("widths")] = largest_F.numel()
        dist.all_reduce(counts, group=world_group())
        record: dict[str, float] = {"step": step}
        for name, values in zip(self._names, (sums + counts).tolist(), strict=True):
            seen = dict(zip(_SUMS, values, strict=True))
            record |= {f"{name}/{what}": value for what, value in _figures(seen).items()}
        return record

    def _add(self, row: int, what: str, value: Tensor | float) -> None:
        assert self._sums is not None, "hooks are gone where no step is due"
        self._sums[row, _SUMS.index(what)] += value

    def _row(self, fragment: Fragment) -> int:
        part, _, rest = fragment.shard.name.partition(".")
        if part == "blocks":
            return 1 + int(rest.partition(".")[0])
        return len(self._names) - 1 if part in ("final_norm", "head") else 0


def _weights(trainer: Trainer) -> Iterator[Fragment]:
    """Yield this rank's share of what is trained or frozen: routers' biases, which count tokens, are neither."""
    kept = {shard_of(buffer).name for buffer in kept_buffers(trainer.engine.module)}
    return (f for f in trainer.engine.state() if f.kind == "weight" and f.shard.name not in kept)


def _square(x: Tensor) -> Tensor:
    """Return the sum of squares, float64: in fp32 up to the root, or wider where x is."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).double().square()


def _figures(seen: dict[str, float]) -> dict[str, float]:
    """Return what is said of a layer; the embedding and the head have weights alone, a head that is tied none."""
    if seen["weight"] == 0.0:
        return {}
    figures = {"weight_norm": seen["weight"] ** 0.5, "gradient_norm": seen["gradient"] ** 0.5}
    figures["update_ratio"] = (seen["update"] / seen["weight"]) ** 0.5
    if seen["activations"]:
        figures["activation_rms"] = (seen["activation"] / seen["activations"]) ** 0.5
        if seen["widths"]:  # experts' are not looked at
            figures["dead_units"] = seen["dead"] / seen["widths"]
        figures["attention_entropy"] = seen["entropy"]
    return figures
