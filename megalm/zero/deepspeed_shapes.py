"""DeepSpeed's stage 3 on shapes: it decides while it runs what to gather and when, and a dry run lets it.

Its engine is made and driven as in a run, but told that its device is torch's meta device, and what needs numbers is
left out. All of that is DeepSpeed 0.19.8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.config.deepspeed import deepspeed_config
from megalm.config.run import RunConfig
from megalm.distributed.mesh import ParallelMesh
from megalm.zero.engine import MakeOptimizer, shard_of

_IN_HOST = ("offload_optimizer", "offload_param")


@contextmanager
def deepspeed_on_meta() -> Iterator[None]:
    """Have DeepSpeed make and move shapes inside, in this process; no world but a pretended one may be used."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}))
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero import linear, partition_parameters, partitioned_param_coordinator, stage3

        from megalm.zero.deepspeed_engine import forget_world

        stack.callback(forget_world)
        accelerator = get_accelerator()
        with_autocast = type(accelerator)()  # which the meta device has none of
        as_meta: dict[str, Any] = {
            "device_name": lambda index=None: "meta",
            "current_device_name": lambda: "meta",
            "current_device": lambda: "meta",
            "on_accelerator": lambda tensor: True,
        }
        stack.enter_context(mock.patch.multiple(accelerator, **as_meta))
        stack.enter_context(mock.patch.object(linear, "get_accelerator", lambda: with_autocast))
        for module in (partition_parameters, partitioned_param_coordinator):  # a check by what rank 0 sends
            stack.enter_context(mock.patch.object(module, "assert_ints_same_as_other_ranks", lambda ints: None))
        stack.enter_context(mock.patch.object(stage3, "defragment", _joined))
        # These make a view for each rank of the world, of which there may be thousands.
        stack.enter_context(mock.patch.object(stage3, "reduce_scatter_coalesced", _reduced))
        stack.enter_context(mock.patch.object(partition_parameters.AllGatherCoalescedHandle, "wait", _gathered))
        yield


class ShapesOfStage3:
    """DeepSpeed's engine of stage 3 around a model on the meta device, whose parts `divide` was called with.

    Inside `deepspeed_on_meta`. What it keeps in the host's memory in a run it has on the device.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        joined = deepspeed_config(config, mesh.size("data"))
        zero = {key: value for key, value in joined["zero_optimization"].items() if key not in _IN_HOST}
        zero["zero_quantized_weights"] = False  # by a kernel that reads numbers
        self._config = {**joined, "zero_optimization": zero}

    def divide(self, module: nn.Module) -> None:
        """Divide the weights of a part of the model over the replicas."""
        from megalm.zero.deepspeed_engine import partition_weights

        partition_weights(module, self._mesh, self._config)

    def wrap(self, module: nn.Module, make_optimizer: MakeOptimizer) -> nn.Module:
        """Make the engine; return what the forward pass must be called on."""
        from megalm.zero.deepspeed_engine import make_engine

        optimizer = make_optimizer([(shard_of(p), p) for p in module.parameters() if p.requires_grad])
        engine = make_engine(module, optimizer, self._mesh, self._config)
        self._optimizer: Any = engine.optimizer
        self._module: nn.Module = engine.module
        return self._module

    def microbatch_done(self) -> None:
        """Do what `ShardedEngine.microbatch_done` does."""
        self._optimizer.independent_gradient_partition_epilogue()
        self._optimizer.clear_backward_seen_flag()

    def weights_updated(self) -> None:
        """Do what an update does at its end: of the weights only small ones are whole then, which it gathers."""
        self._optimizer.parameter_offload.partition_all_parameters()
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        self._optimizer.invalidate_secondary_tensor()

    def held(self) -> list[Tensor]:
        """Return the tensors that are there between microbatches."""
        return held_by_stage_3(self._optimizer, self._module)

    def buffers(self) -> int:
        """Return the bytes of the buckets."""
        return sum(bucket.nbytes for bucket in _buckets(self._optimizer))


def held_by_stage_3(optimizer: Any, module: nn.Module) -> list[Tensor]:
    """Return the tensors that DeepSpeed's optimizer of stage 3 holds between microbatches, weights among them."""
    parameters = list(module.parameters())
    parts = [p.ds_tensor for p in parameters]  # type: ignore[attr-defined]
    copies = [p.ds_secondary_tensor for p in parameters]  # type: ignore[attr-defined]
    gradients = optimizer.grad_partitions_flat_buffer
    own = [*optimizer.fp16_partitioned_groups_flat, *optimizer.fp32_partitioned_groups_flat, gradients]
    return [tensor for tensor in (*parameters, *parts, *copies, *own, *_buckets(optimizer)) if tensor is not None]


def _buckets(optimizer: Any) -> list[Tensor]:
    return [bucket.buffer for bucket in optimizer.ipg_buckets.values() if bucket.buffer is not None]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return one buffer that the tensors become views of: DeepSpeed's takes the way through the host's memory."""
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, device="meta")
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part
    return flat


def _gathered(handle: Any, handle_dependency: bool = True) -> None:
    """Give the parameters of a gather the whole of their weights."""
    if handle.complete:
        return
    handle.allgather_handle.wait()
    for parameter in handle.params:
        parameter.data = torch.empty(parameter.ds_shape, dtype=parameter.ds_tensor.dtype, device="meta")
        parameter.ds_status = type(parameter.ds_status).AVAILABLE
    handle.complete = True


def _reduced(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """Return this rank's parts of the sums.

    The buffer holds each tensor's equal parts, padded, rank by rank; one tensor that needs no padding is the buffer.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    parts = [-(-tensor.numel() // ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() == ranks * parts[0]:
        buffer = tensors[0].view(-1)
    else:
        buffer = torch.empty(ranks * sum(parts), dtype=tensors[0].dtype, device="meta")
    own = buffer.narrow(0, rank * sum(parts), sum(parts))
    dist.reduce_scatter_tensor(own, buffer, group=group)
    sizes = [max(0, min(part, tensor.numel() - rank * part)) for tensor, part in zip(tensors, parts, strict=True)]
    return [piece[:size] for piece, size in zip(own.split(parts), sizes, strict=True)]
