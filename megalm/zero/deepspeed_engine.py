"""DeepSpeed as the ZeRO adapter needs it: its engine with our dtypes and our mesh. The only import of deepspeed.

`sharded.py` drives what is made here. Both use methods that DeepSpeed keeps to itself, so the version is pinned
exactly (0.19.8).
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.zero.call_log import CallLog, wait_for_each_call
from megalm.zero.deepspeed_experts import has_divided_experts, tell_of_experts
from megalm.zero.engine import LARGEST_NORM, shard_of

# The shared-memory collectives would be compiled at start-up (40 s); gloo and NCCL do without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

# DeepSpeed's stages sum the norm in different dtypes, so they differ on what is too large.
stage_1_and_2.is_invalid_grad_norm = stage3.is_invalid_grad_norm = lambda norm: not float(norm) <= LARGEST_NORM

_CALLS = CallLog(lambda name: deepspeed.comm.comm.timers(name).reset())
deepspeed.comm.comm.comms_logger = _CALLS

_PLAIN_LINEAR = F.linear
_ENGINES: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()  # of this world


def make_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, mesh: ParallelMesh, config: dict[str, Any]
) -> DeepSpeedEngine:
    """Return a DeepSpeedEngine around the module and its optimizer. Every rank of the mesh must call."""
    _join(mesh)
    tell_of_experts(module, optimizer, mesh)
    elements = sum(math.prod(shard_of(p).local_shape) for p in module.parameters())
    fitting = _with_fitting_bucket(config, elements)
    mpu = _ModelParallelUnit(mesh)
    _CALLS.enabled = False  # or DeepSpeed, which turns it on only, would go on as the JSON of the engine before says
    engine = _Engine(
        args=None,
        model=module,
        optimizer=optimizer,
        mpu=mpu,
        config=fitting,
        config_class=DeepSpeedConfig(fitting, mpu),
    )
    engine._configure_python_gc()  # as `deepspeed.initialize` does
    _ENGINES.add(engine)
    if _CALLS.enabled:
        wait_for_each_call(deepspeed.comm.comm.cdb)
        _CALLS.forget()
    return engine


def call_table() -> list[str]:
    """Return DeepSpeed's calls since the engine was made, in lines with a head; none where they are not logged."""
    return _CALLS.table() if _CALLS.enabled else []


def partition_weights(module: nn.Module, mesh: ParallelMesh, config: dict[str, Any]) -> None:
    """Divide the module's parameters over the data axis (ZeRO 3), so that this rank keeps its part of each only.

    Called for each part of a model as soon as it is built: the whole of it never lies on one rank. The values stay
    as they were made, fp64 too, of which DeepSpeed must not know. Every rank of the data axis must
    call. Raises ConfigError where weights cannot travel in 8 bits.
    """
    _join(mesh)
    zero = config["zero_optimization"]
    if zero.get("zero_quantized_weights"):
        _check_eighths(module, mesh.size("replica"), zero.get("stage3_param_persistence_threshold", 100_000))
    block = zero.get("zero_hpz_partition_size", 1)
    if block > 1 and deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None:
        # DeepSpeed would take neighbouring ranks of the world, which are tensor ranks.
        deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = mesh.replica_block(block)
    parameters = list(module.parameters())
    if parameters:
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=mesh.group("replica"),
            zero_param_parallel_group=deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP,
            config_dict_or_path=config,
            mpu=_ModelParallelUnit(mesh),
            dtype=torch.float32 if parameters[0].dtype is torch.float64 else parameters[0].dtype,
        )


def _check_eighths(module: nn.Module, data_size: int, smallest: int) -> None:
    """Raise ConfigError unless DeepSpeed's kernel can quantize each data rank's part of the divided weights."""
    for parameter in module.parameters():
        size = math.prod(shard_of(parameter).local_shape)
        part = -(-size // data_size)
        if size >= smallest and part % 8:
            raise ConfigError(
                f"zero_quantized_weights=true takes multiples of 8 elements and {shard_of(parameter).name} has {part} "
                f"on each of {data_size} data-parallel ranks; use zero3-hpz, or a power of two of ranks"
            )


def forget_world() -> None:
    """Drop what DeepSpeed keeps for the whole process, so that another world can be formed in it.

    Called at the end of a world, while it still stands. Ranks of the next one may have another past: what is kept here
    would make them differ. Under stage 3 ranks compare the numbers of their parameters and modules, which are counted
    up. And stage 3 replaces `F.linear` for good by one whose backward pass gives bias and weight their gradients in the
    other order; stages 1 and 2 add up the ranks' gradients in the order in which they come, so a rank with the one and
    a rank with the other would add weights to biases without a word. An engine's gradient hooks hold the engine, out of
    the garbage collector's sight, and stage 3's stack of modules and its cache of what to release the model: with any
    of them the world's groups stay, and their threads, each of which wakes a hundred times a second.
    """
    while _ENGINES:
        _ENGINES.pop().destroy()
    deepspeed.comm.comm.cdb = None
    _CALLS.enabled = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed_groups._release_process_group_references()
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    FWD_MODULE_STACK.clear()
    to_release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(to_release).nonlocals["func"].cache_clear()
    F.linear = _PLAIN_LINEAR


def _join(mesh: ParallelMesh) -> None:
    """Make DeepSpeed take the process group that is there."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)


class _Engine(DeepSpeedEngine):  # type: ignore[misc]
    """A DeepSpeedEngine that takes its dtypes from the module, fp64 included."""

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = has_divided_experts(model)

    def _module_dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """Return (weights, accumulated gradients): gradients are never narrower than fp32."""
        dtype = self._module_dtype()
        return dtype, torch.promote_types(dtype, torch.float32)

    @property
    def communication_data_type(self) -> torch.dtype:
        """Gradients travel in the recipe's dtype, or that in which they are accumulated."""
        chosen: torch.dtype | None = self._config.communication_data_type
        return self.get_data_types()[1] if chosen is None else chosen

    def zero_reduce_scatter(self) -> bool:
        """DeepSpeed's checks admit its reduce-scatter path for fp32 and narrower only."""
        return self._module_dtype() != torch.float64 and bool(super().zero_reduce_scatter())

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
        return str(ZERO_OPTIMIZATION)


class _ModelParallelUnit:
    """The mesh in the words that DeepSpeed asks for; its model parallelism is tensor x pipeline."""

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("replica")

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.size("replica")

    def get_data_parallel_rank(self) -> int:
        return self._mesh.index("replica")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("model")

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.size("model")

    def get_model_parallel_rank(self) -> int:
        return self._mesh.coordinates.pipeline * self._mesh.size("tensor") + self._mesh.coordinates.tensor

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.size("tensor")

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.coordinates.tensor


def _with_fitting_bucket(config: dict[str, Any], elements: int) -> dict[str, Any]:
    """Return the config with a reduction buffer, which DeepSpeed allocates whole, no larger than all gradients."""
    zero = config["zero_optimization"]
    fitting = min(int(zero.get("reduce_bucket_size", 5e8)), max(elements, 1))
    return {**config, "zero_optimization": {**zero, "reduce_bucket_size": fitting}}
