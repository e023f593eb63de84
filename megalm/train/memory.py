"""What this rank's memory holds: written on request, and said together with what helps when it is not enough.

Weights, master weights, gradients and optimizer are counted by the engine. The program is what was in use before the
first step beside them (on a CPU the interpreter and its libraries, too); the rest are activations, on a CPU with what
the allocator keeps of them. What each rank holds is a table in the run's directory. On CUDA a request also writes
torch's snapshot of every block, with the stacks of a step's allocations, for pytorch.org/memory_viz.
"""

from __future__ import annotations

import ctypes
import logging
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megalm.config.checks import divisors
from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import PHASES, progress
from megalm.errors import ConfigError, OutOfMemory
from megalm.files import write_table
from megalm.train.monitor import peak_memory_bytes, used_memory_bytes
from megalm.train.profiling import PROFILE_DIR
from megalm.train.tracking import Tracker, format_bytes
from megalm.train.trainer import StepResult, Trainer
from megalm.zero.engine import HeldBytes, ZeroEngine

logger = logging.getLogger(__name__)

_LOOKS = 2
"""Steps after which an optimizer has made all that it keeps."""
RANKS_FILE = "rank_memory.tsv"
_RANKS_EVERY = 100
"""Steps after which the table of all ranks is written again: one small all-gather."""
_TRIM_EVERY = 10
"""Steps after which glibc gives free blocks back. Before 2.38 it does not take an aligned block for another of the same
size (its bug 14581): without, two stages of a small model grow by the size of their logits a step."""
_RANK_BITS = 20
"""Of a number of 64 bits, in which a peak stands above its rank."""
_HISTORY = 100_000
"""Allocations that CUDA's snapshot remembers."""


