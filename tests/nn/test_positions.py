"""Positions: learned vectors of the right tokens, and rotations that know distances only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalm.config.model import ModelSection
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.places import Run, whole
from megalm.nn.positions import POSITIONS, Position, alibi_slopes, relative_bucket
from megalm.tensor_parallel.initialize import Initializer
from tests.nn.layers import INIT, check_layer, model_section
from tests.parity.reference_model import bucket, rotated, sinusoids, slopes
from tests.shards import assert_close, random_whole
from tests.worker_pool import WorkerPool


def section(kind: str, **more: Any) -> ModelSection:
    return model_section(**{"hidden": 24, "heads": 4, "sequence": 8, "position": kind, "rotary_base": 100.0, **more})


def make(kind: str, embeds: bool = True, init: Initializer = INIT, **more: Any) -> Position:
    return POSITIONS.get(kind)(section(kind, **more), embeds=embeds, group=None, init=init)


def check_learned(mesh: ParallelMesh, sequence: bool) -> None:
    config = model_section()
    group = mesh.group("tensor") if sequence else None
    position = POSITIONS.get("learned")(config, embeds=True, group=group, init=INIT)
    length = config.sequence // mesh.size("tensor")
    places = (Run(mesh.index("tensor") * length, length),) if sequence else whole(config.sequence)
    check_layer(
        mesh,
        position,
        lambda x: position(x, places),
        lambda x, w: x + w["position.weight"],
        config,
        sequence,
    )


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, True), (4, True)])
def test_learned_positions_of_a_token_shard_are_those_of_the_whole_sequence(
    pool: WorkerPool, tensor: int, sequence: bool
) -> None:
    pool.run(check_learned, sequence, layout=RankLayout(tensor=tensor))


def test_a_shorter_sequence_takes_the_first_positions_and_runs_take_theirs() -> None:
    position = make("learned")
    x = random_whole("x", (2, 3, 24))
    assert_close(position(x, whole(3)), x + position.weight[:3])
    assert_close(position(x, (Run(1, 1), Run(5, 2))), x + position.weight[[1, 5, 6]])
    turned, all_turned = (
        make("rotary").rotation(places)(torch.ones(1, n, 4, 6))
        for places, n in (((Run(1, 1), Run(5, 2)), 3), (whole(8), 8))
    )
    assert torch.equal(turned, all_turned[:, [1, 5, 6]])


def test_only_the_stage_that_embeds_holds_learned_positions_and_rotary_has_no_parameters() -> None:
    assert [p.shard.name for p in make("learned").parameters()] == ["position.weight"]
    assert not list(make("learned", embeds=False).parameters())
    assert not list(make("rotary").parameters()) and not make("rotary").state_dict()


def test_each_kind_acts_in_one_place_only() -> None:
    x_BTD, x_BTHE = random_whole("x", (2, 5, 24)), random_whole("q", (2, 5, 4, 6))
    assert make("rotary")(x_BTD, 0) is x_BTD
    assert make("learned").rotation(whole(5))(x_BTHE) is x_BTHE


def test_rotation_turns_each_position_by_its_own_angles() -> None:
    x_BTHE = random_whole("q", (2, 5, 3, 6))
    turned = make("rotary").rotation(whole(5))(x_BTHE)
    for row in range(2):
        for head in range(3):
            assert_close(turned[row, :, head], rotated(x_BTHE[row, :, head], section("rotary")))


def test_rotated_scores_depend_on_the_distance_only() -> None:
    q, k = (random_whole(name, (1, 1, 1, 6)).expand(1, 8, 1, 6) for name in "qk")
    rotate = make("rotary").rotation(whole(8))
    scores = rotate(q)[0, :, 0] @ rotate(k)[0, :, 0].T
    for distance in range(8):
        same = scores.diagonal(-distance)
        assert_close(same, same[:1].expand_as(same), limit=1e-13)
    assert len(scores[:, 0].round(decimals=9).unique()) == 8


def test_the_tables_of_a_bf16_model_are_fp32() -> None:
    position = make("rotary", init=Initializer(1, torch.bfloat16, torch.device("cpu")))
    assert position.cos_TR.dtype is position.sin_TR.dtype is torch.float32
    x = torch.ones(1, 8, 1, 6, dtype=torch.bfloat16)
    assert position.rotation(whole(8))(x).dtype is torch.bfloat16


SCALED = [
    {"rotary_scaling": "linear", "rotary_factor": 4.0},
    {"rotary_scaling": "ntk", "rotary_factor": 4.0},
    {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original": 16},
    {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original": 64},
]


@pytest.mark.parametrize("scaling", SCALED, ids=lambda scaling: scaling["rotary_scaling"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scaled_and_partial_rotations_match_their_formulas(scaling: dict[str, Any], share: float) -> None:
    more = {**scaling, "rotary_share": share, "hidden": 64, "sequence": 40, "rotary_base": 10000.0}
    x_BTHE = random_whole("q", (1, 40, 4, 16))
    turned = make("rotary", **more).rotation(whole(40))(x_BTHE)
    assert_close(turned.transpose(1, 2), rotated(x_BTHE.transpose(1, 2), section("rotary", **more)))


def test_sinusoids_match_their_formula_in_odd_widths_too() -> None:
    for hidden in (24, 12):
        x = random_whole("x", (2, 5, hidden))
        assert_close(make("sinusoidal", hidden=hidden, heads=2)(x, (Run(2, 5),)), x + sinusoids(8, hidden)[2:7])


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 40, 112])
def test_slopes_match_their_formula_and_fall_in_powers(heads: int) -> None:
    assert alibi_slopes(heads) == pytest.approx(slopes(heads), rel=1e-15)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (2, 2)])
def test_buckets_of_distances_match_their_formula(buckets: int, farthest: int) -> None:
    config = section("t5", relative_buckets=buckets, relative_distance=farthest)
    distances = torch.arange(300)
    found = relative_bucket(distances, buckets, farthest).tolist()
    assert found == [bucket(int(distance), config) for distance in distances]
    assert found == sorted(found) and found[-1] == buckets - 1
