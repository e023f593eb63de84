"""The mixture of experts, features split over tensor ranks and experts over expert ranks, against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.model import ModelSection
from megalm.context_parallel.attention import ContextParallel
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import Run, select
from megalm.nn.context import Context
from megalm.nn.moe import MixtureOfExperts
from megalm.nn.router import SUMS, within_capacity
from tests.nn.dense import formulas
from tests.nn.layers import INIT, ROWS, check_layer, model_section, tokens_here
from tests.parity.reference_experts import taken
from tests.parity.reference_model import Formulas, Weights
from tests.shards import assert_close, assert_gradients_close, fill, random_whole, spec_of
from tests.worker_pool import WorkerPool

EXPERTS: dict[str, Any] = {"experts": 4, "expert_ffn": 12}
MIXTURES: tuple[dict[str, Any], ...] = (
    EXPERTS,
    {**EXPERTS, "activation": "swiglu", "capacity_factor": 1.0},
    {**EXPERTS, "experts_per_token": 1, "capacity_factor": 0.6},
    {**EXPERTS, "experts_per_token": 3, "router_score": "sigmoid", "shared_experts": 2, "router_bias_rate": 0.1},
)
BIAS = (0.0, 0.3, -0.2, 0.1)


def layer_of(mesh: ParallelMesh, config: ModelSection, sequence: bool) -> MixtureOfExperts:
    group, experts = mesh.group("tensor"), mesh.group("expert")
    layer = MixtureOfExperts("m", config, group=group, init=INIT, sequence=sequence, expert_group=experts)
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.tensor(BIAS))
    return layer


def formula_of(config: ModelSection, w: Weights) -> Formulas:
    named = {f"blocks.0.mlp{name.removeprefix('m')}": weight for name, weight in w.items()}
    plain = formulas(config, named)
    if config.router_bias_rate is not None:
        plain.routing.biases = {"blocks.0.mlp.router": torch.tensor(BIAS, dtype=torch.float64)}
    return plain


def context_of(mesh: ParallelMesh, config: ModelSection, sequence: bool, mask: Tensor | None = None) -> Context:
    each = config.sequence // mesh.size("tensor")
    held = (Run(mesh.index("tensor") * each, each),) if sequence else ()
    return Context(config.sequence, held, loss_mask_BT=mask)


def check_mixture(mesh: ParallelMesh) -> None:
    for values in MIXTURES:
        for sequence in (False, True):
            config = model_section(**values)
            layer = layer_of(mesh, config, sequence)
            context = context_of(mesh, config, sequence)
            check_layer(
                mesh,
                layer,
                lambda x, layer=layer, context=context: layer(x, context),
                lambda x, w, config=config: formula_of(config, w).transformed(x, 0),
                config,
                sequence,
            )


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_mixture_matches_its_formula(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_mixture, layout=RankLayout(tensor=tensor))


def check_losses(mesh: ParallelMesh) -> None:
    """The gradients of both losses, and the sums that are noted, of rows of which some tokens do not count."""
    for values in MIXTURES:
        for sequence in (False, True):
            config = model_section(**values)
            layer = layer_of(mesh, config, sequence)
            wholes = fill(layer, scale=0.5)
            x, dy = (random_whole(name, (ROWS, config.sequence, config.hidden)) for name in ("x", "dy"))
            mask = torch.rand(ROWS, config.sequence, generator=torch.Generator().manual_seed(3)) < 0.6
            mask[0] = False
            plain = formula_of(config, wholes)
            plain.routing.mask = mask
            expected = plain.transformed(x, 0)
            losses = torch.stack((sum(plain.routing.balance), sum(plain.routing.z)))
            ((expected * dy).sum() + 0.3 * losses[0] + 0.2 * losses[1]).backward()
            layer.router.begin(*torch.tensor([0.3, 0.2], dtype=torch.float64))
            mine = tokens_here(x, mesh, sequence).clone().requires_grad_()
            layer(mine, context_of(mesh, config, sequence, mask)).backward(tokens_here(dy, mesh, sequence))
            assert_gradients_close(layer, wholes)
            loads = layer.router.seen[: -len(SUMS)]
            assert loads.tolist() == plain.routing.loads["blocks.0.mlp.router"]
            sums = dict(zip(SUMS, layer.router.seen[-len(SUMS) :], strict=True))
            assert_close(torch.stack((sums["load_balance"], sums["router_z"])), losses.detach())
            assert sums["valid"] == mask.sum() and (sums["dropped"] > 0) == (config.capacity_factor is not None)


@pytest.mark.parametrize("tensor", [1, 2])
def test_losses_of_a_router_are_those_of_its_formulas(pool: WorkerPool, tensor: int) -> None:
    pool.run(check_losses, layout=RankLayout(tensor=tensor))


def test_a_begin_of_a_row_drops_what_the_row_drops() -> None:
    """As in generation, where the rest of the row is still to come: no loss mask, and a whole row's capacity."""
    mesh = ParallelMesh.on_meta(RankLayout(), 0)
    config = model_section(**next(values for values in MIXTURES if "capacity_factor" in values))
    layer = MixtureOfExperts("m", config, group=mesh.group("tensor"), init=INIT, sequence=False)
    fill(layer, scale=0.5)
    x = random_whole("x", (ROWS, config.sequence, config.hidden))
    with torch.no_grad():
        whole_row = layer(x, Context(config.sequence))
        for tokens in (1, 3, 5):
            assert_close(layer(x[:, :tokens], Context(tokens)), whole_row[:, :tokens], f"{tokens} tokens")
    choices = torch.zeros(1, 6, 1, dtype=torch.int64)
    assert within_capacity(choices, 2, 1.0).sum() == 3 and within_capacity(choices, 2, 1.0, 12).sum() == 6


