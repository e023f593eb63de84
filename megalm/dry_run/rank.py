"""One rank of any layout, built and stepped on the meta device: shapes, memory and messages without numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megalm.config.ramps import rows_of_rank
from megalm.config.run import RunConfig
from megalm.distributed.layout import Axis, RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.progress import progress
from megalm.dry_run.recording import Call, Names, Recorder
from megalm.dry_run.stated import Stated
from megalm.dry_run.world import pretended_mesh
from megalm.models.build import DTYPES, build_executor, build_stage
from megalm.models.transformer import StagePlan, Transformer
from megalm.nn.masks import DropoutKeys
from megalm.pipeline_parallel.actions import Action, ActionKind, Schedule
from megalm.pipeline_parallel.executor import Microbatch
from megalm.pipeline_parallel.schedules import SCHEDULES
from megalm.train.experts import ExpertBalance
from megalm.train.optimizers import freeze
from megalm.zero.engine import replicas_of, shard_of

_PASSES = {
    ActionKind.FORWARD: ("forward",),
    ActionKind.BACKWARD: ("backward", "weight gradient"),
    ActionKind.INPUT_GRADIENT: ("input gradient",),
    ActionKind.WEIGHT_GRADIENT: ("weight gradient",),
}
"""The pieces of work that an action consists of, as the executor names them."""


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
    most_live: int
    """The most microbatches, each chunk counted, that were between forward and backward."""
    message: Call | None
    """What travels between two stages, as it is received."""
    actions: list[Acted]
    work: dict[tuple[str, int], list[Call]]
    """The collectives of a microbatch, by piece of work and chunk."""
    begin: list[Call] = field(default_factory=list)
    reduce: list[Call] = field(default_factory=list)
    update: list[Call] = field(default_factory=list)
    after: list[Call] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    unstated: list[str] = field(default_factory=list)

    def calls_of(self, action: Action) -> list[Call]:
        """Return the collectives of an action."""
        return [call for name in self.names_of(action) for call in self.work[name, action.chunk]]

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
        executed = count if every else _enough(lambda n: kind(parallel.pipeline, n, chunks), stage, count)
        watch = _step(config, model, mesh, stated, executed)
        return DryRun(
            config, layout, rank, vocab, model.plan, list(model.parameters()),
            microbatches=count,
            executed=executed,
            held=stated.held(),
            in_host=stated.in_host(),
            buffers=stated.buffers(),
            activations=watch.recorder.peak,
            peak_at=watch.recorder.peak_where,
            most_live=most_live(schedule, stage),
            message=watch.message,
            actions=[_acted(schedule, mesh, action) for action in schedule.actions(stage)],
            work=watch.seen,
            begin=stated.begin(),
            reduce=stated.reduce(),
            update=stated.update(),
            after=stated.after(),
            assumed=stated.assumed(),
            unstated=stated.unstated(),
        )  # fmt: skip


def most_live(schedule: Schedule, stage: int) -> int:
    """Return the most microbatches, each chunk counted, that a stage has begun and not ended."""
    live = most = 0
    for action in schedule.actions(stage):
        if action.kind is ActionKind.FORWARD:
            live += 1
            most = max(most, live)
        elif action.kind is not ActionKind.INPUT_GRADIENT:
            live -= 1
    return most


def _enough(make: Callable[[int], Schedule], stage: int, count: int) -> int:
    """Return how many microbatches hold as much as `count` do.

    The fewest of which as many live at once, and so many more that links are as full as they become (sent tensors are
    held until the neighbour has taken them) while a message for a further microbatch is waited for.
    """
    most, fewest, enough = most_live(make(count), stage), 1, count
    while fewest < enough:
        middle = (fewest + enough) // 2
        if most_live(make(middle), stage) == most:
            enough = middle
        else:
            fewest = middle + 1
    return min(count, enough + make(enough).most_in_flight + 2)


def _step(config: RunConfig, model: Transformer, mesh: ParallelMesh, stated: Stated, microbatches: int) -> _Watch:
    """Run forwards and backwards of a step and return what was seen of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows, tokens = config.train.micro_batch, config.model.sequence
    tokens_BT = torch.empty(rows, tokens, dtype=torch.int64, device=mesh.device)
    mask_BT = torch.empty(rows, tokens, dtype=torch.bool, device=mesh.device)
    dropout = DropoutKeys(config.seed, 0, 0) if config.model.draws_masks else None
    gradients = _Gradients(trained, stated)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    known += [router.seen for router in model.routers.values()]
    watch = _Watch(Recorder(Names(mesh), [*known, tokens_BT, mask_BT]), gradients)
    executor = build_executor(config, model, mesh)
    batch = Microbatch(tokens_BT, tokens_BT, mask_BT, dropout)
    scale = torch.ones((), dtype=torch.float64, device=mesh.device)
    experts = ExpertBalance(config, mesh, model)
    experts.begin(scale)
    before, progress.observer = progress.observer, watch
    try:
        with watch.recorder:
            executor.run([batch] * microbatches, scale, gradients.microbatch_done)
    finally:
        progress.observer = before
    experts.end()
    return watch


