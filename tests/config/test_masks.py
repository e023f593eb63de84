"""A drawn mask says of each cell what is true of every pair of tokens in it."""

from __future__ import annotations

import math

import pytest

from megalm.cli import main
from megalm.config.masks import ALL, CELLS, MEAN, NONE, SOME, draw_masks
from megalm.config.model import ModelSection


@pytest.mark.parametrize("tokens", [5, 32, 50, 96])
@pytest.mark.parametrize("window", [None, 1, 3, 40])
def test_each_cell_is_what_its_pairs_are(tokens: int, window: int | None) -> None:
    model = ModelSection(layers=1, hidden=8, heads=2, sequence=tokens, window=window)
    rows = draw_masks(model).splitlines()[1:-2]
    step = math.ceil(tokens / CELLS)
    assert len(rows) == math.ceil(tokens / step) <= CELLS
    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            seen = [
                0 <= t - s < (window or tokens)
                for t in range(number * step, min(number * step + step, tokens))
                for s in range(place * step, min(place * step + step, tokens))
            ]
            assert cell == (ALL if all(seen) else SOME if any(seen) else NONE), (number, place)


PATTERNS = [{"block_size": 4, "local_blocks": 2, "block_stride": 3, "global_tokens": 6}, {"block_size": 7}]


@pytest.mark.parametrize("tokens", [50, 96])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_cell_of_a_pattern_is_what_its_pairs_are(tokens: int, pattern: dict[str, int]) -> None:
    model = ModelSection(layers=1, hidden=8, heads=2, sequence=tokens, attention_pattern="strided", **pattern)  # type: ignore[arg-type]
    size, step = model.block_size, math.ceil(tokens / CELLS)

    def sees(t: int, s: int) -> bool:
        back = t // size - s // size
        jumped = model.block_stride is not None and back % model.block_stride == 0
        return s <= t and (back < model.local_blocks or jumped or s < model.global_tokens)

    for number, row in enumerate(draw_masks(model).splitlines()[1:-2]):
        for place, cell in enumerate(row):
            queries, keys = (range(at * step, min(at * step + step, tokens)) for at in (number, place))
            seen = [sees(t, s) for t in queries for s in keys]
            assert cell == (ALL if all(seen) else SOME if any(seen) else NONE), (number, place)


@pytest.mark.parametrize("tokens", [48, 96])
@pytest.mark.parametrize("blocks", [(2, 1), (3, 4), (8, 2)], ids=str)
def test_blocks_in_summary_have_a_letter_of_their_own(tokens: int, blocks: tuple[int, int]) -> None:
    size, local = blocks
    pattern = {"attention_pattern": "hierarchical", "block_size": size, "local_blocks": local}
    model = ModelSection(layers=1, hidden=8, heads=2, sequence=tokens, **pattern)  # type: ignore[arg-type]
    heading, *rows, _, legend = draw_masks(model).splitlines()
    assert heading.endswith(f"the last {local}, its own included, and of each block before these the mean")
    assert f"{MEAN} in the means of their blocks, {SOME} some or both" in legend
    step = math.ceil(tokens / CELLS)

    def sight(t: int, s: int) -> str:
        return NONE if s > t else ALL if t // size - s // size < local else MEAN

    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            queries, keys = (range(at * step, min(at * step + step, tokens)) for at in (number, place))
            seen = {sight(t, s) for t in queries for s in keys}
            assert cell == (seen.pop() if len(seen) == 1 else SOME), (number, place)


def test_layers_of_a_kind_are_drawn_once(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["model.layers=8", "model.window=64", "model.window_pattern=SSSL"]
    assert main(["config", "show", "gpt-tiny", "--mask", *layers]) == 0
    said = capsys.readouterr().out
    assert "layers 0-2, 4-6: a token sees the last 64 tokens, its own included" in said
    assert "layers 3, 7: a token sees itself and all tokens before it" in said
