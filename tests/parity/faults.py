"""Planted faults: each breaks one thing that parallel training gets wrong in practice, and the gate must catch it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from megalm.distributed import collectives
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import Places, whole
from megalm.distributed.sharding import ShardSpec
from megalm.models import losses, transformer
from megalm.nn import attention, norms, ops, positions
from megalm.nn.dropout import Dropout
from megalm.pipeline_parallel.executor import PipelineExecutor
from megalm.tensor_parallel import cross_entropy, embedding, initialize, linear
from megalm.train import optimizers, trainer
from megalm.train.trainer import Trainer
from megalm.zero import engine, replicated
from tests.parity.cases import DROPOUT, SEQUENCE, SMOOTHING, zero
from tests.parity.harness import LLAMA, Case

Patches = Iterator[Any]


@dataclass(frozen=True)
class Mutant:
    """A fault, the layout in which it is planted, and the optimizer whose curve is compared."""

    plant: Callable[[], Patches]
    case: Case
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """What is broken."""
        return self.plant.__name__.replace("_", " ")


def _identity(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x


def no_all_reduce_behind_a_column_parallel_layer() -> Patches:
    yield mock.patch.object(linear, "copy_to_group", _identity)


def no_all_reduce_behind_the_head() -> Patches:
    yield mock.patch.object(embedding, "copy_to_group", _identity)


def no_all_reduce_after_a_row_parallel_layer() -> Patches:
    yield mock.patch.object(linear, "reduce_from_group", _identity)


def all_reduce_twice_in_backward() -> Patches:
    def twice(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce_sum(gradient, ctx.group), None

    yield mock.patch.object(collectives._Reduce, "backward", staticmethod(twice))
    forward = collectives._Reduce.forward

    def keep_group(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return forward(ctx, x, group)

    yield mock.patch.object(collectives._Reduce, "forward", staticmethod(keep_group))


def replicated_norms_counted_on_every_tensor_rank() -> Patches:
    def counted(parameter: Tensor, mesh: ParallelMesh, tied: Tensor | None) -> bool:
        return parameter is not tied or mesh.is_first_stage

    yield mock.patch.object(replicated, "counted_here", counted)


def tied_embedding_counted_on_both_stages() -> Patches:
    original = engine.counted_here
    yield mock.patch.object(replicated, "counted_here", lambda p, mesh, tied: original(p, mesh, None))


def norm_of_this_rank_alone() -> Patches:
    yield mock.patch.object(ParallelMesh, "size", lambda self, axis: 1 if axis == "model" else self.groups[axis].size())


def stale_tied_embedding() -> Patches:
    yield mock.patch.object(transformer.Transformer, "tied_weight", None)


def loss_weighted_by_this_ranks_tokens() -> Patches:
    def local(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return x * group.size()

    original = Trainer.train_step

    def train_step(self: Trainer) -> Any:
        with mock.patch.object(trainer, "all_reduce_sum", local):
            return original(self)

    yield mock.patch.object(Trainer, "train_step", train_step)


def every_microbatch_weighs_the_same() -> Patches:
    original = losses.token_loss_sum

    def mean(logits: Tensor, labels: Tensor, mask: Tensor, **rest: Any) -> Tensor:
        total = original(logits, labels, mask, **rest)
        return total / mask.sum() * mask.numel() * 0.6

    yield mock.patch.object(transformer, "token_loss_sum", mean)


def data_ranks_gradients_averaged() -> Patches:
    original = replicated.ReplicatedEngine.reduce

    def reduce(self: Any) -> None:
        original(self)
        for master in self.masters:
            master.grad /= self.mesh.size("data")

    yield mock.patch.object(replicated.ReplicatedEngine, "reduce", reduce)


def zero_average_not_undone() -> Patches:
    from megalm.zero.sharded import ShardedEngine

    original = ShardedEngine.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        self.loss_factor = 1.0

    yield mock.patch.object(ShardedEngine, "__init__", init)


def earlier_microbatches_fade_under_zero_2() -> Patches:
    from megalm.zero.sharded import ShardedEngine

    original = ShardedEngine.microbatch_done

    def done(self: Any) -> None:
        for group in self.optimizer.averaged_gradients.values():
            if group is not None:
                group.flat_partition.mul_(0.5)
        original(self)

    yield mock.patch.object(ShardedEngine, "microbatch_done", done)


def gradients_of_all_but_the_last_microbatch_dropped() -> Patches:
    original = replicated.ReplicatedEngine.microbatch_done

    def done(self: Any) -> None:
        original(self)
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen % 4:
            for master in self.masters:
                master.grad = None

    yield mock.patch.object(replicated.ReplicatedEngine, "microbatch_done", done)


def same_dropout_mask_for_the_heads_of_every_rank() -> Patches:
    original = attention.Attention.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        self.first_head = 0

    yield mock.patch.object(attention.Attention, "__init__", init)


def same_dropout_mask_on_every_data_rank() -> Patches:
    original = trainer.DropoutKeys
    yield mock.patch.object(trainer, "DropoutKeys", lambda seed, step, first: original(seed, step, first % 4))


def dropout_mask_ignores_the_token_shard() -> Patches:
    original = Dropout.at
    yield mock.patch.object(Dropout, "at", lambda self, keys, first, whole: original(self, keys, 0, whole))


def labels_shifted_behind_a_stage_boundary() -> Patches:
    original = PipelineExecutor._call_module

    def shifted(self: Any, action: Any, microbatch: Any, hidden: Tensor | None) -> Tensor:
        if hidden is not None and self._makes_loss(action):
            microbatch = replace(microbatch, labels_BT=microbatch.labels_BT.roll(1, dims=1))
        return original(self, action, microbatch, hidden)

    yield mock.patch.object(PipelineExecutor, "_call_module", shifted)


def gradient_shifted_at_a_stage_boundary() -> Patches:
    original = PipelineExecutor._train_backward

    def shifted(self: Any, action: Any, hidden: Tensor | None, output: Any, gradient: Tensor) -> None:
        if gradient.dim():  # not the scale of the loss
            gradient = gradient.roll(1, dims=1)
        original(self, action, hidden, output, gradient)

    yield mock.patch.object(PipelineExecutor, "_train_backward", shifted)


def norm_weights_see_one_ranks_tokens_only() -> Patches:
    yield mock.patch.object(norms, "sum_gradient", _identity)


def row_bias_sees_one_ranks_tokens_only() -> Patches:
    yield mock.patch.object(linear, "sum_gradient", _identity)


def positions_see_one_ranks_tokens_only() -> Patches:
    yield mock.patch.object(positions, "sum_gradient", _identity)


def every_token_shard_starts_at_position_0() -> Patches:
    original = positions.LearnedPosition.forward

    def from_the_start(self: Any, x_BTD: Tensor, places: Places) -> Tensor:
        return original(self, x_BTD, whole(x_BTD.shape[1]))

    yield mock.patch.object(positions.LearnedPosition, "forward", from_the_start)


def bias_added_on_every_tensor_rank() -> Patches:
    original = linear.RowParallelLinear.forward

    def forward(self: Any, x: Tensor, *rest: Any) -> Tensor:
        y = original(self, x, *rest)
        return y if self.bias is None else y + (self.group.size() - 1) * self.bias

    yield mock.patch.object(linear.RowParallelLinear, "forward", forward)


def padding_of_the_vocabulary_takes_part_in_the_softmax() -> Patches:
    original = cross_entropy.vocab_parallel_cross_entropy

    def padded(logits: Tensor, labels: Tensor, *, vocab: int, group: Any, **rest: Any) -> Tensor:
        vocab = logits.shape[1] * group.size()
        return original(logits, labels, vocab=vocab, group=group, **rest)

    yield mock.patch.object(losses, "vocab_parallel_cross_entropy", padded)


def label_smoothing_over_this_ranks_columns() -> Patches:
    original = cross_entropy.all_reduce_sum

    def sums(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = original(x, group)
        if len(total) == 3:
            total[2] = x[2]
        return total

    yield mock.patch.object(cross_entropy, "all_reduce_sum", sums)


def embedding_rows_of_the_first_rank_everywhere() -> Patches:
    original = embedding.VocabParallelEmbedding.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        self.first_row = 0

    yield mock.patch.object(embedding.VocabParallelEmbedding, "__init__", init)


def initial_weights_depend_on_the_rank() -> Patches:
    original = initialize.key
    yield mock.patch.object(initialize, "key", lambda seed, *parts: original(seed + dist.get_rank() % 2, *parts))


def initial_weights_of_the_first_shard_everywhere() -> Patches:
    original = initialize.normal_shard

    def first(spec: ShardSpec, *rest: Any) -> Tensor:
        return original(replace(spec, start=0, length=spec.length), *rest)

    yield mock.patch.object(initialize, "normal_shard", first)


def keys_and_values_exchanged_in_the_fused_projection() -> Patches:
    original = ops.REFERENCE.flash_attention
    swapped = replace(ops.REFERENCE, flash_attention=lambda q, k, v, **rest: original(q, v, k, **rest))
    yield mock.patch.object(ops, "REFERENCE", swapped)


def gate_and_value_exchanged() -> Patches:
    original = ops.REFERENCE.swiglu
    swapped = replace(ops.REFERENCE, swiglu=lambda x: original(x.roll(x.shape[-1] // 2, dims=-1)))
    yield mock.patch.object(ops, "REFERENCE", swapped)


def learning_rate_of_the_next_step() -> Patches:
    original = trainer.learning_rate
    yield mock.patch.object(trainer, "learning_rate", lambda config, step: original(config, step + 1))


def weight_decay_on_norms_and_biases() -> Patches:
    yield mock.patch.object(optimizers, "is_decayed", lambda spec: True)


def clipping_left_out() -> Patches:
    original = replicated.ReplicatedEngine.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **{**rest, "clip_norm": None})

    yield mock.patch.object(replicated.ReplicatedEngine, "__init__", init)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(no_all_reduce_behind_a_column_parallel_layer, Case(1, 1, 2)),
    Mutant(no_all_reduce_behind_the_head, Case(1, 1, 2)),
    Mutant(no_all_reduce_after_a_row_parallel_layer, Case(1, 1, 2)),
    Mutant(all_reduce_twice_in_backward, Case(1, 1, 2)),
    Mutant(replicated_norms_counted_on_every_tensor_rank, Case(1, 1, 2)),
    Mutant(tied_embedding_counted_on_both_stages, Case(2, 1, 1)),
    Mutant(norm_of_this_rank_alone, Case(2, 1, 1)),
    Mutant(stale_tied_embedding, Case(2, 1, 1)),
    Mutant(loss_weighted_by_this_ranks_tokens, Case(1, 2, 1)),
    Mutant(every_microbatch_weighs_the_same, Case(1, 1, 1)),
    Mutant(data_ranks_gradients_averaged, Case(1, 2, 1), "sgd"),
    Mutant(zero_average_not_undone, Case(1, 2, 1, zero(1)), "sgd"),
    Mutant(earlier_microbatches_fade_under_zero_2, Case(1, 2, 1, zero(2))),
    Mutant(gradients_of_all_but_the_last_microbatch_dropped, Case(1, 1, 1)),
    Mutant(same_dropout_mask_for_the_heads_of_every_rank, Case(1, 1, 2, DROPOUT)),
    Mutant(same_dropout_mask_on_every_data_rank, Case(1, 2, 1, DROPOUT)),
    Mutant(dropout_mask_ignores_the_token_shard, Case(1, 1, 2, {**DROPOUT, **SEQUENCE})),
    Mutant(labels_shifted_behind_a_stage_boundary, Case(2, 1, 1)),
    Mutant(gradient_shifted_at_a_stage_boundary, Case(2, 1, 1)),
    Mutant(norm_weights_see_one_ranks_tokens_only, Case(1, 1, 2, SEQUENCE)),
    Mutant(row_bias_sees_one_ranks_tokens_only, Case(1, 1, 2, SEQUENCE)),
    Mutant(positions_see_one_ranks_tokens_only, Case(1, 1, 2, SEQUENCE)),
    Mutant(every_token_shard_starts_at_position_0, Case(1, 1, 2, SEQUENCE)),
    Mutant(bias_added_on_every_tensor_rank, Case(1, 1, 2), "sgd"),
    Mutant(padding_of_the_vocabulary_takes_part_in_the_softmax, Case(1, 1, 2)),
    Mutant(label_smoothing_over_this_ranks_columns, Case(1, 1, 2, SMOOTHING)),
    Mutant(embedding_rows_of_the_first_rank_everywhere, Case(1, 1, 2)),
    Mutant(initial_weights_depend_on_the_rank, Case(2, 1, 1)),
    Mutant(initial_weights_of_the_first_shard_everywhere, Case(1, 1, 2)),
    Mutant(keys_and_values_exchanged_in_the_fused_projection, Case(1, 1, 1, LLAMA)),
    Mutant(gate_and_value_exchanged, Case(1, 1, 2, LLAMA)),
    Mutant(learning_rate_of_the_next_step, Case(1, 1, 1)),
    Mutant(weight_decay_on_norms_and_biases, Case(1, 2, 1, zero(1))),
    Mutant(clipping_left_out, Case(1, 1, 2), "sgd"),
)
