"""Pretraining, wired together: what each part is made of is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.checkpoint.manager import CheckpointManager
from megalm.checkpoint.manifest import STATE
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.load import dump_yaml
from megalm.config.ramps import samples_before, sequence_at
from megalm.config.run import RunConfig
from megalm.data.datasets import PreparedData, open_prepared
from megalm.data.loader import HeldOut, Loader
from megalm.data.sampler import GlobalOrder
from megalm.data.windows import Windows, all_windows
from megalm.distributed.collectives import agree
from megalm.distributed.communication_time import CommunicationClock
from megalm.distributed.mesh import ParallelMesh, world_group
from megalm.distributed.world import joined_mesh
from megalm.errors import CheckpointError, Interrupted
from megalm.models.build import DTYPES, build_executor, build_stage
from megalm.preflight.gate import preflight
from megalm.train.callbacks import Evaluate, LogMetrics, SaveCheckpoints, StopEarly
from megalm.train.compilation import TellOfCompilation, compile_blocks
from megalm.train.interruption import Interruption
from megalm.train.layer_statistics import LayerStatistics
from megalm.train.memory import Memory
from megalm.train.monitor import Peak, Throughput, count_parameters, flops_per_token, peak_flops
from megalm.train.optimizers import build_optimizer, freeze
from megalm.train.profiling import Profile
from megalm.train.recovery import GoBack
from megalm.train.replicas import CompareReplicas
from megalm.train.run_directory import RunDirectory, differing_settings, open_run
from megalm.train.run_facts import run_facts
from megalm.train.sinks import Sinks
from megalm.train.stragglers import NameStragglers
from megalm.train.tracking import Tracker
from megalm.train.trainer import Trainer, TrainState
from megalm.watchdog.watch import watched
from megalm.zero.build import build_engine, partitioner

_DEAD_LOCK_S = 180.0  # NFS gives a dead client's locks free after 90 s


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
        directory = _open_directory(config, data, mesh, fresh, _DEAD_LOCK_S if restarted else 0.0)
        try:
            if config.run.preflight:
                preflight(config, mesh, count_parameters(config.model, vocabulary(config, data)).total)
            memory = Memory(config, mesh)
            with CommunicationClock(mesh.device) as clock, memory.explained():
                _train(config, data, windows, mesh, clock, memory, directory, interruption)
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
    interruption: Interruption | None,
) -> None:
    run = Path(config.run.dir)
    vocab = vocabulary(config, data)
    model = build_stage(config, vocab, mesh, partitioner(config, mesh), data.end_of_text)
    freeze(config.optim, model.parameters())
    make_optimizer = partial(build_optimizer, config.optim, width_factor=config.model.width_factor, seed=config.seed)
    if config.train.compile:
        compile_blocks(config, model, mesh.device)
    engine = build_engine(config, model, mesh, make_optimizer, model.tied_weight)
    _claim(directory, data)
    manager = CheckpointManager(run, config.checkpoint.keep, dist.group.WORLD, _describe(config, mesh))
    order = GlobalOrder(len(windows), order_seed(config))
    loader = Loader(data.train, windows, order, mesh.coordinates.data, mesh.size("data"))
    executor = build_executor(config, engine.module, mesh)
    trainer = Trainer(config, mesh, executor, engine, loader, TrainState(), clock)
    facts = {
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
        "config": config.model_dump(mode="json"),
    }
    reader = manager.latest()
    if reader is not None:
        with closing(reader):
            _resume(trainer, reader, facts)
    peak = peak_flops(mesh.device, DTYPES[config.precision])
    meter = _meter(config, vocab, mesh, peak)
    sinks = Sinks(config.log.sinks, run, trainer.state.step, config) if mesh.rank == 0 else None
    tracker = Tracker(run, trainer.state.step, trainer.last_step, active=mesh.rank == 0, sinks=sinks)
    with closing(tracker):
        tracker.header(dump_yaml(config), run_facts(config, data, windows, vocab, mesh, peak))
        if reader is not None:
            tracker.note(f"resuming {reader.directory} at step {trainer.state.step}")
        held_out_windows = all_windows(data.validation, config.model.sequence, config.data.rows)
        held_out = HeldOut(data.validation, held_out_windows, config.evaluate.sequences)
        evaluate = Evaluate(tracker, meter, model, held_out, data.tokenizer().byte_lengths, config.evaluate.every)
        stop_early = StopEarly(tracker, evaluate, config.early_stop)
        compare = CompareReplicas(config.run.compare_replicas_every)
        every, last = config.checkpoint.every, config.checkpoint.at_end
        save = SaveCheckpoints(tracker, meter, manager, facts, compare, every, last)
        save.saved_step = trainer.state.step if reader is not None else -1
        meter.start(trainer.state.step)
        log = LogMetrics(tracker, meter, memory, config.log.every)
        recovery = GoBack(tracker, meter, manager, save, partial(_resume, facts=facts))
        stragglers = NameStragglers(tracker, config.run.compare_speed_every, mesh, run)
        memory.begin(engine, tracker)
        compilation = TellOfCompilation(tracker, meter)
        layers = LayerStatistics(config, mesh, model, trainer.state.step)
        with closing(Profile(run, config.profile, mesh, tracker, meter)) as profile, compilation as tell:
            trainer.before_step = [layers.before_step, memory.before_step, profile.before_step]
            trainer.before_update = [layers.before_update, memory.before_update]
            habits = (layers, profile, memory, log, tell, stragglers, compare, evaluate, stop_early, save)
            interrupted = trainer.fit(habits, interruption, recovery)
        for line in engine.report():
            tracker.note(line)
    if interrupted is not None:
        raise Interrupted(
            f"{interrupted.name}: saved at step {trainer.state.step} of {trainer.last_step}; start again to go on"
        )


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
    config: RunConfig, data: PreparedData, mesh: ParallelMesh, fresh: bool, patience_s: float
) -> RunDirectory | None:
    """Open the run's directory on rank 0; all ranks fail together."""
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
                patience_s,
            )
        except Exception as caught:
            error = caught
    try:
        agree(error, world_group())
    except BaseException:
        if directory is not None:
            directory.close()
        raise
    return directory