class Memory:
    """Watches over this rank's memory; `record`, `after_step` and `at_end` communicate, so every rank must call.

    A callback whose `before_step` and `before_update` the trainer must call too: it writes what is held at the step
    `profile.memory_at` on the ranks `profile.ranks`, and at the next step after the signal SIGRTMIN on the rank that
    gets it.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh) -> None:
        self.config = config
        self.mesh = mesh
        self.tracker: Tracker | None = None
        self._directory = Path(config.run.dir) / PROFILE_DIR
        self._engine: ZeroEngine | None = None
        self._program = 0
        self._asked = False
        ranks = config.profile.ranks
        self._at = config.profile.memory_at if ranks is None or mesh.rank in ranks else None
        self._held: HeldBytes | None = None
        self._usual: HeldBytes | None = None
        """What is held through every step: it does not change once there is an optimizer state."""
        self._looks = 0
        self._tabled_at = -1
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if mesh.device.type == "cpu" else None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Take requests, and turn an error for want of memory into OutOfMemory, which says what holds it."""
        before = signal.signal(signal.SIGRTMIN, self._ask)  # SIGUSR2 shows stacks
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self._why(error)) from error
        finally:
            signal.signal(signal.SIGRTMIN, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def begin(self, engine: ZeroEngine, tracker: Tracker) -> None:
        """Take note of what is in use before the first step."""
        self._engine, self.tracker = engine, tracker
        self._program = max(0, used_memory_bytes(self.mesh.device) - _total(engine.held_bytes()))

    def before_step(self, trainer: Trainer) -> None:
        """Have CUDA remember the allocations of a step that is asked for."""
        if trainer.state.step + 1 == self._at and self.mesh.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    def before_update(self, trainer: Trainer) -> None:
        """Look at what is held, in the first steps and where this step is asked for: gradients are there now."""
        if self._looks < _LOOKS:
            self._usual = trainer.engine.held_bytes()
            self._looks += 1
        if trainer.state.step + 1 == self._at:
            self._held = trainer.engine.held_bytes()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Write what was seen."""
        step = trainer.state.step
        if self._held is not None:
            self._write(step, self._held)
            self._held = None
        if self._asked:
            self._asked, self._at = False, step + 1
        if step % _RANKS_EVERY == 0:
            self._write_ranks(step)
        if self._trim is not None and step % _TRIM_EVERY == 0:
            self._trim(0)

    def at_end(self, trainer: Trainer) -> None:
        """Write the table of all ranks, where steps were done since it was written."""
        if self._usual is not None and self._tabled_at != trainer.state.step:
            self._write_ranks(trainer.state.step)

    def record(self) -> dict[str, int]:
        """Return the memory entries of a line of metrics: the peak of the rank that has the largest, and its parts.

        What of its activations lay in the host's memory at most stands beside them. Every rank of the world must call.
        """
        own = peak_memory_bytes(self.mesh.device)
        parts = self._peak_parts(own)
        largest = torch.tensor(own << _RANK_BITS | self.mesh.rank, dtype=torch.int64, device=self.mesh.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        peak, rank = divmod(int(largest.item()), 1 << _RANK_BITS)
        values = torch.tensor(list(parts.values()), dtype=torch.int64, device=self.mesh.device)
        dist.broadcast(values, src=rank)
        names = [f"memory/{name}" for name in _columns(parts)]
        return {"memory/peak_bytes": peak, "memory/peak_rank": rank, **dict(zip(names, values.tolist(), strict=True))}

    def _peak_parts(self, peak: int) -> dict[str, int]:
        """Return the bytes of each part of this rank's peak, and of what lay in the host's memory instead."""
        parts = self._parts(self._usual or HeldBytes(0, 0, 0, 0), peak)
        if self.config.train.offload_activations:
            module: Any = None if self._engine is None else self._engine.module
            parts["offloaded"] = 0 if module is None else module.offload.host_bytes.peak
        return parts

    def _write_ranks(self, step: int) -> None:
        """Write every rank's peak and its parts, on rank 0; all ranks must call."""
        self._tabled_at = step
        peak = peak_memory_bytes(self.mesh.device)
        parts = self._peak_parts(peak)
        mine = torch.tensor([peak, *parts.values()], dtype=torch.int64, device=self.mesh.device)
        everyone = mine.new_empty(self.mesh.layout.world_size * mine.numel())
        dist.all_gather_into_tensor(everyone, mine)
        if self.mesh.rank == 0:
            rows = everyone.view(-1, mine.numel()).tolist()
            lines = ["\t".join(["step", "rank", "stage", "peak_bytes", *_columns(parts)])]
            for rank, row in enumerate(rows):
                stage = self.mesh.layout.coordinates(rank).pipeline
                lines.append("\t".join(map(str, [step, rank, stage, *row])))
            write_table(self._directory.parent / RANKS_FILE, lines)

    def _write(self, step: int, held: HeldBytes) -> None:
        peak = peak_memory_bytes(self.mesh.device)
        parts = {**self._parts(held, peak), "peak": peak}
        name = f"memory-step-{step}.rank-{self.mesh.rank}"
        path = self._directory / f"{name}.txt"
        lines = [f"{self.mesh}, step {step}", *(f"{part:<16}{format_bytes(size):>12}" for part, size in parts.items())]
        try:
            self._directory.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            self._dump_snapshot(name)
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
        if self.tracker is not None:
            self.tracker.note(f"memory {path}: {_in_words(parts)}")

    def _dump_snapshot(self, name: str) -> None:
        """Write CUDA's own snapshot of this moment, with the history of allocations if it was recorded."""
        if self.mesh.device.type == "cuda":
            self._directory.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._directory / f"{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _parts(self, held: HeldBytes, total: int) -> dict[str, int]:
        """Return the bytes of each part of `total`."""
        own = {name.replace("_", " "): size for name, size in asdict(held).items()}
        rest = max(0, total - self._program - _total(held))
        return {**own, "activations": rest, "the program": self._program}

    def _why(self, error: BaseException) -> str:
        """Return the line that ends the run: where it was, what memory holds, what helps."""
        where = f"rank {self.mesh.rank} ran out of memory{_wanted(error)}"
        if self._engine is None:
            return f"{where} while the model was built; {_SPLIT}"
        held, device = self._engine.held_bytes(), self.mesh.device
        parts = self._parts(held, used_memory_bytes(device))
        with suppress(OSError):  # a full disk must not hide what is said here
            self._dump_snapshot(f"out-of-memory.rank-{self.mesh.rank}")
        peak = format_bytes(peak_memory_bytes(device))
        on_gpu = device.type == "cuda"
        helps = remedies(self.config, self.mesh.size("replica"), held, parts["activations"], on_gpu)
        return (
            f"{where} at step {progress.step}, {PHASES[progress.phase]}; it holds {_in_words(parts)} (peak {peak}); "
            f"use {', or '.join([*([' or '.join(helps)] if helps else []), _SPLIT])}"
        )


_SPLIT = "split the model over more ranks (parallel.tensor, parallel.pipeline, parallel.context, or parallel.expert)"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was caused by, is the want of memory on a GPU or a CPU."""
    while error is not None:
        lacks = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        if lacks or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def remedies(config: RunConfig, data_size: int, held: HeldBytes, activations: int, on_gpu: bool = False) -> list[str]:
    """Return the settings that would free most, the best first: of activations, or of what ZeRO divides.

    None is among them that the rest of the recipe excludes.
    """
    found: list[tuple[float, str]] = []
    micro_batch, stage = config.train.micro_batch, config.zero.stage
    if micro_batch > 1:
        smaller = divisors(micro_batch)[-2]
        found.append((activations * (1 - smaller / micro_batch), f"train.micro_batch={smaller}"))
    if config.train.recompute != "full":
        found.append((activations / 2, "train.recompute=full"))
    elif on_gpu and not config.train.offload_activations:
        found.append((activations / 2, "train.offload_activations=true"))
    divided = (held.optimizer + held.master_weights, held.gradients, held.weights)
    higher = [s for s in range(stage + 1, 4) if data_size > 1 and _goes(config, "zero", stage=s)]
    if higher:
        found.append((sum(divided[stage : higher[0]]) * (1 - 1 / data_size), f"zero.stage={higher[0]}"))
    elif stage >= 2 and config.zero.config is None and config.optim.kind != "apex_adamw":  # which runs on GPUs alone
        found.append((divided[0], f"zero.config=zero{stage}-offload"))
    found.sort(key=lambda remedy: -remedy[0])
    return [text for _, text in found]


def _goes(config: RunConfig, section: str, **values: Any) -> bool:
    """Return whether a recipe may have these values in a section."""
    sections = config.model_dump()
    try:
        type(config).model_validate({**sections, section: {**sections[section], **values}})
    except ConfigError:
        return False
    return True


def _columns(parts: dict[str, int]) -> list[str]:
    return [f"{name.removeprefix('the ').replace(' ', '_')}_bytes" for name in parts]


def _total(held: HeldBytes) -> int:
    return sum(asdict(held).values())


def _text(error: BaseException | None) -> str:
    return "" if error is None else f"{error} {_text(error.__cause__)}"


def _wanted(error: BaseException) -> str:
    """Return how much was asked for, where torch, or who asked for pinned memory, says so."""
    pinned = re.search(r"(\d+) bytes of pinned host memory", _text(error))
    if pinned is not None:
        return f" in the host ({format_bytes(int(pinned[1]))} more, pinned, for train.offload_activations)"
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", _text(error), re.IGNORECASE)
    if found is None:
        return ""
    number, unit = found.groups()
    return f" ({format_bytes(int(number)) if unit == 'bytes' else f'{number} {unit}'} more)"


def _in_words(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