def check_cut_rows(mesh: ParallelMesh, values: dict[str, Any]) -> None:
    """Ranks with tokens of the same rows: their losses' gradients add up to those of whole rows."""
    config = model_section(**values)
    group, rows = mesh.group("tensor"), ContextParallel(mesh.group("context"))
    layer = MixtureOfExperts("m", config, group=group, init=INIT, sequence=False, context=rows)
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.tensor(BIAS))
    wholes = fill(layer, scale=0.5)
    x = random_whole("x", (ROWS, config.sequence, config.hidden))
    mask = torch.rand(ROWS, config.sequence, generator=torch.Generator().manual_seed(3)) < 0.6
    plain = formula_of(config, wholes)
    plain.routing.mask = mask
    expected = plain.transformed(x, 0)
    (expected.sum() + 0.3 * sum(plain.routing.balance) + 0.2 * sum(plain.routing.z)).backward()
    layer.router.begin(*torch.tensor([0.3, 0.2], dtype=torch.float64))
    places = rows.places(config.sequence)
    layer(select(x, places), Context(config.sequence, places, loss_mask_BT=mask)).sum().backward()
    for parameter in layer.parameters():
        torch.distributed.all_reduce(parameter.grad, group=rows.group)
    assert_gradients_close(layer, wholes)
    assert layer.router.seen[:4].tolist() == plain.routing.loads["blocks.0.mlp.router"]
    dropped = float(layer.router.seen[-1])
    assert (dropped > 0) == (config.capacity_factor is not None)


def test_losses_of_rows_that_ranks_have_parts_of_are_those_of_the_rows(pool: WorkerPool) -> None:
    for values in MIXTURES:
        pool.run(check_cut_rows, values, layout=RankLayout(context=2))


