"""One rank of any layout, built and stepped on the meta device: shapes, memory and messages without numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from megalm.config.ramps import rows_of_rank
from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import progress
from megalm.dry_run.engines import Engine, pretended_engine
from megalm.dry_run.recording import Call, Names, Recorder
from megalm.dry_run.stated import Stated
from megalm.dry_run.world import pretended_mesh
from megalm.models.build import build_executor, build_stage
from megalm.models.transformer import StagePlan
from megalm.nn.masks import DropoutKeys
from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule
from megalm.pipeline_parallel.drawing import step_cost
from megalm.pipeline_parallel.executor import Microbatch
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.pipeline_parallel.simulator import peak_live
from megalm.train.experts import ExpertBalance
from megalm.train.optimizers import freeze

_PASSES = {
    ActionKind.FORWARD: ("forward",),
    ActionKind.BACKWARD: ("backward", "weight gradient", "reduction"),
    ActionKind.INPUT_GRADIENT: ("input gradient",),
    ActionKind.WEIGHT_GRADIENT: ("weight gradient",),
}
"""The pieces of work that an action consists of, as the executor names them, and what DeepSpeed's stage 3 does then."""

_NOTED = 3
"""Microbatches after which DeepSpeed's stage 3 knows in which order weights are used; in a run, those of its begin."""


@dataclass(frozen=True)
class Message:
    """What an action waits for, or passes on, from and to another pipeline stage."""

    stage: int
    rank: int
    cargo: str


@dataclass(frozen=True)
class Acted:
    """An action of the schedule with its messages; what it sends beside them is `DryRun.work`."""

    action: Action
    receives: Message | None
    sends: Message | None


@dataclass(frozen=True)
class DryRun:
    """What one rank of a layout is and does in a step."""

    config: RunConfig
    layout: RankLayout
    rank: int
    vocab: int
    plan: StagePlan
    parameters: list[nn.Parameter]
    microbatches: int
    executed: int
    """Microbatches that were run for the peak; the others change nothing."""
    held: dict[str, int]
    in_host: list[str]
    buffers: int
    """Bytes of DeepSpeed's buckets."""
    activations: int
    """The largest sum of bytes that were there beside `held` and `buffers` during forwards and backwards."""
    peak_at: str
    offloaded: int
    """The largest sum of bytes that waited in the host's memory for their backward pass, beside `activations`."""
    most_live: int
    """The most microbatches, each chunk counted, that were between forward and backward."""
    bubble: float
    """The share of a step that the stages wait, where a backward takes twice as long as a forward, messages no time."""
    message: Call | None
    """What travels between two stages, as it is received."""
    actions: list[Acted]
    work: dict[tuple[str, int], list[Call]]
    """The collectives of a microbatch, by piece of work and chunk."""
    first: dict[tuple[str, int], list[Call]] = field(default_factory=dict)
    """Those of a step's first microbatch, where they are others."""
    begin: list[Call] = field(default_factory=list)
    reduce: list[Call] = field(default_factory=list)
    update: list[Call] = field(default_factory=list)
    after: list[Call] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    unstated: list[str] = field(default_factory=list)

    def calls_of(self, action: Action) -> list[Call]:
        """Return the collectives of an action."""
        work = self.work if action.microbatch else {**self.work, **self.first}
        return [call for name in self.names_of(action) for call in work[name, action.chunk]]

    def names_of(self, action: Action) -> list[str]:
        """Return the pieces of work that an action consists of, by their names in `work`."""
        return [name for name in _PASSES[action.kind] if (name, action.chunk) in self.work]


def run_rank(config: RunConfig, layout: RankLayout, rank: int, vocab: int, every: bool = False) -> DryRun:
    """Return what `rank` of the layout is and does in a step with the whole batch and whole sequences.

    With thousands of microbatches only as many are run as it takes to hold the most activations (all with `every`).
    """
    with pretended_mesh(layout, rank) as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames collectives
        model = build_stage(config, vocab, mesh, document_start=0)
        freeze(config.optim, model.parameters())
        stated = Stated(config, model, mesh, model.tied_weight)
        parallel, stage = config.parallel, mesh.coordinates.pipeline
        kind = SCHEDULES.get(parallel.schedule)
        chunks = kind.fixed_chunks or parallel.virtual_stages
        count = rows_of_rank(config, config.train.global_batch, mesh.size("data")) // config.train.micro_batch
        schedule = kind(parallel.pipeline, count, chunks)
        bubble = step_cost(kind, parallel.pipeline, count, chunks)[1].bubble
        executed = count if every else _enough(lambda n: kind(parallel.pipeline, n, chunks), stage, count)
        with pretended_engine(config, model, mesh, stated, vocab, executed) as engine:
            watch = _step(config, engine, mesh, executed)
            buffers, offload = engine.buffers(), engine.module.offload
        return DryRun(
            config, layout, rank, vocab, model.plan, list(model.parameters()),
            microbatches=count,
            executed=executed,
            held=stated.held(),
            in_host=stated.in_host(),
            buffers=buffers,
            activations=watch.recorder.peak,
            peak_at=watch.recorder.peak_where,
            offloaded=0 if offload is None else offload.host_bytes.peak,
            most_live=int(peak_live(schedule.actions(stage))),
            bubble=bubble,
            message=watch.message,
            actions=[_acted(schedule, mesh, action) for action in schedule.actions(stage)],
            work=watch.seen,
            first=watch.first,
            begin=stated.begin(),
            reduce=stated.reduce(),
            update=[*stated.update(), *watch.updated, *stated.loads()],
            after=stated.after(),
            assumed=stated.assumed(),
            unstated=stated.unstated(),
        )  # fmt: skip


