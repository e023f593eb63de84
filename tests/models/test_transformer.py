"""The whole model against plain PyTorch: over tensor ranks, cut into stages, recomputed, tied and untied."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import ShardSpec
from megalm.models.transformer import StagePlan, Transformer
from megalm.nn.masks import DropoutKeys
from megalm.tensor_parallel.initialize import Initializer
from tests.parity.harness import LLAMA, Case
from tests.parity.reference import Reference
from tests.shards import assert_close, assert_gradients_close, part_of, spec_of
from tests.worker_pool import WorkerPool

VOCAB, ROWS, STEP = 67, 3, 4
SMALL: dict[str, Any] = {"model.layers": 3, "model.hidden": 16, "model.sequence": 8, "model.init_std": 0.3}
KEYS = DropoutKeys(seed=7, step=STEP, first_sample=0)


def recipe(tensor: int = 1, **overrides: Any) -> RunConfig:
    return Case(tensor=tensor, overrides={**SMALL, **overrides}).config()


def make(config: RunConfig, mesh: ParallelMesh, layers: range | None = None, **rest: Any) -> Transformer:
    """Return the model, or the stage that holds `layers`, over the tensor ranks of the mesh."""
    everything = range(config.model.layers)
    layers = everything if layers is None else layers
    return Transformer(
        config.model,
        vocab=VOCAB,
        plan=StagePlan((layers,), layers.start == 0, layers.stop == everything.stop),
        group=mesh.group("tensor"),
        init=Initializer(config.seed, torch.float64, torch.device("cpu")),
        label_smoothing=config.loss.label_smoothing,
        **rest,
    )


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.rand(ROWS, 8, generator=generator) < 0.6


def reference_gradients(config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss sum and the weights, whose `.grad` is its gradient."""
    reference = Reference(config, VOCAB, torch.float64)
    weights = {name: p.clone().requires_grad_() for name, p in reference.parameters.items()}
    tokens, labels, mask = make_batch()
    loss = reference.loss_sum(reference.logits(tokens, weights, STEP, 0, ROWS), labels, mask)
    loss.backward()
    return loss.detach(), weights


def check_model(mesh: ParallelMesh) -> None:
    tensor = mesh.size("tensor")
    smooth = {"loss.label_smoothing": 0.2, "model.dropout": 0.2}
    tokens, labels, mask = make_batch()
    for kind, sequence in itertools.product(({}, LLAMA, {**LLAMA, **smooth}, smooth), {False, tensor > 1}):
        config = recipe(tensor, **kind)
        loss, weights = reference_gradients(config)
        model = make(config, mesh, sequence=sequence)
        ours = model(tokens, labels, mask, KEYS)
        assert_close(ours, loss, "loss")
        ours.backward()
        assert_gradients_close(model, weights)
        assert {spec_of(p).name for p in model.parameters()} == weights.keys()
        logits = Reference(config, VOCAB, torch.float64).logits(tokens)
        columns = ShardSpec.split("logits", (ROWS, 8, VOCAB), 2, mesh.index("tensor"), tensor)
        with torch.no_grad():
            assert_close(model(tokens), part_of(logits, columns), "logits")


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_loss_gradients_and_logits_are_those_of_one_plain_process(pool: WorkerPool, tensor: int) -> None:
    """A padded vocabulary (67 over 2 and 4), dropout, label smoothing, sequence parallelism, both kinds of model."""
    if tensor == 4:
        pool.run(check_padded_vocabulary, layout=RankLayout(tensor=4))
    else:
        pool.run(check_model, layout=RankLayout(tensor=tensor))


def check_padded_vocabulary(mesh: ParallelMesh) -> None:
    tokens, labels, mask = make_batch()
    for tied in (True, False):
        config = recipe(4, **{"model.tie_embeddings": tied, "loss.label_smoothing": 0.1})
        loss, weights = reference_gradients(config)
        model = make(config, mesh)
        ours = model(tokens, labels, mask, KEYS)
        ours.backward()
        assert_close(ours, loss, "loss")
        assert_gradients_close(model, weights)


def run_in_stages(config: RunConfig, mesh: ParallelMesh, cuts: list[int]) -> tuple[Tensor, list[Transformer]]:
    tokens, labels, mask = make_batch()
    x, stages = tokens, []
    for start, stop in itertools.pairwise(cuts):
        stages.append(make(config, mesh, range(start, stop)))
        x = stages[-1](x, dropout=KEYS) if stop < cuts[-1] else stages[-1](x, labels, mask, KEYS)
    return x, stages


