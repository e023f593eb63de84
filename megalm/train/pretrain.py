"""Pretraining, wired together: what each part is made of is decided here and nowhere else."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.checkpoint.manager import PATIENCE_S, CheckpointManager
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.retention import Keep
from megalm.config.load import dump_yaml
from megalm.config.ramps import samples_before, sequence_at
from megalm.config.run import RunConfig
from megalm.data.datasets import PreparedData, open_prepared
from megalm.data.loader import HeldOut, Loader
from megalm.data.sampler import GlobalOrder
from megalm.data.windows import Windows, all_windows
from megalm.distributed import launch
from megalm.distributed.collectives import agree
from megalm.distributed.communication_time import CommunicationClock
from megalm.distributed.exchange import broadcast_json, together
from megalm.distributed.meeting import Meeting
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.world import joined_mesh
from megalm.errors import CheckpointError, DistributedError, Interrupted, UserError
from megalm.models.build import DTYPES, build_executor, build_stage
from megalm.models.huggingface.companions import companions_of
from megalm.models.transformer import Transformer
from megalm.preflight.gate import preflight
from megalm.train.callbacks import Evaluate, LogMetrics, StopEarly
from megalm.train.compilation import TellOfCompilation, compile_blocks
from megalm.train.continuing import changes, continued, load_all, progress_of
from megalm.train.interruption import Interruption
from megalm.train.layer_statistics import LayerStatistics
from megalm.train.memory import Memory
from megalm.train.monitor import Peak, Throughput, count_parameters, flops_per_token, peak_flops
from megalm.train.optimizers import build_optimizer, freeze
from megalm.train.profiling import Profile
from megalm.train.recovery import GoBack, tell_of_damaged
from megalm.train.replicas import CompareReplicas
from megalm.train.run_directory import RunDirectory, open_run
from megalm.train.run_facts import run_facts
from megalm.train.run_identity import differing_settings
from megalm.train.saving import SaveCheckpoints
from megalm.train.sinks import Sinks
from megalm.train.start import check_start, notes, set_start
from megalm.train.stragglers import NameStragglers
from megalm.train.tracking import Tracker
from megalm.train.trainer import Trainer, TrainState
from megalm.watchdog.watch import watched
from megalm.zero.build import build_engine, partitioner
from megalm.zero.engine import ZeroEngine


def train(
    config: RunConfig, fresh: bool = False, interruption: Interruption | None = None, restarted: bool = False
) -> None:
    """Train this rank of the recipe's run, from its newest checkpoint if there is one and `fresh` is false.

    Every rank of the world calls. Recipe and data are checked before any group is formed; what only rank 0
    finds out is raised on all ranks. `restarted`: the launcher starts the job again, perhaps after a node's death,
    whose lock on the run's directory may outlive it for a while. Raises Interrupted, with the run saved, where a
    signal came before the end.
    """
    data = open_prepared(config.data.path)
    windows = data.windows(config.model.sequence, config.data.rows)
    config = config.with_windows(len(windows))
    with watched(config.run.hang_timeout_s) as join, joined_mesh(config) as mesh:
        join()
        directory, fresh = _open_directory(config, data, mesh, fresh, restarted)
        try:
            if config.run.preflight:
                preflight(config, mesh, count_parameters(config.model, vocabulary(config, data)).total)
            memory = Memory(config, mesh)
            with CommunicationClock(mesh.device) as clock, memory.explained():
                _train(config, data, windows, mesh, clock, memory, directory, fresh, interruption)
        finally:
            if directory is not None:
                directory.close()


def _train(
    config: RunConfig,
    data: PreparedData,
    windows: Windows,
    mesh: ParallelMesh,
    clock: CommunicationClock,
    memory: Memory,
    directory: RunDirectory | None,
    fresh: bool,
    interruption: Interruption | None,
) -> None:
    vocab = vocabulary(config, data)
    model = build_stage(config, vocab, mesh, partitioner(config, mesh), data.end_of_text)
    freeze(config.optim, model.parameters())
    make_optimizer = partial(build_optimizer, config.optim, width_factor=config.model.width_factor, seed=config.seed)
    if config.train.compile:
        compile_blocks(model)
    engine = build_engine(config, model, mesh, make_optimizer, model.tied_weight)
    with _saving(config, mesh, directory) as manager:
        load = partial(_load, config, data, engine)
        reader = None if fresh else manager.latest(load)
        recipe, config = config, config if reader is None else _continued(config, reader)
        order = GlobalOrder(len(windows), order_seed(config))
        loader = Loader(data.train, windows, order, mesh.coordinates.data, mesh.size("data"))
        executor = build_executor(config, engine.module, mesh)
        state = TrainState() if reader is None else progress_of(reader)
        trainer = Trainer(config, mesh, executor, engine, loader, state, clock)
        starts_from = config.train.init_from if reader is None else None
        begins = [] if starts_from is None else _start(config, data, trainer, directory)
        _claim(directory, data, starts_from)
        interrupted = _fit(recipe, trainer, model, data, windows, memory, manager, reader, load, begins, interruption)
    if interrupted is not None:
        raise Interrupted(
            f"{interrupted.name}: saved at step {trainer.state.step} of {trainer.last_step}; start again to go on"
        )


def _fit(
    recipe: RunConfig,
    trainer: Trainer,
    model: Transformer,
    data: PreparedData,
    windows: Windows,
    memory: Memory,
    manager: CheckpointManager,
    reader: CheckpointReader | None,
    load: Callable[[CheckpointReader], None],
    begins: Sequence[str],
    interruption: Interruption | None,
) -> signal.Signals | None:
    """Train, with all that happens after a step; return what interrupted it.

    `reader` is what was loaded, if anything was, and `load` does that again, to go back. `begins` are lines on where
    the first weights come from.
    """
    config, mesh, engine = trainer.config, trainer.mesh, trainer.engine
    run, vocab = Path(config.run.dir), vocabulary(config, data)
    facts = {
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "config": recipe.model_dump(mode="json"),
    }
    peak = peak_flops(mesh.device, DTYPES[config.precision])
    meter = _meter(config, vocab, mesh, peak)
    with together(world_group()):
        sinks = Sinks(config.log.sinks, run, trainer.state.step, config) if mesh.rank == 0 else None
        tracker = Tracker(run, trainer.state.step, trainer.last_step, active=mesh.rank == 0, sinks=sinks)
    with closing(tracker):
        tracker.header(dump_yaml(recipe), run_facts(config, data, windows, vocab, mesh, peak, trainer.state))
        if reader is not None:
            _tell_of_resume(tracker, manager, reader, recipe, mesh)
        for line in begins:
            tracker.note(line)
        held_out_windows = all_windows(data.validation, config.model.sequence, config.data.rows)
        held_out = HeldOut(data.validation, held_out_windows, config.evaluate.sequences)
        evaluate = Evaluate(tracker, meter, model, held_out, data.tokenizer().byte_lengths, config.evaluate.every)
        stop_early = StopEarly(tracker, evaluate, config.early_stop)
        compare = CompareReplicas(config.run.compare_replicas_every)
        meter.start(trainer.state.step)
        log = LogMetrics(tracker, meter, memory, config.log.every)
        save = SaveCheckpoints(tracker, meter, manager, facts, compare, config.checkpoint, log, evaluate)
        log.sources.append(save.figures)
        if reader is not None:
            save.resumed(reader)
        recovery = GoBack(tracker, meter, manager, save, load)
        stragglers = NameStragglers(tracker, config.run.compare_speed_every, mesh, run)
        memory.begin(engine, tracker)
        compilation = TellOfCompilation(tracker, meter)
        layers = LayerStatistics(config, mesh, model, trainer.state.step)
        by_hand = nullcontext() if interruption is None else interruption.by_hand(tell=mesh.rank == 0)
        with closing(Profile(run, config.profile, mesh, tracker, meter)) as profile, compilation as tell, by_hand:
            trainer.before_step = [layers.before_step, memory.before_step, profile.before_step]
            trainer.before_update = [layers.before_update, memory.before_update, save.before_update]
            habits = (layers, profile, memory, log, tell, stragglers, compare, evaluate, stop_early, save)
            interrupted = trainer.fit(habits, interruption, recovery)
        for line in engine.report():
            tracker.note(line)
    return interrupted


@contextmanager
def _saving(config: RunConfig, mesh: ParallelMesh, directory: RunDirectory | None) -> Iterator[CheckpointManager]:
    """Give the run's checkpoints; a save that is on its way at an error is let end, unless a peer is gone."""
    section = config.checkpoint
    keep = Keep(section.keep, section.keep_every, section.keep_best)
    meeting = Meeting.of_world("checkpoint") if mesh.layout.world_size > 1 and section.asynchronous else None
    layout = _describe(config, mesh)
    saved = None if directory is None else directory.note_saved
    manager = CheckpointManager(Path(config.run.dir), keep, dist.group.WORLD, layout, meeting=meeting, saved=saved)
    try:
        yield manager
    except Exception as error:
        manager.close(0.0 if isinstance(error, DistributedError) or launch.is_lost_peer(error) else PATIENCE_S)
        raise


