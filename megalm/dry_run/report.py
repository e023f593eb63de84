"""A dry run as text for a terminal of 100 columns, and as JSON with everything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from megalm.dry_run.folding import folded
from megalm.dry_run.rank import Acted, DryRun, Message
from megalm.dry_run.recording import Call
from megalm.zero.engine import shard_of

_ACTIONS = 16
_GIB = 2**30
_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_PARTS = {"master_weights": "master weights"}


def as_json(run: DryRun) -> dict[str, Any]:
    """Return everything that a dry run has found, in values of JSON."""
    return {
        "rank": run.rank,
        "world": run.layout.world_size,
        "layout": _sizes(run),
        "coordinates": _place(run),
        "layers": [list(chunk) for chunk in run.plan.chunks],
        "embeds": run.plan.first,
        "predicts": run.plan.last,
        "parameters": [
            {
                "name": shard_of(p).name,
                "local_shape": list(shard_of(p).local_shape),
                "whole_shape": list(shard_of(p).global_shape),
                "dtype": _dtype(p.dtype),
                "bytes": p.nbytes,
                "trained": p.requires_grad,
            }
            for p in run.parameters
        ],
        "microbatches": run.microbatches,
        "executed_microbatches": run.executed,
        "bytes": {**run.held, "buckets": run.buffers, "activations": run.activations},
        "offloaded_bytes": run.offloaded,
        "in_host_memory": run.in_host,
        "peak_during": run.peak_at,
        "most_live_microbatches": run.most_live,
        "bubble": run.bubble,
        "message": None if run.message is None else _call(run.message),
        "collectives": {
            "begin": [_call(call) for call in run.begin],
            "microbatch": [
                {"work": work, "chunk": chunk, "calls": [_call(call) for call in calls]}
                for (work, chunk), calls in sorted(run.work.items())
            ],
            "first_microbatch": [
                {"work": work, "chunk": chunk, "calls": [_call(call) for call in calls]}
                for (work, chunk), calls in sorted(run.first.items())
            ],
            **{name: [_call(c) for c in getattr(run, name)] for name in ("reduce", "update", "after")},
        },
        "totals": [
            {"axis": axis, "operation": operation, "ranks": ranks, "calls": calls, "sent_bytes": sent}
            for (axis, operation, ranks), (calls, sent) in totals(run).items()
        ],
        "assumed": run.assumed,
        "not_listed": run.unstated,
        "actions": [
            {
                "action": acted.action.kind.value,
                "microbatch": acted.action.microbatch,
                "chunk": acted.action.chunk,
                "receives": _message(acted.receives),
                "sends": _message(acted.sends),
            }
            for acted in run.actions
        ],
    }


def totals(run: DryRun) -> dict[tuple[str, str, int], tuple[int, int]]:
    """Return calls and bytes sent of a step, by (axis, operation, ranks of the group)."""
    calls: Counter[Call] = Counter()
    for name in ("begin", "reduce", "update", "after"):
        calls.update(getattr(run, name))
    for acted in run.actions:
        calls.update(run.calls_of(acted.action))
        if run.message is not None:
            for end, operation in ((acted.receives, "receive"), (acted.sends, "send")):
                if end is not None:
                    calls[run.message._replace(operation=operation)] += 1
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for call, count in calls.items():
        key = (call.axis, call.operation, call.ranks)
        number, sent = found.get(key, (0, 0))
        found[key] = number + count, sent + count * call.sent
    return dict(sorted(found.items(), key=lambda row: -row[1][1]))


def as_text(run: DryRun, recipe: str) -> str:
    """Return what a person reads: the place of the rank, its parts, memory, collectives, totals and first actions."""
    parts = (_head(run, recipe), _parameters(run), _memory(run), _collectives(run), _totals(run), _actions(run))
    return "\n\n".join("\n".join(part) for part in parts)


def _head(run: DryRun, recipe: str) -> list[str]:
    parallel, train = run.config.parallel, run.config.train
    sizes = " x ".join(f"{axis} {size}" for axis, size in _sizes(run).items())
    at = ", ".join(f"{axis} {index}" for axis, index in _place(run).items())
    ends = [*(["the embedding"] if run.plan.first else []), *(["the head"] if run.plan.last else [])]
    if run.plan.last and run.config.model.mtp_depth:
        ends.append(f"{run.config.model.mtp_depth} blocks that predict further tokens")
    layers = [" and ".join(["layers " + _range(chunk) if chunk else "no layer"]) for chunk in run.plan.chunks]
    stage = "; ".join(f"chunk {n}: {text}" for n, text in enumerate(layers)) if len(layers) > 1 else layers[0]
    return [
        f"{recipe}, rank {run.rank:,} of {run.layout.world_size:,} ({sizes})",
        f"{at}: {' and '.join([stage, *ends])} of {run.config.model.layers} layers",
        f"a step: {run.microbatches:,} microbatch{'' if run.microbatches == 1 else 'es'} of {train.micro_batch} x "
        f"{run.config.model.sequence:,} tokens, schedule {parallel.schedule}; ZeRO {run.config.zero.stage}; "
        f"recomputation {train.recompute}; "
        f"{run.config.model.kernels} kernels",
        *([f"bubble {run.bubble:.1%}"] if parallel.pipeline > 1 else []),
        *run.assumed,
    ]


def _parameters(run: DryRun) -> list[str]:
    rows = [("parameter", "local shape", "of", "dtype", "each", "MiB in all")]
    for name, count, same in _grouped(run):
        shard = shard_of(same)
        local, whole = (" x ".join(map(str, shape)) for shape in (shard.local_shape, shard.global_shape))
        frozen = "" if same.requires_grad else " (frozen)"
        whole = "the same" if local == whole else whole
        rows.append(
            (name, local, whole, _dtype(same.dtype) + frozen, f"x {count}", f"{count * same.nbytes / 2**20:,.1f}")
        )
    elements = sum(p.numel() for p in run.parameters)
    return [*_table(rows, "llllrr"), f"{elements:,} parameters on this rank"]


def _grouped(run: DryRun) -> Iterator[tuple[str, int, Any]]:
    """Yield name, number and one of the parameters that are alike but for their block, in order."""
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for p in run.parameters:
        shard = shard_of(p)
        name = re.sub(r"^blocks\.\d+\.", "blocks.*.", shard.name)
        alike.setdefault((name, shard.local_shape, shard.global_shape, p.dtype, p.requires_grad), []).append(p)
    for (name, *_), members in alike.items():
        yield (name if len(members) > 1 else shard_of(members[0]).name), len(members), members[0]


def _memory(run: DryRun) -> list[str]:
    held = {_PARTS.get(name, name): size for name, size in run.held.items()}
    rows = [("memory", "GiB", "")]
    for name, size in held.items():
        rows.append((name, _gib(size), "in the host's memory" if name.replace(" ", "_") in run.in_host else ""))
    if run.buffers:
        rows.append(("reduction buckets", _gib(run.buffers), "DeepSpeed's"))
    live = f"{run.most_live} microbatch{'es' if run.most_live > 1 else ''}"
    if len(run.plan.chunks) > 1:
        live = f"{run.most_live} pieces (microbatch x chunk)"
    rows.append(("activations", _gib(run.activations), f"at most, in {run.peak_at}; {live} live at most"))
    if run.config.train.offload_activations:
        rows.append(("offloaded", _gib(run.offloaded), "activations in the host's memory, at most"))
    here = sum(size for name, size in run.held.items() if name not in run.in_host) + run.buffers + run.activations
    rows.append(("together", _gib(here), "and what CUDA, NCCL, kernels and the allocator take for themselves"))
    return _table(rows, "lrl")


def _collectives(run: DryRun) -> list[str]:
    lines = ["collectives of a step, in order: operation, axis and ranks, elements and bytes of the whole"]
    lines += _listed("before the first forward", run.begin)
    counts = Counter((name, acted.action.chunk) for acted in run.actions for name in run.names_of(acted.action))
    for (work, chunk), calls in run.work.items():
        where = f" of chunk {chunk}" if len(run.plan.chunks) > 1 else ""
        lines += _listed(f"{work}{where} of the first microbatch", run.first.get((work, chunk), []))
        differs = (work, chunk) in run.first
        times = f"{'other ' if differs else ''}microbatch, {counts[work, chunk] - differs:,} times"
        lines += _listed(f"{work}{where} of each {times}", calls)
    early = run.config.overlap.gradients and run.config.zero.stage == 0
    when = ", begun as soon as each is final" if early else ""
    lines += _listed(f"gradients, once a step{when}", run.reduce)
    lines += _listed("loss, norm and update, once a step", run.update)
    lines += _listed("after the step", run.after)
    return [*lines, *run.unstated]


def _listed(title: str, calls: Sequence[Call]) -> list[str]:
    if not calls:
        return []
    lines = [f"  {title}"]
    for fold in folded(calls):
        deep = fold.times > 1 and len(fold.items) > 1
        lines += [f"    {fold.times} x"] if deep else []
        for _, members in groupby(fold.items, key=lambda call: (call.operation, call.axis, call.dtype)):
            lines += _rows(list(members), 1 if deep else fold.times, "      " if deep else "    ")
    return lines


def _rows(calls: Sequence[Call], times: int, indent: str) -> Iterator[str]:
    """Yield the lines of calls that differ in their sizes at most; more than two sizes in a row are one line."""
    sizes = [(call, len(list(same))) for call, same in groupby(calls)]
    if len(sizes) > 2:
        least, most = (pick(call.elements for call in calls) for pick in (min, max))
        together = sum(call.nbytes for call in calls)
        yield _row(calls[0], len(calls), f"{least:,} to {most:,}", together, indent) + " in all"
        return
    for call, same in sizes:
        yield _row(call, same * times, f"{call.elements:,}", call.nbytes, indent)


def _row(call: Call, times: int, elements: str, size: int, indent: str) -> str:
    what = f"{f'{times} x ' if times > 1 else ''}{call.operation}"
    left = f"{indent}{what:<20} {f'{call.axis} {call.ranks:,}':<14}"
    return f"{left:<42}{elements:>26} {_dtype(call.dtype):<5} {_amount(size):>10}"


def _totals(run: DryRun) -> list[str]:
    rows = [("axis", "operation", "ranks", "calls", "sent by this rank")]
    for (axis, operation, ranks), (calls, sent) in totals(run).items():
        rows.append((axis, operation, f"{ranks:,}", f"{calls:,}", _amount(sent)))
    return ["totals of a step; a collective's bytes are those that a rank of a ring sends", *_table(rows, "llrrr")]


def _actions(run: DryRun) -> list[str]:
    lines = [f"actions of this rank, {len(run.actions):,} in a step"]
    runs = list(_runs(run.actions))
    for first, last in runs[:_ACTIONS]:
        ends = [f"receives {_words(first.receives)}"] if first.receives else []
        ends += [f"sends {_words(first.sends)}"] if first.sends else []
        lines.append(f"  {_title(first, last):<30}{'; '.join(ends)}".rstrip())
    if len(runs) > _ACTIONS:
        lines.append("  ...")
        first, last = runs[-1]
        lines.append(f"  {_title(first, last)} (--json has all actions)")
    if run.layout.pipeline > 1:
        step = run.layout.world_size // run.layout.pipeline
        lines.append(f"stage s of {run.layout.pipeline} begins at rank {step:,} s")
    return lines


def _runs(actions: Sequence[Acted]) -> Iterator[tuple[Acted, Acted]]:
    """Yield first and last of actions in a row that differ in their ascending microbatches only."""
    first = last = actions[0]
    for acted in actions[1:]:
        if (
            replace(acted, action=acted.action._replace(microbatch=0))
            == replace(last, action=last.action._replace(microbatch=0))
            and acted.action.microbatch == last.action.microbatch + 1
        ):
            last = acted
            continue
        yield first, last
        first = last = acted
    yield first, last


def _title(first: Acted, last: Acted) -> str:
    kind, microbatch, chunk = first.action
    until = f" to {last.action.microbatch}" if last is not first else ""
    return f"{kind.value} {microbatch}{until}{f' of chunk {chunk}' if chunk else ''}"


def _words(message: Message | None) -> str:
    return "" if message is None else f"{message.cargo}, stage {message.stage} (rank {message.rank:,})"


def _sizes(run: DryRun) -> dict[str, int]:
    layout = run.layout
    sizes = {axis: getattr(layout, axis) for axis in ("pipeline", "data", "context", "tensor")}
    sizes |= {"expert": layout.expert} if layout.expert > 1 else {}
    return {axis: size for axis, size in sizes.items() if axis != "context" or size > 1}


def _place(run: DryRun) -> dict[str, int]:
    at = run.layout.coordinates(run.rank)
    return {axis: getattr(at, axis) for axis in _sizes(run) if axis != "expert"}


def _range(layers: range) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _dtype(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return _NAMES.get(name, name)


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"


def _amount(size: int) -> str:
    for limit, unit in ((_GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= limit:
            return f"{size / limit:,.1f} {unit}"
    return f"{size} B"


def _call(call: Call) -> dict[str, Any]:
    own = {"operation": call.operation, "axis": call.axis, "ranks": call.ranks, "elements": call.elements}
    return {**own, "dtype": _dtype(call.dtype), "bytes": call.nbytes, "sent_bytes": call.sent}


def _message(message: Message | None) -> dict[str, Any] | None:
    return None if message is None else {"cargo": message.cargo, "stage": message.stage, "rank": message.rank}


def _table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Return rows in columns, each to the left or right side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            f"{cell:{'<' if side == 'l' else '>'}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return lines
