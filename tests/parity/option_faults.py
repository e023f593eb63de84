"""Planted faults in what a recipe can choose of the model: what goes wrong when heads, layers or rows are split."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.config.patterns import BlockPattern
from megalm.models import losses, transformer
from megalm.nn import activations, attention, norms, pattern_attention, positions, rotary
from megalm.nn.dropout import StochasticDepth
from megalm.train import adafactor, gradients, muon, optimizers, trainer
from megalm.zero import replicated, wholes
from tests.parity.cases import CUT, MUON, SEQUENCE, batch, zero
from tests.parity.faults import Mutant, Patches, _identity
from tests.parity.harness import Case

WINDOW = {"model.window": 5, "model.window_pattern": "SSL"}
ADAFACTOR = {"optim.kind": "adafactor"}
MULTI_QUERY = {"model.kv_heads": 1}


def slopes_of_the_first_heads_on_every_rank() -> Patches:
    original = positions.alibi_slopes
    yield mock.patch.object(positions, "alibi_slopes", lambda heads: original(heads)[: heads // 2] * 2)


def window_of_one_token_more() -> Patches:
    original = ModelSection.window_of

    def wider(self: ModelSection, layer: int) -> int | None:
        window = original(self, layer)
        return None if window is None else window + 1

    yield mock.patch.object(ModelSection, "window_of", wider)


def layers_counted_from_the_stage_s_first() -> Patches:
    original = attention.Attention.__init__

    def init(self: Any, name: str, layer: int, *args: Any, **rest: Any) -> None:
        original(self, name, layer % 2, *args, **rest)

    yield mock.patch.object(attention.Attention, "__init__", init)


def shared_key_and_value_see_one_ranks_heads_only() -> Patches:
    yield mock.patch.object(attention, "sum_gradient", _identity)


def scores_divided_by_the_root_of_a_heads_size_all_the_same() -> Patches:
    yield mock.patch.object(ModelSection, "query_factor", property(lambda self: 1.0))


def weights_around_zero_taken_for_factors() -> Patches:
    yield mock.patch.object(norms.ZeroCenteredRMSNorm, "normalise", norms.RMSNorm.normalise)


def head_norms_see_one_ranks_heads_only() -> Patches:
    original = attention.RMSNorm.__init__

    def init(self: Any, *args: Any, **rest: Any) -> None:
        original(self, *args, **{**rest, "group": None})

    yield mock.patch.object(attention.RMSNorm, "__init__", init)


def rows_that_were_cut_take_the_masks_of_whole_ones() -> Patches:
    original = trainer.DropoutKeys
    yield mock.patch.object(trainer, "DropoutKeys", lambda seed, step, first: original(seed, step, first // 4))


def a_batch_that_grows_a_step_late() -> Patches:
    original = trainer.batch_at
    yield mock.patch.object(trainer, "batch_at", lambda config, step: original(config, max(0, step - 1)))


def sinks_in_the_numerator() -> Patches:
    yield mock.patch.object(attention, "_with_sinks", lambda out, lse, sinks: out + sinks.sum() * 0.01)


def documents_known_on_the_first_stage_only() -> Patches:
    original = transformer.Transformer._context

    def context(self: Any, x: Tensor, dropout: Any, tokens_BT: Tensor | None, embeds: bool) -> Any:
        if not embeds:
            self.document_start = None
        return original(self, x, dropout, tokens_BT, embeds)

    yield mock.patch.object(transformer.Transformer, "_context", context)


def samples_of_a_microbatch_counted_from_0() -> Patches:
    original = StochasticDepth.__call__

    def call(self: Any, y_BTD: Tensor, keys: Any) -> Tensor:
        return original(self, y_BTD, None if keys is None else type(keys)(keys.seed, keys.step, 0))

    yield mock.patch.object(StochasticDepth, "__call__", call)


def frequencies_of_the_whole_head() -> Patches:
    original = rotary._frequencies

    def frequencies(config: ModelSection, base: float | None = None) -> Tensor:
        return original(config.model_copy(update={"rotary_share": 1.0}), base)[: config.rotary_size // 2]

    yield mock.patch.object(rotary, "_frequencies", frequencies)


def relative_table_of_keys_to_come() -> Patches:
    original = positions.relative_bucket
    yield mock.patch.object(
        positions, "relative_bucket", lambda distance, *rest: original(distance.flip(0).flip(1), *rest)
    )


def row_means_of_one_ranks_columns() -> Patches:
    yield mock.patch.object(gradients, "all_reduce_sum", _identity)


def row_means_of_one_ranks_partition() -> Patches:
    original = gradients.all_reduce_sum

    def sum_over_tensor_only(x: Tensor, group: Any) -> Tensor:
        return x if group.group_desc == "data" else original(x, group)

    yield mock.patch.object(gradients, "all_reduce_sum", sum_over_tensor_only)


def gradients_cut_before_they_are_summed() -> Patches:
    original = replicated.ReplicatedEngine.reduce

    def reduce(self: Any) -> None:
        for master in self.masters:
            gradients.clip_by_value(master.grad, 0.002)
        original(self)

    yield mock.patch.object(replicated.ReplicatedEngine, "reduce", reduce)


def masks_of_keys_as_they_are_gathered() -> Patches:
    original = pattern_attention._dropout_scale

    def scale(q_BTHE: Tensor, columns: int, chunk: Any, drop: Any) -> Tensor | None:
        places_NK = torch.arange(chunk.keys_NK.shape[1]).expand_as(chunk.keys_NK)
        return original(q_BTHE, columns, pattern_attention._Chunk(chunk.queries_NQ, places_NK), drop)

    yield mock.patch.object(pattern_attention, "_dropout_scale", scale)


def strides_counted_from_the_first_block() -> Patches:
    original = BlockPattern.sees

    def sees(self: BlockPattern, query: Any, key: Any) -> Any:
        jumped = (key // self.block % self.stride == 0) & (key <= query)
        return original(self._replace(stride=None), query, key) | jumped

    yield mock.patch.object(BlockPattern, "sees", sees)


def adafactor_means_of_one_ranks_rows() -> Patches:
    yield mock.patch.object(adafactor, "_is_shared", lambda job, kind: False)


def adafactor_means_of_one_ranks_partition() -> Patches:
    original = adafactor.Adafactor.place

    def place(self: Any, parts: Any, mesh: Any, divided: bool) -> None:
        original(self, parts, mesh, divided=False)

    yield mock.patch.object(adafactor.Adafactor, "place", place)


def muon_orthogonalises_each_ranks_shard() -> Patches:
    def join(self: Any, local: Any, here: Any, like: Tensor) -> Any:
        return {slab: local[slab].view(self.slabs[slab].local_shape) for slab in here}

    yield mock.patch.object(wholes.Wholes, "_join", join)
    yield mock.patch.object(
        wholes.Wholes, "_part", lambda self, results, *rest: {slab: x.reshape(-1) for slab, x in results.items()}
    )


def muon_orthogonalises_each_partition() -> Patches:
    """What a rank lacks of a matrix counts as zeros."""

    def transform(self: Any, values: Any, dtype: Any, compute: Any) -> None:
        for number, slab in enumerate(self.slabs):
            whole = torch.zeros(slab.size, dtype=dtype)
            if number in self._own:
                own = self._own[number]
                whole[own.start : own.start + own.length] = self._values(values, number)
                (result,) = compute([(slab, whole.view(slab.local_shape))])
                self._values(values, number).copy_(result.reshape(-1)[own.start : own.start + own.length])

    yield mock.patch.object(wholes.Wholes, "transform", transform)


def muon_scales_by_the_shape_of_a_shard() -> Patches:
    original = muon.update_scale
    yield mock.patch.object(muon, "update_scale", lambda kind, rows, columns: original(kind, rows // 2, columns))


def the_owners_result_is_lost_on_the_last_data_rank() -> Patches:
    yield from the_owners_result_is_lost_on_the_last_partition()


def the_owners_result_is_lost_on_the_last_partition() -> Patches:
    original = wholes.Wholes._spread

    def spread(self: Any, values: Any, *rest: Any) -> None:
        last = self.at.replica == self.mesh.size(self.axis) - 1
        original(self, [value.clone() for value in values] if last else values, *rest)

    yield mock.patch.object(wholes.Wholes, "_spread", spread)


def ranges_of_a_matrix_in_the_order_of_the_ranks() -> Patches:
    """Each range goes to the beginning of the owner's matrix."""
    original = wholes.Wholes._told

    def told(self: Any) -> Any:
        return [[r._replace(start=0) for r in ranges] for ranges in original(self)]

    yield mock.patch.object(wholes.Wholes, "_told", told)