class _Gradients:
    """Does with gradients as they come what the engine of the recipe's ZeRO stage does, as far as it takes memory."""

    def __init__(self, trained: Sequence[nn.Parameter], stated: Stated) -> None:
        self.stated = stated
        self._trained = trained
        self._arrived: list[Tensor] = []
        self._filled: Counter[Axis] = Counter()
        stage, narrow = stated.stage, DTYPES[stated.config.precision] is not stated.wide
        self._waits = stage == 0 and narrow
        for parameter in trained:
            if stage < 2 and not narrow:  # sums are kept in the parameters' own gradients
                parameter.grad = torch.zeros_like(parameter)
            elif stage > 0:
                parameter.register_post_accumulate_grad_hook(self._take)
            if stage == 2:
                parameter.register_post_accumulate_grad_hook(self._arrived.append)

    def take_calls(self) -> list[Call]:
        """Return what is sent for the gradients that came since the last call of this."""
        calls = self.stated.microbatch(self._arrived)
        self._arrived.clear()
        return calls

    def microbatch_done(self) -> None:
        """Do what `ZeroEngine.microbatch_done` does."""
        self._flush()
        for parameter in self._trained if self._waits else ():
            parameter.grad = None

    def _take(self, parameter: Tensor) -> None:
        """Add a gradient to its sum, which takes a wide copy of it, or under stage 2 to the bucket."""
        assert parameter.grad is not None
        if self.stated.stage != 2:
            parameter.grad.to(self.stated.wide)
        else:
            if self._filled.total() + parameter.numel() > self.stated.bucket:
                self._flush()
            self._filled[replicas_of(shard_of(parameter))] += parameter.numel()
        parameter.grad = None

    def _flush(self) -> None:
        """Reduce the bucket: DeepSpeed makes a tensor for each group of ranks, then what travels of it."""
        for size in self._filled.values():
            dtype = DTYPES[self.stated.config.precision]
            torch.empty(size, dtype=dtype, device="meta").to(self.stated.travelling)
        self._filled.clear()


class _Watch:
    """Hears of the executor's pieces of work (an Observer of `progress`) and keeps what each of them sends.

    Pieces of the same kind and chunk must send alike in every microbatch: that makes what some of them do true for all.
    """

    def __init__(self, recorder: Recorder, gradients: _Gradients) -> None:
        self.recorder, self.gradients = recorder, gradients
        self.seen: dict[tuple[str, int], list[Call]] = {}
        self.message: Call | None = None

    def phase(self, name: str) -> None:
        """See a phase of a step begin."""

    @contextmanager
    def work(self, kind: str, what: object) -> Iterator[None]:
        """See a piece of work: what is sent in it are collectives, between pieces messages."""
        recorder, chunk = self.recorder, str(what).partition(" of chunk ")[2]
        recorder.where = f"{kind} of microbatch {what}"
        for message in recorder.take():
            self.message = self.message or message
        yield
        calls = [*recorder.take(), *self.gradients.take_calls()]
        before = self.seen.setdefault((kind, int(chunk or 0)), calls)
        assert before == calls, f"{recorder.where} sends {calls}, and another microbatch {before}"


def _acted(schedule: Schedule, mesh: ParallelMesh, action: Action) -> Acted:
    stage = mesh.coordinates.pipeline
    is_forward = action.kind is ActionKind.FORWARD
    ends: list[Message | None] = []
    for end in (schedule.source(stage, action), schedule.target(stage, action)):
        other = None if end is None or end[0] == stage else end[0]
        cargo = "activation" if is_forward else "gradient"
        ends.append(None if other is None else Message(other, mesh.stage_rank(other), cargo))
    return Acted(action, *ends)