def _continued(config: RunConfig, reader: CheckpointReader) -> RunConfig:
    """Return the recipe from the checkpoint on. The ranks have the same of both, and raise alike."""
    return continued(config, progress_of(reader), reader.directory)


def _tell_of_resume(
    tracker: Tracker, manager: CheckpointManager, reader: CheckpointReader, recipe: RunConfig, mesh: ParallelMesh
) -> None:
    """Say where the run goes on, which checkpoints were damaged, and every setting that is another than before."""
    tell_of_damaged(tracker, manager, reader.step)
    tracker.note(f"resuming {reader.directory} at step {reader.step}")
    changed = changes(reader.state["config"], recipe.model_dump(mode="json"))
    ranks = reader.layout.get("data"), mesh.layout.data
    if ranks[0] != ranks[1]:
        changed["data ranks"] = f"{ranks[0]} -> {ranks[1]}"
    if changed:
        tracker.event({"step": reader.step, "event": "settings changed", **changed})


def _meter(config: RunConfig, vocab: int, mesh: ParallelMesh, peak: Peak) -> Throughput:
    return Throughput(
        tokens_before=lambda step: samples_before(config, step) * config.model.sequence,
        flops_per_token=lambda step: flops_per_token(config.model, vocab, sequence_at(config, step)),
        world_size=mesh.layout.world_size,
        peak=peak,
    )