def _enough(make: Callable[[int], Schedule], stage: int, count: int) -> int:
    """Return how many microbatches hold as much as `count` do.

    The fewest of which as many live at once, and so many more that links are as full as they become (sent tensors are
    held until the neighbour has taken them) while a message for a further microbatch is waited for.
    """
    most, fewest, enough = peak_live(make(count).actions(stage)), 1, count
    while fewest < enough:
        middle = (fewest + enough) // 2
        if peak_live(make(middle).actions(stage)) == most:
            enough = middle
        else:
            fewest = middle + 1
    return min(count, enough + make(enough).most_in_flight + 2)


def _step(config: RunConfig, engine: Engine, mesh: ParallelMesh, microbatches: int) -> _Watch:
    """Run forwards and backwards of a step and return what was seen of them."""
    rows, tokens = config.train.micro_batch, config.model.sequence
    tokens_BT = torch.empty(rows, tokens, dtype=torch.int64, device=mesh.device)
    mask_BT = torch.empty(rows, tokens, dtype=torch.bool, device=mesh.device)
    dropout = DropoutKeys(config.seed, 0, 0) if config.model.draws_masks else None
    batch = Microbatch(tokens_BT, tokens_BT, mask_BT, dropout)
    scale = torch.ones((), dtype=torch.float64, device=mesh.device)
    executor = build_executor(config, engine.module, mesh)
    experts = ExpertBalance(config, mesh, engine.module)
    experts.begin(scale)
    notes = config.zero.stage == 3
    if notes:
        executor.run([batch] * _NOTED, scale, engine.microbatch_done)
        engine.weights_updated()
    seen = [router.seen for router in engine.module.routers.values()]
    known = [*engine.held(), *engine.module.buffers(), *seen, tokens_BT, mask_BT]
    watch = _Watch(Recorder(Names(mesh), known), engine, first_differs=notes)
    before, progress.observer = progress.observer, watch
    try:
        with watch.recorder:
            executor.run([batch] * microbatches, scale, watch.microbatch_done)
            watch.recorder.take()
            peak = watch.recorder.peak, watch.recorder.peak_where
            engine.weights_updated()
            watch.updated = watch.recorder.take()
            watch.recorder.peak, watch.recorder.peak_where = peak
    finally:
        progress.observer = before
    experts.end()
    watch.end()
    return watch


class _Watch:
    """Hears of the executor's pieces of work (an Observer of `progress`) and keeps what each of them sends.

    Pieces of the same kind and chunk must send alike in every microbatch: that makes what some of them do true for all.
    Only the first one of a step may differ under DeepSpeed's stage 3, which has divided all weights before.
    """

    def __init__(self, recorder: Recorder, engine: Engine, first_differs: bool) -> None:
        self.recorder, self.engine, self._first_differs = recorder, engine, first_differs
        self.seen: dict[tuple[str, int], list[Call]] = {}
        self.first: dict[tuple[str, int], list[Call]] = {}
        self.updated: list[Call] = []
        self._microbatch = 0
        self.message: Call | None = None

    def phase(self, name: str) -> None:
        """See a phase of a step begin."""

    @contextmanager
    def work(self, kind: str, what: object) -> Iterator[None]:
        """See a piece of work: what is sent in it are collectives, between pieces messages."""
        recorder, (microbatch, _, chunk) = self.recorder, str(what).partition(" of chunk ")
        self._microbatch = int(microbatch)
        recorder.where = f"{kind} of microbatch {what}"
        self._take_messages()
        yield
        self._note(kind, int(chunk or 0), [*recorder.take(), *self.engine.take_calls()])

    def microbatch_done(self) -> None:
        """See the engine take in a microbatch's gradients."""
        self._take_messages()
        self.engine.microbatch_done()
        if calls := self.recorder.take():
            self._note("reduction", 0, calls)

    def _take_messages(self) -> None:
        for message in self.recorder.take():
            self.message = self.message or message

    def _note(self, kind: str, chunk: int, calls: list[Call]) -> None:
        seen = self.first if self._microbatch == 0 and self._first_differs else self.seen
        before = seen.setdefault((kind, chunk), calls)
        assert before == calls, f"{self.recorder.where} sends {calls}, and another microbatch {before}"

    def end(self) -> None:
        """Keep of the first microbatch what differs from the others."""
        self.seen = {**self.first, **self.seen}
        self.first = {key: calls for key, calls in self.first.items() if calls != self.seen[key]}


def _acted(schedule: Schedule, mesh: ParallelMesh, action: Action) -> Acted:
    stage = mesh.coordinates.pipeline
    is_forward = action.kind is ActionKind.FORWARD
    ends: list[Message | None] = []
    for end in (schedule.source(stage, action), schedule.target(stage, action)):
        other = None if end is None or end[0] == stage else end[0]
        cargo = "activation" if is_forward else "gradient"
        ends.append(None if other is None else Message(other, mesh.stage_rank(other), cargo))
    return Acted(action, *ends)
