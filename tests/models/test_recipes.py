"""Shipped recipes, built whole: the parts of all ranks are the published model, and each rank's fits its GPU."""

from __future__ import annotations

import pytest
import torch

from megalm.config.load import load_recipe, shipped_recipes
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.models.build import build_stage
from megalm.train.monitor import count_parameters
from megalm.zero.engine import counted_here, shard_of
from tests.parity.harness import VOCAB
from tests.parity.options import covering_array

TINY_VOCAB = 2048
PUBLISHED = {
    "gpt-tiny": TINY_VOCAB * 128 + 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 128,
    "gpt-124m": 124_439_808,  # the released GPT-2 small
    "mixtral-8x7b": 46_702_792_704,  # the released Mixtral 8x7B
    "gpt-1b": 1_315_723_264,  # Cerebras-GPT 1.3B, Dey et al. 2023
    "llama-8b": 8_030_261_248,  # the released Llama 3 8B
    # Narayanan et al. 2021, equation 2, with the final norm's 2 h that it leaves out.
    "gpt-22b": 12 * 48 * 6144**2 + 13 * 48 * 6144 + (51_200 + 2048) * 6144 + 2 * 6144,
    "gpt-175b": 12 * 96 * 12288**2 + 13 * 96 * 12288 + (50_257 + 2048) * 12288 + 2 * 12288,
    "llama-405b": 405_853_388_800,  # the released Llama 3.1 405B
}
BYTES = 20
"""A parameter's without ZeRO: bf16 weight and gradient, fp32 master weight, gradient and two of Adam's."""


def held_and_counted(config: RunConfig, vocab: int, mesh: ParallelMesh) -> tuple[int, int]:
    """Return the elements that a rank holds, and those of them that no other rank counts, without padding."""
    model = build_stage(config, vocab, mesh, document_start=0)
    held = counted = 0
    for parameter in model.parameters():
        assert parameter.is_meta
        shard, size = shard_of(parameter), parameter.numel()
        assert parameter.shape == shard.local_shape
        held += size
        of_experts = shard.first_expert is not None
        if counted_here(parameter, mesh, model.tied_weight) and (of_experts or mesh.index("expert") == 0):
            counted += size if shard.dim is None else size // parameter.shape[shard.dim] * shard.length
    return held, counted


def held_and_counted_by_rank(config: RunConfig, vocab: int, layout: RankLayout) -> list[tuple[int, int]]:
    """Return what each rank of one copy of the model holds and counts."""
    meshes = (ParallelMesh.on_meta(layout, rank) for rank in range(layout.world_size))
    return [held_and_counted(config, vocab, mesh) for mesh in meshes]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ranks_of_a_recipe_hold_the_published_model_and_fit_80_gb(name: str) -> None:
    config = load_recipe(name)
    vocab = config.model.vocab or TINY_VOCAB
    layout = copy_of(config)
    ranks = held_and_counted_by_rank(config, vocab, layout)
    assert sum(counted for _, counted in ranks) == PUBLISHED[name] == count_parameters(config.model, vocab).total
    assert max(held for held, _ in ranks) * BYTES < 0.8 * 80 * 2**30, "a fifth is left to activations"
    assert config.parallel.tensor <= 8, "tensor ranks share a node"


def test_every_shipped_recipe_is_published_and_says_its_gpus() -> None:
    assert PUBLISHED.keys() == shipped_recipes().keys()
    for name, path in shipped_recipes().items():
        assert "\n# For " in path.read_text(encoding="utf-8"), name


def copy_of(config: RunConfig) -> RankLayout:
    """Return the layout of one copy of the model: as many data ranks as divide the experts."""
    parallel = config.parallel
    return RankLayout(parallel.pipeline, data=parallel.expert, tensor=parallel.tensor, expert=parallel.expert)


def test_the_ranks_hold_the_formulas_count_with_every_option() -> None:
    for case in covering_array():
        config = case.config()
        counted = sum(own for _, own in held_and_counted_by_rank(config, VOCAB, copy_of(config)))
        assert counted == count_parameters(config.model, VOCAB).total, case.name


def test_nothing_runs_on_a_mesh_of_no_world() -> None:
    mesh = ParallelMesh.on_meta(RankLayout(tensor=2), 1)
    assert (mesh.size("tensor"), mesh.index("tensor"), mesh.size("data")) == (2, 1, 1)
    assert not torch.distributed.is_initialized()
    with pytest.raises(RuntimeError):
        torch.distributed.all_reduce(torch.ones(1), group=mesh.group("tensor"))
