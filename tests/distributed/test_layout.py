"""The arithmetic of ranks: every axis cuts the world into groups, and the coordinates say which."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.distributed.layout import AXES, Coordinates, RankLayout
from megalm.errors import ConfigError

layouts = st.builds(RankLayout, *(st.integers(1, 6) for _ in range(3)))
SIZES = {"pipeline": lambda m: m.pipeline, "data": lambda m: m.data, "tensor": lambda m: m.tensor}


@settings(deadline=None)
@given(layouts)
def test_coordinates_and_rank_are_inverse(layout):
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank(pipeline=at.pipeline, data=at.data, tensor=at.tensor) == rank


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
    for axis, size in SIZES.items():
        for ranks in layout.groups(axis):
            places = [layout.coordinates(rank) for rank in ranks]
            assert [getattr(place, axis) for place in places] == list(range(size(layout)))
            for other in set(SIZES) - {axis}:
                assert len({getattr(place, other) for place in places}) == 1


@settings(deadline=None)
@given(layouts)
def test_a_model_group_holds_one_copy_of_the_model(layout):
    for index, ranks in enumerate(layout.groups("model")):
        assert {(layout.coordinates(r).pipeline, layout.coordinates(r).tensor) for r in ranks} == {
            (pipeline, tensor) for pipeline in range(layout.pipeline) for tensor in range(layout.tensor)
        }
        assert {layout.coordinates(r).data for r in ranks} == {index}


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
    assert layout.groups("tensor")[0] == [0, 1]
    assert layout.groups("data")[0] == [0, 2]
    assert layout.groups("pipeline")[0] == [0, 4]
    assert layout.groups("model")[0] == [0, 1, 4, 5]


def test_fill_gives_the_rest_to_data_and_refuses_what_does_not_divide():
    assert RankLayout.fill(12, pipeline=3, tensor=2) == RankLayout(3, 2, 2)
    with pytest.raises(ConfigError, match=r"10 processes do not divide .* start a multiple of 6"):
        RankLayout.fill(10, pipeline=3, tensor=2)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=0"):
        RankLayout(tensor=0)
