"""The arithmetic of ranks: every axis cuts the world into groups, and the coordinates say which."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.distributed.layout import AXES, Coordinates, RankLayout
from megalm.errors import ConfigError

SIZES = ("pipeline", "data", "context", "tensor")


@st.composite
def any_layout(draw):
    pipeline, data, tensor, context = (draw(st.integers(1, 4)) for _ in range(4))
    replicas = data * context
    expert = draw(st.sampled_from([n for n in range(1, replicas + 1) if replicas % n == 0]))
    return RankLayout(pipeline, data, tensor, context, expert)


layouts = any_layout()


@settings(deadline=None)
@given(layouts)
def test_coordinates_and_rank_are_inverse(layout):
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank(at.pipeline, at.data, at.tensor, at.context) == rank


@settings(deadline=None)
@given(layouts)
def test_every_rank_is_in_one_group_of_each_axis(layout):
    for axis in AXES:
        members = [rank for ranks in layout.groups(axis) for rank in ranks]
        ends = {0, layout.pipeline - 1}
        everyone = range(layout.world_size)
        expected = [r for r in everyone if axis != "embedding" or layout.coordinates(r).pipeline in ends]
        assert sorted(members) == expected
        for ranks in layout.groups(axis):
            assert all(layout.group_of(axis, rank) == ranks for rank in ranks)


@settings(deadline=None)
@given(layouts)
def test_only_its_own_coordinate_varies_within_a_group(layout):
    for axis in SIZES:
        for ranks in layout.groups(axis):
            places = [layout.coordinates(rank) for rank in ranks]
            assert [getattr(place, axis) for place in places] == list(range(getattr(layout, axis)))
            for other in set(SIZES) - {axis}:
                assert len({getattr(place, other) for place in places}) == 1


@settings(deadline=None)
@given(layouts)
def test_replicas_are_cut_into_blocks_that_hold_all_experts(layout):
    """An expert group and an expert-replica group have one rank in common, and all of them are one replica group."""
    for ranks in layout.groups("replica"):
        assert len(ranks) == layout.data * layout.context
        assert len({(layout.coordinates(r).pipeline, layout.coordinates(r).tensor) for r in ranks}) == 1
        for rank in ranks:
            experts, copies = layout.group_of("expert", rank), layout.group_of("expert_replica", rank)
            assert len(experts) == layout.expert and set(experts) & set(copies) == {rank}
            neighbours = ranks.index(experts[0]) + len(experts)
            assert experts == ranks[ranks.index(experts[0]) : neighbours]
            assert {r for own in experts for r in layout.group_of("expert_replica", own)} == set(ranks)
            assert [experts.index(rank)] * len(copies) == [layout.group_of("expert", r).index(r) for r in copies]


@settings(deadline=None)
@given(layouts)
def test_a_model_group_holds_one_copy_of_the_model(layout):
    for index, ranks in enumerate(layout.groups("model")):
        assert {(layout.coordinates(r).pipeline, layout.coordinates(r).tensor) for r in ranks} == {
            (pipeline, tensor) for pipeline in range(layout.pipeline) for tensor in range(layout.tensor)
        }
        assert {layout.coordinates(r).data * layout.context + layout.coordinates(r).context for r in ranks} == {index}


@settings(deadline=None)
@given(layouts)
def test_an_embedding_group_joins_the_first_and_the_last_stage(layout):
    for ranks in layout.groups("embedding"):
        assert [layout.coordinates(r).pipeline for r in ranks] == sorted({0, layout.pipeline - 1})


def test_tensor_runs_fastest_and_pipeline_slowest():
    layout = RankLayout(pipeline=2, data=2, tensor=2)
    assert [layout.coordinates(rank) for rank in (0, 1, 2, 4)] == [
        Coordinates(0, 0, 0),
        Coordinates(0, 0, 1),
        Coordinates(0, 1, 0),
        Coordinates(1, 0, 0),
    ]
    assert str(Coordinates(1, 2, 3, 4)) == "pipeline 1, data 2, context 4, tensor 3"
    assert layout.groups("tensor")[0] == [0, 1]
    assert layout.groups("data")[0] == [0, 2]
    assert layout.groups("pipeline")[0] == [0, 4]
    assert layout.groups("model")[0] == [0, 1, 4, 5]
    layout = RankLayout(data=2, tensor=2, context=2, expert=2)
    assert (layout.groups("context")[0], layout.groups("data")[0]) == ([0, 2], [0, 4])
    assert layout.groups("replica")[0] == [0, 2, 4, 6]
    assert (layout.groups("expert")[0], layout.groups("expert_replica")[0]) == ([0, 2], [0, 4])


def test_sizes_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"parallel\.tensor=0"):
        RankLayout(tensor=0)
    with pytest.raises(ConfigError, match=r"parallel\.expert=4 does not divide the 6 ranks .* use a divisor of 6"):
        RankLayout(data=3, context=2, expert=4)