def queries_keys_and_values_are_one_matrix() -> Patches:
    yield mock.patch.object(muon, "matrices", lambda shard, whole: [whole])
    yield mock.patch.object(muon, "_interleaved", lambda shard, parts: parts[0])


def queries_keys_and_values_in_a_row() -> Patches:
    """As if the fused projection had all queries first."""

    def matrices(shard: Any, whole: Tensor) -> list[Tensor]:
        shares = shard.interleaved or (1,)
        return list(whole.split([share * len(whole) // sum(shares) for share in shares]))

    yield mock.patch.object(muon, "matrices", matrices)
    yield mock.patch.object(muon, "_interleaved", lambda shard, parts: torch.cat(list(parts)))


def tables_and_embeddings_are_hidden_matrices() -> Patches:
    yield mock.patch.object(optimizers, "is_hidden_matrix", optimizers.is_decayed)


def summaries_of_blocks_that_are_seen_besides() -> Patches:
    original = BlockPattern.sees

    def sees(self: BlockPattern, query: Any, key: Any) -> Any:
        return original(self, query, key) | ((key < 0) & ((-key) * self.block <= query))

    yield mock.patch.object(BlockPattern, "sees", sees)
    yield mock.patch.object(
        BlockPattern, "live_keys", lambda self, block: [*range(-block, 0), *range((block + 1) * self.block)]
    )


def summaries_at_the_first_of_their_tokens() -> Patches:
    def first_places(keys: Tensor, pattern: BlockPattern) -> Tensor:
        return torch.where(keys < 0, (-1 - keys) * pattern.block, keys)

    yield mock.patch.object(pattern_attention, "mean_places", first_places)


def padding_has_a_loss() -> Patches:
    yield mock.patch.object(losses, "valid_sum", lambda losses_N, loss_mask_BT: losses_N.sum())


def padding_at_the_beginning_of_a_row() -> Patches:
    original = transformer.Transformer.forward

    def forward(self: Any, x: Tensor, *args: Any, loss_mask_BT: Tensor | None = None, **rest: Any) -> Tensor:
        if self.plan.first and loss_mask_BT is not None:
            shifts = loss_mask_BT.shape[1] - loss_mask_BT.sum(1)
            x = torch.stack([row.roll(int(shift)) for row, shift in zip(x, shifts, strict=True)])
        return original(self, x, *args, loss_mask_BT=loss_mask_BT, **rest)

    yield mock.patch.object(transformer.Transformer, "forward", forward)


def compiled_gelu_whose_argument_is_not_doubled() -> Patches:
    yield mock.patch.object(activations, "DOUBLED_SLOPE", activations.DOUBLED_SLOPE / 2.0)


def compiled_relu_that_passes_every_gradient() -> Patches:
    yield mock.patch.object(activations._Relu, "backward", staticmethod(lambda ctx, dy: dy))


STRIDED = {
    "model.attention_pattern": "strided",
    "model.block_size": 2,
    "model.local_blocks": 2,
    "model.block_stride": 3,
}
HIERARCHICAL = {"model.attention_pattern": "hierarchical", "model.block_size": 2, "model.local_blocks": 2}
MUTANTS: tuple[Mutant, ...] = (
    Mutant(slopes_of_the_first_heads_on_every_rank, Case(1, 1, 2, {"model.position": "alibi"})),
    Mutant(window_of_one_token_more, Case(1, 1, 1, WINDOW)),
    Mutant(layers_counted_from_the_stage_s_first, Case(2, 1, 1, WINDOW)),
    Mutant(shared_key_and_value_see_one_ranks_heads_only, Case(1, 1, 2, MULTI_QUERY)),
    Mutant(head_norms_see_one_ranks_heads_only, Case(1, 1, 2, {"model.qk_norm": True, **SEQUENCE})),
    Mutant(scores_divided_by_the_root_of_a_heads_size_all_the_same, Case(1, 1, 2, {"model.scores_head_dim": 7})),
    Mutant(weights_around_zero_taken_for_factors, Case(1, 1, 2, {"model.norm": "rmsnorm_zero_centered", **SEQUENCE})),
    Mutant(sinks_in_the_numerator, Case(1, 1, 2, {"model.attention_sinks": True})),
    Mutant(documents_known_on_the_first_stage_only, Case(2, 1, 1, {"model.document_mask": True})),
    Mutant(samples_of_a_microbatch_counted_from_0, Case(1, 2, 1, {"model.stochastic_depth": 0.5})),
    Mutant(
        rows_that_were_cut_take_the_masks_of_whole_ones,
        Case(1, 2, 1, {"model.dropout": 0.1, "sequence_warmup.start": 4, "sequence_warmup.every": 9}),
    ),
    Mutant(a_batch_that_grows_a_step_late, Case(1, 2, 1, {"batch_ramp.start": 4, "batch_ramp.every": 1})),
    Mutant(frequencies_of_the_whole_head, Case(1, 1, 1, {"model.position": "rotary", "model.rotary_share": 0.5})),
    Mutant(
        relative_table_of_keys_to_come,
        Case(1, 1, 2, {"model.position": "t5", "model.relative_buckets": 8, "model.relative_distance": 12}),
    ),
    Mutant(row_means_of_one_ranks_columns, Case(1, 1, 2, {"optim.centralize": True}), "sgd"),
    Mutant(row_means_of_one_ranks_partition, Case(1, 2, 2, {"optim.centralize": True, **zero(2)}), "sgd"),
    Mutant(gradients_cut_before_they_are_summed, Case(1, 2, 1, {"train.clip_grad_value": 0.002}), "sgd"),
    Mutant(adafactor_means_of_one_ranks_rows, Case(1, 1, 2, ADAFACTOR)),
    Mutant(adafactor_means_of_one_ranks_partition, Case(1, 2, 1, {**ADAFACTOR, **zero(2)})),
    Mutant(muon_orthogonalises_each_ranks_shard, Case(1, 1, 2, MUON)),
    Mutant(muon_orthogonalises_each_partition, Case(1, 2, 1, {**MUON, **zero(2), **CUT})),
    Mutant(muon_scales_by_the_shape_of_a_shard, Case(1, 1, 2, MUON)),
    Mutant(the_owners_result_is_lost_on_the_last_partition, Case(1, 2, 1, {**MUON, **zero(1)})),
    Mutant(the_owners_result_is_lost_on_the_last_data_rank, Case(1, 2, 1, MUON)),
    Mutant(ranges_of_a_matrix_in_the_order_of_the_ranks, Case(1, 4, 1, {**MUON, **zero(1), **CUT, **batch(8, 1)})),
    Mutant(queries_keys_and_values_are_one_matrix, Case(1, 1, 1, {**MUON, "model.kv_heads": 2})),
    Mutant(queries_keys_and_values_in_a_row, Case(1, 1, 2, {**MUON, "model.kv_heads": 2})),
    Mutant(tables_and_embeddings_are_hidden_matrices, Case(1, 1, 2, {**MUON, "model.tie_embeddings": False})),
    Mutant(strides_counted_from_the_first_block, Case(1, 1, 1, STRIDED)),
    Mutant(masks_of_keys_as_they_are_gathered, Case(1, 1, 2, {**STRIDED, "model.attention_dropout": 0.2})),
    Mutant(summaries_of_blocks_that_are_seen_besides, Case(1, 1, 1, HIERARCHICAL)),
    Mutant(padding_has_a_loss, Case(2, 1, 1, {"data.rows": "documents"})),
    Mutant(padding_at_the_beginning_of_a_row, Case(1, 1, 2, {"data.rows": "documents"})),
    Mutant(summaries_at_the_first_of_their_tokens, Case(1, 1, 2, {**HIERARCHICAL, "model.position": "alibi"})),
    Mutant(compiled_gelu_whose_argument_is_not_doubled, Case(1, 1, 1, {"train.compile": True})),
    Mutant(
        compiled_relu_that_passes_every_gradient, Case(1, 1, 1, {"train.compile": True, "model.activation": "relu"})
    ),
)