def check_expert_ranks(mesh: ParallelMesh) -> None:
    """Each rank has tokens of its own; experts' gradients are whole when summed over the ranks that hold the same."""
    for values in MIXTURES:
        config = model_section(**values)
        layer = layer_of(mesh, config, sequence=False)
        wholes = fill(layer, scale=0.5)
        ranks, rank = mesh.size("replica"), mesh.index("replica")
        shape = (ROWS * ranks, config.sequence, config.hidden)
        x, dy = random_whole("x", shape).requires_grad_(), random_whole("dy", shape)
        plain = formula_of(config, wholes)
        expected = plain.transformed(x, 0)
        expected.backward(dy)
        assert x.grad is not None
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        mine = x.detach()[own].clone().requires_grad_()
        actual = layer(mine, context_of(mesh, config, sequence=False))
        actual.backward(dy[own])
        assert mine.grad is not None
        assert_close(actual, expected[own], "output")
        assert_close(mine.grad, x.grad[own], "input gradient")
        for parameter in layer.parameters():
            of_experts = spec_of(parameter).first_expert is not None
            group = mesh.group("expert_replica" if of_experts else "replica")
            torch.distributed.all_reduce(parameter.grad, group=group)
        assert_gradients_close(layer, wholes)


@pytest.mark.parametrize(("data", "expert", "tensor"), [(2, 2, 1), (4, 2, 1), (4, 4, 1), (2, 2, 2)])
def test_experts_of_other_ranks_match_the_formula(pool: WorkerPool, data: int, expert: int, tensor: int) -> None:
    pool.run(check_expert_ranks, layout=RankLayout(data=data, tensor=tensor, expert=expert))


def check_nobody_comes(mesh: ParallelMesh) -> None:
    """All tokens go to the experts of rank 0: the other has no row, and yet gradients of zero, not none."""
    layer = layer_of(mesh, model_section(**EXPERTS, router_bias_rate=0.1), sequence=False)
    fill(layer)
    assert layer.router.bias is not None
    layer.router.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    layer(random_whole("x", (1, 8, 8)), Context(8)).sum().backward()
    for parameter in (layer.experts.up, layer.experts.down):
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == (mesh.index("expert") == 0)


def test_experts_to_which_no_token_goes_have_gradients_of_zero(pool: WorkerPool) -> None:
    pool.run(check_nobody_comes, layout=RankLayout(data=2, expert=2))


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.25, 4.0])
@pytest.mark.parametrize("each", [1, 2])
def test_capacity_goes_to_the_first_of_a_row(factor: float, each: int) -> None:
    generator = torch.Generator().manual_seed(each)
    chosen = torch.rand(3, 10, 5, generator=generator).topk(each, dim=-1).indices
    fits = within_capacity(chosen, 5, factor)
    model = model_section(experts=5, experts_per_token=each, capacity_factor=factor)
    one_hot = torch.zeros(3, 10, 5).scatter_(-1, chosen, 1.0)
    assert torch.equal(fits, taken(model, one_hot).gather(-1, chosen).bool())
    assert torch.equal(fits[:2], within_capacity(chosen[:2], 5, factor))


def test_nothing_is_noted_in_evaluation_or_twice_by_recomputation() -> None:
    config = model_section(**EXPERTS)
    group = torch.distributed.ProcessGroup(torch.distributed.HashStore(), 0, 1)
    layer = MixtureOfExperts("m", config, group=group, init=INIT, sequence=False)
    x = random_whole("x", (2, 8, 8)).requires_grad_()
    context = Context(8, loss_mask_BT=torch.ones(2, 8, dtype=torch.bool))
    layer.router.begin(torch.tensor(1.0), torch.tensor(1.0))
    with torch.no_grad():
        layer(x, context)
    assert not layer.router.seen.any()
    torch.utils.checkpoint.checkpoint(layer, x, context, use_reentrant=False).sum().backward()
    once = layer.router.seen.clone()
    assert once[:4].sum() == 2 * 8 * 2
    layer.router.end()
    layer(x, context).sum().backward()
    assert torch.equal(layer.router.seen, once)