def _claim(directory: RunDirectory | None, data: PreparedData) -> None:
    """Write what the run is into its directory, the tokenizer beside it, on rank 0; all ranks fail together."""
    error = None
    if directory is not None:
        try:
            directory.claim()
            data.tokenizer().save(directory.path)
        except Exception as caught:
            error = caught
    agree(error, world_group())


def _resume(trainer: Trainer, reader: CheckpointReader, facts: Mapping[str, Any]) -> None:
    """Set weights, optimizer and progress from a checkpoint of the same run, data and tokenizer."""
    try:
        _refuse_another_run(trainer.config, reader, facts)
        progress = TrainState(**reader.state["progress"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{reader.directory / STATE}: not the state of a run ({type(error).__name__}: {error}); "
            "delete this checkpoint to resume from an older one, or restore it from a copy"
        ) from error
    kinds = [kind for kind in reader.kinds() if kind != "weight"]
    trainer.state = progress
    trainer.engine.load(reader.read_flat, kinds, trainer.state.updates)
    trainer.engine.module.further_sums.zero_()  # type: ignore[operator]


def _refuse_another_run(config: RunConfig, reader: CheckpointReader, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a checkpoint of other data, another tokenizer or other fixed settings, with both."""
    for name in ("data_fingerprint", "tokenizer_fingerprint"):
        if reader.state[name] != facts[name]:
            raise CheckpointError(
                f"{reader.directory} was trained with {name} {reader.state[name][:12]}, data.path has "
                f"{facts[name][:12]}; give the data it was trained with, or another run.dir"
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
