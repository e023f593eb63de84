"""Stages 1, 2 and 3: DeepSpeed as the sharded optimizer under our own schedule.

The schedule calls the module and plain autograd; DeepSpeed's hooks see the gradients, and this file tells it where
microbatches and steps end. Every cell of stage x precision x layout is held to the one-process reference by the
parity gate.

What is set differently from DeepSpeed's own habits, and why:
- Gradients of stages 1 and 2 are kept in DeepSpeed's compact partition buffer for every dtype. It does so only for
  bf16 weights with fp32 gradients; for fp32 it would keep the whole gradient of every tensor that reaches into the
  partition, which for an embedding is more than ZeRO 2 promises.
- bf16 under stage 1 uses the ZeRO optimizer, not BF16_Optimizer, so that stages 1 and 2 are one code path.
- fp64 (for checking layouts) is carried through: DeepSpeed knows fp32, bf16 and fp16 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.distributed.layout import Axis
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.zero.deepspeed_engine import call_table, make_engine
from megalm.zero.engine import (
    HeldBytes,
    MakeOptimizer,
    ReadFragment,
    ZeroEngine,
    counted_here,
    kept_buffers,
    replicas_of,
    restore_optimizer,
    shard_of,
    storage_bytes,
    tensor_states,
)
from megalm.zero.frozen import FrozenWeights
from megalm.zero.parts import Part, elementwise, own_fragments, own_states, place


@dataclass(frozen=True)
class _Piece:
    """Elements [start, start + length) of a parameter's flattened tensor, at `offset` of flat partition `flat`.

    There may be none.
    """

    parameter: Tensor
    shard: ShardSpec
    flat: int
    offset: int
    start: int
    length: int


class ShardedEngine(ZeroEngine):
    """A DeepSpeedEngine used as the optimizer that divides state, gradients or weights over the data axis."""

    def __init__(
        self,
        module: nn.Module,
        mesh: ParallelMesh,
        make_optimizer: MakeOptimizer,
        *,
        tied_weight: Tensor | None,
        stage: int,
        deepspeed_config: dict[str, Any],
        grad_norm: Callable[..., Tensor],
    ) -> None:
        self.mesh = mesh
        self.grad_norm = grad_norm
        self.stage = stage
        self.tied_weight = tied_weight if tied_weight is not None and tied_weight.requires_grad else None
        self.loss_factor = float(mesh.size("replica"))
        self.parameters = list(module.parameters())
        self.frozen = FrozenWeights([*self.parameters, *kept_buffers(module)], mesh, tied_weight)
        optimizer = make_optimizer([(shard_of(p), p) for p in self.parameters if p.requires_grad])
        self.engine = make_engine(module, optimizer, mesh, deepspeed_config)
        self.module = self.engine.module
        self.optimizer: Any = self.engine.optimizer
        self.offloaded = bool(getattr(self.optimizer, "cpu_offload", False)) or bool(
            getattr(self.optimizer, "offload_optimizer", False)
        )
        if stage < 3:
            self.optimizer._use_compact_grad_partition_buffer = lambda group: True
            self.optimizer.scaled_global_norm = self._norm
            # Summing all gradients over all data ranks, which it does in fp64, is no way for divided experts.
            self.optimizer.reduce_scatter = self.optimizer.reduce_scatter or self.optimizer.has_moe_layers
        else:
            self.optimizer._get_norm_groups = lambda: [self._norm()]
        if self.parameters[0].dtype == torch.float64:
            self._widen_masters()
        self.flats: list[Tensor] = (
            self.optimizer.single_partition_of_fp32_groups if stage < 3 else self.optimizer.fp32_partitioned_groups_flat
        )
        pieces = list(self._pieces_below_3() if stage < 3 else self._pieces_3())
        self.pieces = [piece for piece in pieces if piece.length]
        parts: dict[Tensor, list[Part]] = {flat: [] for flat in self.flats}
        two_stages = self.tied_weight is not None and mesh.size("embedding") > 1
        for p in pieces:
            counted = counted_here(p.parameter, mesh, self.tied_weight)
            tied = two_stages and p.parameter is self.tied_weight
            parts[self.flats[p.flat]].append(Part(p.shard, p.offset, p.start, p.length, counted, tied))
        place(self.optimizer.optimizer, parts, mesh, divided=True)
        if two_stages and any(f.is_cpu for f in self.flats):
            for group in self.optimizer.optimizer.param_groups:
                group["fused"] = False  # which rounds by an element's place in memory, which differs on the two stages

    def _widen_masters(self) -> None:
        """Make DeepSpeed's fp32 master weights, and the gradients it keeps beside them, fp64; equal to the weights."""
        optimizer = self.optimizer
        optimizer.master_weights_and_grads_dtype = torch.float64
        if self.stage < 3:
            masters = optimizer.single_partition_of_fp32_groups
            own = optimizer.parallel_partitioned_bit16_groups
            sources = [parts[self._index(flat)] for flat, parts in enumerate(own)]
        else:
            masters = optimizer.fp32_partitioned_groups_flat
            sources = optimizer.fp16_partitioned_groups_flat
        for master, source in zip(masters, sources, strict=True):
            had_gradient, master.grad = master.grad is not None, None
            master.data = source.detach().clone().to(master.device)
            if had_gradient:
                master.grad = torch.zeros_like(master)

    def _index(self, flat: int) -> int:
        """Return this rank's place among those that divide a group of parameters: there are fewer for experts."""
        return dist.get_rank(group=self.optimizer.real_dp_process_group[flat])

    def _pieces_below_3(self) -> Iterator[_Piece]:
        for flat, parameters in enumerate(self.optimizer.round_robin_bit16_groups):
            size = self.flats[flat].numel()
            first, last = self._index(flat) * size, (self._index(flat) + 1) * size
            for parameter, at in zip(parameters, self.optimizer.round_robin_bit16_offsets[flat], strict=True):
                start = min(max(first, at), at + parameter.numel())
                stop = max(start, min(last, at + parameter.numel()))
                offset = start - first if stop > start else 0
                yield _Piece(parameter, shard_of(parameter), flat, offset, start - at, stop - start)

    def _pieces_3(self) -> Iterator[_Piece]:
        index = self.mesh.index("replica")
        for flat, parameters in enumerate(self.optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start, stop = (min(edge * size, parameter.ds_numel) for edge in (index, index + 1))
                yield _Piece(parameter, shard_of(parameter), flat, offset, start, stop - start)
                offset += size

    def microbatch_done(self) -> None:
        """Under stages 2 and 3 reduce this microbatch's gradients into the partition now; they are not kept.

        Stage 2 has buffers only if there are some; a chunk of frozen layers gives none.
        """
        if self.stage == 2 and self.optimizer.ready_for_gradients:
            self.optimizer.set_gradient_accumulation_boundary(False)
            self.optimizer.overlapping_partition_gradients_reduce_epilogue()
        elif self.stage == 3:
            self.optimizer.independent_gradient_partition_epilogue()
            self.optimizer.clear_backward_seen_flag()

    def reduce(self) -> None:
        """Reduce what is left, then sum the gradients of tied weights over their two stages."""
        if self.stage == 1:
            self.optimizer.set_gradient_accumulation_boundary(True)
            self.optimizer.reduce_gradients()
        elif self.stage == 2 or self.offloaded:
            self.optimizer.finalize_gradient_accumulation_boundary()
        if self.tied_weight is not None:
            self._sum_tied()

    def _sum_tied(self) -> None:
        """Sum the tied gradient over the embedding group.

        The two stages cut their flat buffers at different places, so each first puts its pieces together.
        """
        assert self.tied_weight is not None
        own = [f for f, p in zip(self.gradients(), self.pieces, strict=True) if p.parameter is self.tied_weight]
        dtype = self._gradient_flats()[0].dtype
        whole = torch.zeros(self.tied_weight.numel(), dtype=dtype, device=self.mesh.device)
        for fragment in own:
            whole[fragment.start : fragment.start + fragment.values.numel()] = fragment.values
        dist.all_reduce(whole, group=self.mesh.group("replica"))
        dist.all_reduce(whole, group=self.mesh.group("embedding"))
        for fragment in own:
            fragment.values.copy_(whole[fragment.start : fragment.start + fragment.values.numel()])

    def _norm(self) -> Tensor:
        """Return the gradient norm of the whole model, the same bits on every rank, from one sum over the world.

        In place of DeepSpeed's. Of stages 1 and 2 that takes a sum for each group of parameters: stages of a pipeline
        may have different groups, and would wait for each other for ever. It takes it in fp32, under fp64 too. With
        offload under stage 3 it is taken before the gradients are whole and conditioned.
        """
        own = [fragment.values for fragment in self.counted_gradients()]
        square = self.grad_norm(own, squared=True).to(self.mesh.device, self._gradient_flats()[0].dtype)
        dist.all_reduce(square, group=world_group())
        return square.sqrt()

    def update(self, lr: float) -> float:
        """Let DeepSpeed clip, update its partition and gather or re-partition the weights."""
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.step()
        if self.optimizer.overflow and self.stage < 3:
            # DeepSpeed 0.19.8 drops them here by itself, but not with offload: they would poison the next step.
            self.optimizer.averaged_gradients = dict.fromkeys(self.optimizer.averaged_gradients)
        return float("nan") if self.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def discard(self) -> None:
        """Have DeepSpeed find the gradients not finite, which it then drops with all that it keeps beside them."""
        for fragment in self.gradients():
            fragment.values.fill_(float("nan"))
        if self.stage == 3 and self.offloaded:  # then it has looked at them already, while it copied them
            self.optimizer.local_overflow = True
        self.update(0.0)

    def _gradient_flats(self) -> list[Tensor]:
        """Return this rank's reduced gradients, one flat tensor for each of `flats`."""
        if self.offloaded:
            return [flat.grad for flat in self.flats if flat.grad is not None]
        if self.stage < 3:
            return [self.optimizer.averaged_gradients[i].flat_partition for i in range(len(self.flats))]
        return [_joined(self.optimizer.averaged_gradients[i]) for i in range(len(self.flats))]

    def _gradients_there(self) -> list[Tensor]:
        """Return what there is of this rank's gradients, reduced and not, at any time of a step."""
        parameters = [getattr(p, name, None) for p in self.parameters for name in ("grad", "grad_accum")]
        own = [gradient for gradient in parameters if gradient is not None]
        if self.offloaded:
            return own + self._gradient_flats()
        there = [kept for kept in self.optimizer.averaged_gradients.values() if kept is not None]
        return own + ([k.flat_partition for k in there] if self.stage < 3 else [part for k in there for part in k])

    def gradients(self) -> Iterator[Fragment]:
        """Yield the pieces of this rank's partition."""
        flats = self._gradient_flats()
        for piece in self.pieces:
            values = flats[piece.flat].view(-1)[piece.offset : piece.offset + piece.length]
            yield Fragment(piece.shard, "gradient", piece.start, values)

    def counted_gradients(self) -> Iterator[Fragment]:
        """Yield those of the pieces that are no copies of another model rank's."""
        for fragment, piece in zip(self.gradients(), self.pieces, strict=True):
            if counted_here(piece.parameter, self.mesh, self.tied_weight):
                yield fragment

    def state(self) -> Iterator[Fragment]:
        """Yield the pieces of the master weights and optimizer state in this rank's partition."""
        for piece in self.pieces:
            if not counted_here(piece.parameter, self.mesh, self.tied_weight):
                continue
            flat = self.flats[piece.flat]
            states = dict(tensor_states(self.optimizer.optimizer.state.get(flat, {}), flat.numel()))
            for kind, values in {"weight": flat.detach(), **states}.items():
                at = slice(piece.offset, piece.offset + piece.length)
                yield Fragment(piece.shard, kind, piece.start, values.view(-1)[at])
        yield from own_fragments(self.optimizer.optimizer, self.mesh)
        yield from self.frozen.state()

    def read_optimizer(self, read: ReadFragment, kinds: Sequence[str], steps: int) -> None:
        """Fill the states of this rank's partition."""
        for group, flats in self._state_groups():
            group["params"] = flats
        alike = elementwise(self.optimizer.optimizer, kinds)
        states = restore_optimizer(self.optimizer.optimizer, alike, steps)
        for piece in self.pieces:
            flat = self.flats[piece.flat]
            at = slice(piece.offset, piece.offset + piece.length)
            for kind in (kind for kind in alike if kind in states[flat]):
                stop = piece.start + piece.length
                read(piece.shard, kind, piece.start, stop, states[flat][kind].view(-1)[at])
        for _, shard, kind, values in own_states(self.optimizer.optimizer):
            read(shard, kind, 0, values.numel(), values.view(-1))

    def read_weights(self, read: ReadFragment) -> None:
        """Fill this rank's partition of the master weights."""
        for piece in self.pieces:
            at = slice(piece.offset, piece.offset + piece.length)
            read(piece.shard, "weight", piece.start, piece.start + piece.length, self.flats[piece.flat].view(-1)[at])
        self.frozen.load(read)

    def masters_and_states(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the flat tensors of this rank's partition."""
        for flat in self.flats:
            yield flat, self.optimizer.optimizer.state[flat]

    def _state_groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Yield the optimizer's groups with their flat tensors, where DeepSpeed leaves the groups empty (stage 3)."""
        if self.stage == 3:
            for group_index, group in enumerate(self.optimizer.optimizer.param_groups):
                owners = self.optimizer.sub_group_to_group_id
                flats = [flat for i, flat in enumerate(self.flats) if owners[i] == group_index]
                yield group, flats

    @torch.no_grad()
    def spread_weights(self) -> None:
        """Set the weights from the master weights of all data ranks."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        for group in self.optimizer.optimizer.param_groups:
            group["params"] = []
        for i in range(len(self.flats)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
        self.optimizer.invalidate_secondary_tensor()
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # drops the whole tensors, or all_gather would keep them as they are
            persistent[0].all_gather(persistent)

    def replicas(self, axis: Axis = "replica") -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of stages 1 and 2, and routers' biases; all else, and under stage 3 all, exists once."""
        for parameter in self.parameters if self.stage < 3 else ():
            if replicas_of(shard_of(parameter)) == axis:
                yield f"the weight {shard_of(parameter).name}", parameter
        for buffer in kept_buffers(self.module) if axis == "replica" else ():
            yield f"the weight {shard_of(buffer).name}", buffer

    def report(self) -> list[str]:
        """Return DeepSpeed's calls, where its JSON has them logged."""
        return call_table()

    def held_bytes(self) -> HeldBytes:
        """Return this rank's bytes; weights that stage 3 keeps whole on every rank (small ones) are counted whole."""
        weights: list[Tensor] = [getattr(p, "ds_tensor", p) if self.stage == 3 else p for p in self.parameters]
        copies = (getattr(p, "ds_secondary_tensor", None) for p in self.parameters)
        weights += [copy for copy in copies if copy is not None]
        weights += [p for p in self.parameters if getattr(p, "ds_persist", False)]
        masters = [f for f in self.flats if not _same_storage(f, weights)]
        states = [v for f in self.flats for _, v in tensor_states(self.optimizer.optimizer.state.get(f, {}), f.numel())]
        states += [values for *_, values in own_states(self.optimizer.optimizer)]
        return HeldBytes(
            weights=storage_bytes(weights),
            master_weights=storage_bytes(masters),
            gradients=storage_bytes(self._gradients_there()),
            optimizer=storage_bytes(states),
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the flat buffer that the adjoining parts are views of, in order."""
    first, last = parts[0], parts[-1]
    length = last.storage_offset() + last.numel() - first.storage_offset()
    return first.as_strided((length,), (1,), first.storage_offset())


def _same_storage(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    pointer = tensor.untyped_storage().data_ptr()
    return any(pointer == o.untyped_storage().data_ptr() for o in others)
