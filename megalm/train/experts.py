"""The trainer's side of a mixture of experts: the weights of its losses, its biases after a step, its metrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.distributed.collectives import all_reduce_sum
from megalm.distributed.mesh import ParallelMesh
from megalm.models.transformer import Transformer
from megalm.nn.router import SUMS, Router


class ExpertBalance:
    """What keeps the loads of a model's experts even, over the routers of this rank's stage; there may be none.

    All context ranks have seen the same: what routers note is of whole rows.

    Every rank of the mesh must make it and call its methods.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh, module: nn.Module) -> None:
        self.config, self.mesh = config, mesh
        self.routers: dict[int, Router] = module.routers if isinstance(module, Transformer) else {}

    def begin(self, loss_scale: Tensor) -> None:
        """Have the losses of the routers' rows and tokens weighted as those of the tokens that are predicted."""
        loss = self.config.loss
        for router in self.routers.values():
            scale = loss_scale.to(router.seen.dtype)
            router.begin(scale * loss.load_balance, scale * loss.router_z)

    def end(self) -> None:
        """Add no losses to what is computed from here on."""
        for router in self.routers.values():
            router.end()

    @torch.no_grad()
    def move_biases(self) -> None:
        """Move each expert's bias towards an even load of the step's global batch (Wang et al. 2024, algorithm 1).

        By `model.router_bias_rate`, up where fewer tokens chose the expert than the mean, down where more did. Those of
        frozen routers stay.
        """
        rate = self.config.model.router_bias_rate
        if rate is None or not self.routers:
            return
        loads = all_reduce_sum(torch.stack([r.seen for r in self.routers.values()]), self.mesh.group("data"))
        for load_E, router in zip(loads[:, : -len(SUMS)], self.routers.values(), strict=True):
            assert router.bias is not None
            if router.weight.requires_grad:
                router.bias += rate * torch.sign(load_E.mean() - load_E).to(router.bias.dtype)

    def record(self) -> dict[str, float]:
        """Return the last step's entries of a line of metrics, the same on every rank; waits for the device.

        Losses are means over tokens and layers, 1 for even loads; the load is that of the fullest expert of any layer
        over the mean of its layer's; the share is of choices that found their expert full.
        """
        model = self.config.model
        if model.experts is None:
            return {}
        seen = torch.zeros(model.blocks, model.experts + len(SUMS), dtype=torch.float64, device=self.mesh.device)
        for layer, router in self.routers.items():
            seen[layer] = router.seen
        seen = all_reduce_sum(all_reduce_sum(seen, self.mesh.group("data")), self.mesh.group("pipeline")).cpu()
        loads, sums = seen[:, : -len(SUMS)], dict(zip(SUMS, seen[:, -len(SUMS) :].sum(dim=0).tolist(), strict=True))
        if not sums["valid"]:  # frozen below and above: no backward pass came by
            return {}
        busy = loads[loads.sum(dim=1) > 0]
        return {
            "moe/load_balance_loss": sums["load_balance"] / sums["valid"],
            "moe/router_z_loss": sums["router_z"] / sums["valid"],
            "moe/max_load": float((busy.amax(dim=1) / busy.mean(dim=1)).max()),
            "moe/dropped_share": sums["dropped"] / float(loads.sum()),
        }
