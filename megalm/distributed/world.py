"""A recipe's mesh, from the launcher's environment to the end of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megalm.config.checks import check_world
from megalm.config.loop_checks import COMPILED_MASKS
from megalm.config.run import RunConfig
from megalm.distributed import launch
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.rendezvous import Rendezvous, read_environment
from megalm.errors import ConfigError

FUSED_ON_CPU = "model.kernels=fused needs a CUDA device and this run computes on cpu; use auto"


def check_device(config: RunConfig) -> None:
    """Raise ConfigError for a device that this machine lacks, or for kernels and products that need one."""
    if torch.cuda.is_available() and config.run.device != "cpu":
        if config.train.compile and config.model.draws_masks and config.model.kernels == "auto":
            raise ConfigError(COMPILED_MASKS)
        if config.train.fp8 != "none":
            _check_fp8(config.train.fp8)
        return
    if config.run.device == "cuda":
        raise ConfigError("run.device=cuda, but torch sees no GPU here; megalm doctor says why; run.device=cpu works")
    if config.model.kernels == "fused" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(FUSED_ON_CPU)
    if config.optim.kind == "apex_adamw":
        raise ConfigError("optim.kind=apex_adamw needs a GPU and this run computes on cpu; use adamw")
    if config.train.offload_activations:
        raise ConfigError(
            "train.offload_activations=true moves activations to the host's memory, where this run on cpu has them "
            "already; use train.offload_activations=false"
        )
    if config.train.fp8 != "none":
        raise ConfigError(
            f"train.fp8={config.train.fp8} needs a GPU with products in fp8 and this run computes on cpu; use "
            "train.fp8=none"
        )


def _check_fp8(recipe: str) -> None:
    """Raise ConfigError where a GPU that this process sees has no products in fp8."""
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        if torch.version.hip is not None:  # whose capabilities do not rise with it: gfx90a, without, has 9.0
            kind, has_fp8 = gpu.gcnArchName.split(":")[0], gpu.gcnArchName.startswith(("gfx94", "gfx95"))
        else:
            kind, has_fp8 = f"compute capability {gpu.major}.{gpu.minor}", (gpu.major, gpu.minor) >= (8, 9)
        if not has_fp8:
            raise ConfigError(
                f"train.fp8={recipe} needs products in fp8, which NVIDIA's GPUs have from compute capability 8.9 on, "
                f"AMD's from MI300 on, and GPU {index} here, {gpu.name}, is of {kind}; use train.fp8=none"
            )


def layout_of(config: RunConfig, world_size: int) -> RankLayout:
    """Return the layout of a recipe on so many ranks. Raises ConfigError where they do not fit it."""
    parallel = config.parallel
    data = check_world(config, world_size)
    return RankLayout(parallel.pipeline, data, parallel.tensor, parallel.context, parallel.expert)


@contextmanager
def joined_mesh(config: RunConfig) -> Iterator[ParallelMesh]:
    """Join the world that the launcher's environment describes (none: a world of one) and give the recipe's mesh.

    Afterwards, also after an error, the groups are gone and the environment is as it was. Raises ConfigError where the
    world does not fit the recipe, before any group is formed; LaunchError for an environment that contradicts itself;
    DistributedError where the other ranks cannot be reached in time.
    """
    rendezvous = read_environment(os.environ)
    world_size = 1 if rendezvous is None else rendezvous.world_size
    layout = layout_of(config, world_size)
    device_type = config.run.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = launch.local_device(rendezvous, device_type)
    with joined_world(rendezvous, device_type, config.run.start_timeout_s, config.run.collective_timeout_s):
        yield ParallelMesh.create(layout, device, config.run.collective_timeout_s)


@contextmanager
def joined_world(
    rendezvous: Rendezvous | None, device_type: str, start_timeout_s: float, collective_timeout_s: float
) -> Iterator[None]:
    """Form the world's process group (None: a world of one) and end it afterwards, also after an error.

    The environment is then as it was. Raises DistributedError where the other ranks cannot be reached in time.
    """
    with _restored_environment():
        launch.start(rendezvous, device_type, start_timeout_s, collective_timeout_s)
        finished = False
        try:
            with launch.peer_errors(f"rank {0 if rendezvous is None else rendezvous.rank}"):
                yield
            finished = True
        finally:
            launch.stop(failed=not finished)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Take back what `launch.start` exports: a world of one that is over must not look like a launcher's."""
    before = {name: os.environ.get(name) for name in launch.EXPORTED}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
