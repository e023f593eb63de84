"""Experts that ranks divide, as DeepSpeed's stages 1 and 2 are told of them.

A parameter of experts has fewer replicas than a dense one. DeepSpeed partitions groups of parameters that say `moe`
over a process group of their own, and sums their gradients over it, divided by the number of all data ranks as all
others are. It would look for layers of its own to find out that there are any.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from megalm.distributed.mesh import ParallelMesh
from megalm.zero.engine import shard_of

_NAME = "experts"


def tell_of_experts(module: nn.Module, optimizer: torch.optim.Optimizer, mesh: ParallelMesh) -> None:
    """Mark parameters of divided experts, and give them groups of the optimizer of their own, before an engine is made.

    The JSON must not ask for reductions that know one process group only (`config/deepspeed.py`).
    """
    experts = [p for p in module.parameters() if shard_of(p).first_expert is not None]
    if not experts:
        return
    deepspeed_groups._EXPERT_PARALLEL_GROUP[_NAME] = mesh.group("expert")
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[_NAME] = mesh.group("expert_replica")
    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, _NAME  # type: ignore[attr-defined]
    own = set(map(id, experts))
    for group in list(optimizer.param_groups):
        divided = [p for p in group["params"] if id(p) in own]
        if len(divided) == len(group["params"]):
            group |= {"moe": True, "name": _NAME}
        elif divided:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.param_groups.append({**group, "params": divided, "moe": True, "name": _NAME})


def has_divided_experts(module: nn.Module) -> bool:
    """Return whether `tell_of_experts` has marked any."""
    return any(not getattr(parameter, "allreduce", True) for parameter in module.parameters())


def _configure_moe_settings(self: Any) -> None:
    """Give each group of experts its process group. DeepSpeed's own refuses fp64, whose path is chosen later."""
    self.is_moe_param_group = [bool(group.get("moe")) for group in self.optimizer.param_groups]
    for index, of_experts in enumerate(self.is_moe_param_group):
        if of_experts:
            own = self.expert_dp_process_group[_NAME]
            self.real_dp_process_group[index], self.partition_count[index] = own, own.size()


stage_1_and_2.DeepSpeedZeroOptimizer._configure_moe_settings = _configure_moe_settings
