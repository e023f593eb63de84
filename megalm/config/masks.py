"""The attention masks of a model as text: which keys the queries of each layer see. Imports no torch."""

from __future__ import annotations

from megalm.config.model import ModelSection
from megalm.config.patterns import BlockPattern

CELLS = 32
"""A drawing has at most so many rows and columns, each of as many tokens as it takes."""
ALL, SOME, NONE, MEAN = "#", "+", ".", "~"


def draw_masks(model: ModelSection) -> str:
    """Return a drawing for each kind of layer, with the layers that are of it: queries down, keys to the right."""
    kinds: dict[int | None, list[int]] = {}
    for layer in range(model.blocks):
        kinds.setdefault(model.window_of(layer), []).append(layer)
    drawings = [f"{_heading(model, window, layers)}\n{_drawing(model, window)}" for window, layers in kinds.items()]
    step = -(-model.sequence // CELLS)
    seen = f"{ALL} all visible, {SOME} some, {NONE} none"
    if model.attention_pattern == "hierarchical":
        seen = f"{ALL} all visible, {MEAN} in the means of their blocks, {SOME} some or both, {NONE} none"
    scale = f"{model.sequence} tokens, {step} a cell: {seen}"
    documents = "\ndocuments in a row do not see each other besides" if model.document_mask else ""
    return "\n\n".join([*drawings, scale + documents])


def _heading(model: ModelSection, window: int | None, layers: list[int]) -> str:
    seen = "itself and all tokens before it" if window is None else f"the last {window} tokens, its own included"
    if model.attention_pattern != "full":
        seen = f"of blocks of {model.block_size} tokens the last {model.local_blocks}, its own included"
        seen += "" if model.block_stride is None else f", those a multiple of {model.block_stride} before its own"
        seen += f", the first {model.global_tokens} tokens" if model.global_tokens else ""
        seen += ", and of each block before these the mean" if model.attention_pattern == "hierarchical" else ""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1][1:] = [layer]
        else:
            spans.append([layer])
    names = ", ".join("-".join(map(str, span)) for span in spans)
    return f"layer{'s' if len(layers) > 1 else ''} {names}: a token sees {seen}"


def _drawing(model: ModelSection, window: int | None) -> str:
    tokens, pattern = model.sequence, model.block_pattern
    step = -(-tokens // CELLS)
    starts = range(0, tokens, step)
    if pattern is None:
        return "\n".join("".join(_cell(query, key, tokens, step, window) for key in starts) for query in starts)
    corners = [_corners(range(start, min(start + step, tokens)), pattern) for start in starts]
    return "\n".join("".join(_pattern_cell(pattern, queries, keys) for keys in corners) for queries in corners)


def _corners(places: range, pattern: BlockPattern) -> list[int]:
    """Return the first and last of the places in each block, and those beside the end of the first tokens."""
    size = pattern.block
    begins = {places.start, pattern.first, *range(-(-places.start // size) * size, places.stop, size)}
    return sorted(place for place in {places[-1], *begins, *(begin - 1 for begin in begins)} if place in places)


def _pattern_cell(pattern: BlockPattern, queries: list[int], keys: list[int]) -> str:
    """Judge the corners of a cell: between them a token is seen or not by its order alone."""
    seen = {_sight(pattern, query, key) for query in queries for key in keys}
    return seen.pop() if len(seen) == 1 else SOME


def _sight(pattern: BlockPattern, query: int, key: int) -> str:
    """Return how a token sees another: by itself, in the summary of its block, or not."""
    if pattern.sees(query, key):
        return ALL
    return MEAN if pattern.summaries and pattern.sees(query, -1 - key // pattern.block) else NONE


def _cell(query: int, key: int, tokens: int, step: int, window: int | None) -> str:
    """Judge the distances between the queries and keys of a cell, all of which occur, from the least to the largest."""
    least = query - (min(key + step, tokens) - 1)
    largest = min(query + step, tokens) - 1 - key
    farthest = tokens if window is None else window - 1
    if least >= 0 and largest <= farthest:
        return ALL
    return SOME if largest >= 0 and least <= farthest else NONE
