"""Optimizers of libraries that a machine may have: torchao's AdamW with a state of 8 bits, apex's FusedAdam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.errors import ConfigError
from megalm.tensor_parallel.float8 import quiet_torchao
from megalm.zero.parts import Part, PlacedOptimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class EightBitAdamW(PlacedOptimizer):
    """torchao's AdamW8bit (Dettmers et al. 2022), which codes its state in blocks of 256 with a scale each.

    The blocks follow the tensors as they lie in memory, so these must be whole parameters. Tensors below 4096 elements,
    or of a number that 256 does not divide, keep a state in their own dtype.
    """

    own_kinds = frozenset(f"{moment}{end}" for moment in _MOMENTS for end in ("", "_codes", "_scales"))

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """Raises ConfigError where torchao is not there."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._inner = _torchaos_adamw([{**group} for group in self.param_groups], lr=lr, betas=betas, eps=eps)

    def place(self, parts: Mapping[Tensor, Sequence[Part]], mesh: ParallelMesh, divided: bool) -> None:
        """Make the state, which is zero."""
        super().place(parts, mesh, divided)
        for tensor in parts:
            self.state[tensor]["step"] = torch.zeros(())
            moments = {kind: self._inner._new_buffer(tensor.detach(), kind == _MOMENTS[0]) for kind in _MOMENTS}
            self._inner.state[tensor] = {"step": torch.zeros(()), **moments}

    def own_states(self) -> Iterator[tuple[Part, ShardSpec, str, Tensor]]:
        """Yield codes and scales, which are read back as they were: coding what was decoded might change a scale."""
        for tensor, (part,) in self.parts.items():
            name = part.shard.name
            for kind in _MOMENTS:
                moment = self._inner.state[tensor][kind]
                if hasattr(moment, "codes"):
                    yield part, part.shard, f"{kind}_codes", moment.codes
                    yield part, ShardSpec.whole(name, (moment.scale.numel(),)), f"{kind}_scales", moment.scale
                else:
                    yield part, part.shard, kind, moment

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient. The first step compiles the update for each shape."""
        assert closure is None, "a closure would change the gradients that were reduced and clipped"
        for group, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            theirs["lr"].fill_(group["lr"])
            for tensor in group["params"]:
                self._inner.state[tensor]["step"].copy_(self.state[tensor]["step"])
                if tensor.grad is not None:
                    self.state[tensor]["step"] += 1
        self._inner.step()


def _torchaos_adamw(groups: list[dict[str, Any]], **options: Any) -> Any:
    with quiet_torchao():
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"optim.kind=adamw8bit is torchao's, which cannot be imported here ({error}); pip install torchao, or "
                "use adamw"
            ) from error
    return AdamW8bit(groups, **options)


def apex_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return NVIDIA apex's FusedAdam as AdamW. Raises ConfigError where apex is not NVIDIA's.

    The apex on PyPI is another program; apex built without its CUDA extensions has the class and not the kernel.
    `distributed.world` has refused a run without a GPU.
    """
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            f"optim.kind=apex_adamw needs NVIDIA apex built with --cuda_ext ({error}); build it from its repository, "
            "or use fused_adamw"
        ) from error
    optimizer: torch.optim.Optimizer = FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True)
    return optimizer