def vocabulary(config: RunConfig, data: PreparedData) -> int:
    """Return the model's vocabulary: the recipe's, or else the tokenizer's."""
    return config.model.vocab or data.vocabulary


def order_seed(config: RunConfig) -> int:
    """Return the seed of the order of samples."""
    return config.seed if config.data.seed is None else config.data.seed


def _open_directory(
    config: RunConfig, data: PreparedData, mesh: ParallelMesh, fresh: bool, restarted: bool
) -> tuple[RunDirectory | None, bool]:
    """Return the run's directory, opened on rank 0, and whether it begins anew there; all ranks fail together."""
    directory, error = None, None
    if mesh.rank == 0:
        try:
            directory = open_run(
                config,
                data.fingerprint,
                data.tokenizer_fingerprint,
                mesh.layout.world_size,
                count_parameters(config.model, vocabulary(config, data)).total,
                fresh,
                restarted,
            )
        except Exception as caught:
            error = caught
    try:
        agree(error, world_group())
    except BaseException:
        if directory is not None:
            directory.close()
        raise
    return directory, bool(broadcast_json(directory is not None and directory.fresh, world_group()))


def _claim(directory: RunDirectory | None, data: PreparedData, starts_from: str | None) -> None:
    """Write what the run is into its directory, the tokenizer beside it, on rank 0; all ranks fail together."""
    with together(world_group()):
        if directory is not None:
            tokenizer = data.tokenizer()
            directory.claim({} if starts_from is None else companions_of(Path(starts_from), tokenizer))
            tokenizer.save(directory.path)


def _start(config: RunConfig, data: PreparedData, trainer: Trainer, directory: RunDirectory | None) -> list[str]:
    """Set the weights from `train.init_from`; all ranks fail together. Return what is to be said of it, in lines."""
    vocab = vocabulary(config, data)
    with together(world_group()):
        if directory is not None:
            directory.check_source()
        source = check_start(config, vocab, None if directory is None else data.tokenizer())
    with closing(source):
        set_start(config, trainer.engine, source)
        return notes(config, source)


def _load(config: RunConfig, data: PreparedData, engine: ZeroEngine, reader: CheckpointReader) -> None:
    """Set weights and optimizer from a checkpoint of the same run, data and tokenizer; see `latest_checkpoint`."""
    try:
        _refuse_another_run(_continued(config, reader), data, reader)
    except UserError:
        with together(world_group()):
            if dist.get_rank() == 0:
                reader.verify_files()  # what is damaged is passed over, whatever it says
        raise
    load_all(engine, reader)


def _refuse_another_run(config: RunConfig, data: PreparedData, reader: CheckpointReader) -> None:
    """Raise CheckpointError for a checkpoint of other data, another tokenizer or other fixed settings, with both."""
    here = {"data_fingerprint": data.fingerprint, "tokenizer_fingerprint": data.tokenizer_fingerprint}
    for name, fingerprint in here.items():
        found = str(reader.state.get(name))
        if found != fingerprint:
            raise CheckpointError(
                f"{reader.directory} was trained with {name} {found[:12]}, data.path has "
                f"{fingerprint[:12]}; give the data it was trained with, or another run.dir"
            )
    differences = differing_settings(reader.state.get("config", {}), config)
    if differences:
        raise CheckpointError(
            f"{reader.directory} is of another run: {'; '.join(differences)}; take it out of this run's directory"
        )


def _describe(config: RunConfig, mesh: ParallelMesh) -> dict[str, Any]:
    """Return the layout that a checkpoint notes for people to read."""
    layout = mesh.layout
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "context": layout.context,
        "expert": layout.expert,
        "zero_stage": config.zero.stage,
        "precision": config.precision,
    }