def check_stages(mesh: ParallelMesh) -> None:
    for kind, cuts in itertools.product(({"model.dropout": 0.2}, LLAMA), ([0, 1, 3], [0, 2, 3], [0, 1, 2, 3])):
        config = recipe(**kind)
        loss, weights = reference_gradients(config)
        ours, stages = run_in_stages(config, mesh, cuts)
        assert_close(ours, loss, "loss")
        ours.backward()
        copies = [stage.tied_weight for stage in stages]
        if config.model.tie_embeddings:
            first, last = copies[0], copies[-1]
            assert first is not None and last is not None and copies[1:-1] == [None] * (len(cuts) - 3)
            assert first is stages[0].embedding.weight and last is stages[-1].head.weight
            assert spec_of(first) == spec_of(last) and torch.equal(first, last)
            assert first.grad is not None and last.grad is not None
            total = first.grad + last.grad
            first.grad = last.grad = total
        else:
            assert copies == [None] * len(stages)
        for stage in stages:
            assert_gradients_close(stage, weights)
        names = [spec_of(p).name for stage in stages for p in stage.parameters()]
        twice = ["embedding.weight"] if config.model.tie_embeddings else []
        assert sorted(names) == sorted([*weights, *twice])


def check_tied(mesh: ParallelMesh) -> None:
    tied, untied = (make(recipe(**{"model.tie_embeddings": flag}), mesh) for flag in (True, False))
    assert tied.head.weight is tied.embedding.weight and tied.tied_weight is None
    assert untied.head.weight is not untied.embedding.weight and untied.tied_weight is None
    assert spec_of(untied.head.weight).name == "head.weight"
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def check_recompute(mesh: ParallelMesh) -> None:
    """A run of (block 1, block 2, what attends in block 1) more where it is computed again; the same bits always."""
    tokens, labels, mask = make_batch()
    config = recipe(**{"model.dropout": 0.2})
    expected = {("none", 1): (1, 1, 1), ("full", 1): (2, 2, 2), ("full", 2): (1, 2, 1), ("selective", 1): (1, 1, 2)}
    gradients = []
    for (what, every), wanted in expected.items():
        model = make(config, mesh, recompute=what, recompute_every=every)
        calls = {"1": 0, "2": 0, "attend": 0}

        def counted(name: str, call: Any = None, calls: dict[str, int] = calls) -> Any:
            def count(*args: Any, **options: Any) -> Any:
                calls[name] += 1
                return None if call is None else call(*args, **options)

            return count

        for name in ("1", "2"):
            model.blocks[name].register_forward_pre_hook(counted(name))
        attention = model.blocks["1"].attention
        attention.attend = counted("attend", attention.attend)
        model(tokens, labels, mask, KEYS).backward()
        assert tuple(calls.values()) == wanted, (what, every, calls)
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def check_one_rank(mesh: ParallelMesh) -> None:
    check_stages(mesh)
    check_tied(mesh)
    check_recompute(mesh)


def test_stages_in_a_row_are_the_model_tied_heads_share_one_parameter_and_recompute_changes_no_bit(
    pool: WorkerPool,
) -> None:
    pool.run(check_one_rank, layout=RankLayout())


def check_prefixes(mesh: ParallelMesh) -> None:
    tokens = torch.randint(VOCAB, (ROWS, 24), generator=torch.Generator().manual_seed(0))
    blocks = {"model.attention_pattern": "hierarchical", "model.block_size": 4, "model.local_blocks": 2}
    for position in ("rotary", "alibi", "learned"):
        model = make(recipe(**{**blocks, "model.sequence": 24, "model.position": position}), mesh)
        logits = model(tokens)
        for first in range(1, 24):
            changed = torch.cat((tokens[:, :first], (tokens[:, first:] + 1) % VOCAB), dim=1)
            assert torch.equal(model(changed)[:, :first], logits[:, :first]), f"{position}: tokens from {first} on"
            assert not torch.equal(model(changed)[:, first:], logits[:, first:])
            with torch.no_grad():
                assert_close(model(tokens[:, :first]), logits[:, :first], f"{position}: a row of {first} tokens")


def test_a_prefix_has_the_logits_it_has_in_a_longer_row(pool: WorkerPool) -> None:
    """Summaries are of blocks that are over: no token sees one to come, and a text that grows keeps its logits."""
    pool.run(check_prefixes, layout=RankLayout())
