"""One rank of the checkpoint benchmark: `python checkpoint_process.py JOB.json`, started by `checkpoint.py`.

Rank 0 writes what was measured beside the job.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from workers import result_of

from megalm.checkpoint.files import FileSystem
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.writer import write_checkpoint
from megalm.distributed.sharding import Fragment, ShardSpec

KINDS = ("weight", "exp_avg", "exp_avg_sq")
CHUNK_BYTES = 8 << 20


def shapes(megabytes: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Return matrices of layers, four and a vector each, that with two states take so many MiB in fp32 together."""
    layer = {"qkv": 3 * hidden, "out": hidden, "up": 4 * hidden, "down": 4 * hidden}
    layer_bytes = 4 * len(KINDS) * hidden * sum(layer.values())
    layers = max(1, round((megabytes << 20) / layer_bytes))
    whole = {f"blocks.{i}.{name}.weight": (rows, hidden) for i in range(layers) for name, rows in layer.items()}
    return whole | {f"blocks.{i}.norm.weight": (hidden, 1) for i in range(layers)}


class Rank:
    """What a rank holds, and the jobs that are measured: each leaves its files below `root` and returns nothing."""

    def __init__(self, root: Path, whole: dict[str, tuple[int, int]], dcp_threads: int) -> None:
        self.root, self.rank, self.world = root, dist.get_rank(), dist.get_world_size()
        self.dcp_threads = dcp_threads
        self.mesh = init_device_mesh("cpu", (self.world,))
        generator = torch.Generator().manual_seed(self.rank)
        self.specs = {name: self.spec(name, shape, 0) for name, shape in whole.items()}
        self.turned = {name: self.spec(name, shape, 1) for name, shape in whole.items()}
        self.values = {
            (name, kind): torch.randn(spec.local_shape, generator=generator)
            for name, spec in self.specs.items()
            for kind in KINDS
        }
        self.into = {key: torch.zeros_like(values) for key, values in self.values.items()}
        self.buffer = torch.empty(sum(values.numel() for values in self.values.values()))
        self.buffer.zero_()
        self.bytes = self.buffer.nbytes

    def spec(self, name: str, shape: tuple[int, int], dim: int) -> ShardSpec:
        """Return the part of a matrix that this rank has, split along `dim`; of a vector always rows."""
        return ShardSpec.split(name, shape, dim if shape[dim] % self.world == 0 else 0, self.rank, self.world)

    def plain_write(self) -> None:
        """Write the same bytes to one file a rank, and sync it."""
        descriptor = os.open(self._new("plain") / f"{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for values in self.values.values():
            data = memoryview(values.numpy()).cast("B")
            for start in range(0, len(data), CHUNK_BYTES):
                FileSystem().write(descriptor, data[start : start + CHUNK_BYTES])
        os.fsync(descriptor)
        os.close(descriptor)

    def plain_read(self) -> None:
        """Read them back into memory that is there."""
        view = memoryview(self.buffer.numpy()).cast("B")
        with open(self.root / "plain" / f"{self.rank}", "rb", buffering=0) as file:
            done = 0
            while count := file.readinto(view[done : done + CHUNK_BYTES]):
                done += count
        assert done == self.bytes

    def save(self) -> None:
        """Write a checkpoint."""
        fragments = (
            Fragment(self.specs[name], kind, 0, values.flatten()) for (name, kind), values in self.values.items()
        )
        write_checkpoint(self._new("megalm"), 1, fragments, {"step": 1}, dist.group.WORLD)

    def snapshot(self) -> None:
        """Copy everything to memory that is there: what a step waits for where the write is in the background."""
        for key, values in self.values.items():
            self.into[key].copy_(values)

    def load(self, verify: bool = True) -> None:
        """Read the checkpoint into tensors that are there."""
        with closing(CheckpointReader(self.root / "megalm" / "step-00000001", verify)) as reader:
            for (name, kind), target in self.into.items():
                reader.read_flat(self.specs[name], kind, 0, target.numel(), out=target.view(-1))

    def load_unverified(self) -> None:
        """Read it without looking at checksums."""
        self.load(verify=False)

    def reshard(self) -> None:
        """Read it as ranks that split matrices along the other dim."""
        with closing(CheckpointReader(self.root / "megalm" / "step-00000001")) as reader:
            for (name, kind), target in self.into.items():
                reader.read_flat(self.turned[name], kind, 0, target.numel(), out=target.view(-1))

    def _state(self, values: dict[tuple[str, str], Tensor], specs: dict[str, ShardSpec]) -> dict[str, Any]:
        state = {}
        for (name, kind), local in values.items():
            spec = specs[name]
            placement = Replicate() if spec.dim is None else Shard(spec.dim)
            state[f"{name}/{kind}"] = DTensor.from_local(
                local.view(spec.local_shape), self.mesh, [placement], run_check=False
            )
        return state

    def dcp_save(self) -> None:
        """Let torch's distributed checkpoint write the same, synced as well."""
        writer = dcp.FileSystemWriter(self._new("dcp"), thread_count=self.dcp_threads, sync_files=True)
        dcp.save(self._state(self.values, self.specs), storage_writer=writer)

    def dcp_load(self) -> None:
        """Let it read into tensors that are there."""
        dcp.load(self._state(self.into, self.specs), storage_reader=dcp.FileSystemReader(self.root / "dcp"))

    def dcp_reshard(self) -> None:
        """Let it read as ranks that split along the other dim."""
        dcp.load(self._state(self.into, self.turned), storage_reader=dcp.FileSystemReader(self.root / "dcp"))

    def check(self) -> None:
        """Fail unless what was loaded is what was saved."""
        assert all(torch.equal(self.into[key], values) for key, values in self.values.items())

    def clear(self) -> None:
        """Forget what was loaded."""
        for target in self.into.values():
            target.zero_()

    def _new(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def forget_files(self) -> None:
        """Have the system drop its copies of all files: the next read is from the disk."""
        for path in self.root.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def timed(job: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds until all ranks are through, and the processor's seconds of all of them."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    cpu = time.process_time() - cpu
    dist.barrier()
    wall = time.perf_counter() - wall
    sums = torch.tensor([cpu], dtype=torch.float64)
    dist.all_reduce(sums)
    return wall, float(sums)


def measure(rank: Rank, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Return the times of each job: saves in turn, then loads in turn, the order reversed each time."""
    found: dict[str, list[tuple[float, float]]] = {}
    saves = [rank.plain_write, rank.save, rank.dcp_save]
    loads = [rank.plain_read, rank.load, rank.load_unverified, rank.dcp_load, rank.reshard, rank.dcp_reshard]
    for repetition in range(repetitions + 1):  # the first one warms up
        if rank.rank == 0:
            for path in rank.root.iterdir():
                shutil.rmtree(path)
        order = 1 if repetition % 2 else -1
        for jobs in (saves[::order], [rank.snapshot], loads[::order]):
            for job in jobs:
                rank.clear()
                if jobs is not saves and rank.rank == 0:
                    rank.forget_files()
                seconds = timed(job)
                if job.__name__ in ("load", "dcp_load", "snapshot"):
                    rank.check()
                if repetition:
                    found.setdefault(job.__name__, []).append(seconds)
    return found


def main() -> None:
    """Measure a job."""
    job_path = Path(sys.argv[1])
    job = json.loads(job_path.read_text())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("gloo")
    root = job_path.with_name("files")
    root.mkdir(exist_ok=True)
    rank = Rank(root, shapes(job["megabytes"], job["hidden"]), job["dcp_threads"])
    found = measure(rank, job["repetitions"])
    if rank.rank == 0:
        size = rank.bytes * rank.world
        result_of(job_path).write_text(json.dumps({"bytes": size, "seconds": found}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
