"""What the console says of a run at its start, beside its recipe: what follows from recipe, data and layout."""

from __future__ import annotations

from megalm.config.ramps import ramp_steps, rows_of_rank, samples_before, sequence_steps
from megalm.config.run import RunConfig
from megalm.config.storage import muon_parameters
from megalm.data.datasets import PreparedData
from megalm.data.windows import Windows, predicted_tokens
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.train.monitor import Peak, count_parameters
from megalm.train.tracking import format_count
from megalm.train.trainer import TrainState


def run_facts(
    config: RunConfig,
    data: PreparedData,
    windows: Windows,
    vocab: int,
    mesh: ParallelMesh,
    peak: Peak,
    done: TrainState,
) -> list[tuple[str, str]]:
    """Return names and values, in the order in which they are shown; `done` is how far the run has come."""
    layout = mesh.layout
    parameters = count_parameters(config.model, vocab)
    return [
        ("parameters", f"{parameters.total:,} (vocabulary {vocab})"),
        *([("active", f"{parameters.active:,} parameters, those that a token uses")] if parameters.idle else []),
        *_muons(config, parameters.total),
        ("data", f"{data.path}: {format_count(len(data.train))} tokens, {format_count(len(data.validation))} held out"),
        *_rows(config, windows),
        ("length", _length(config, windows, done)),
        *_ramps(config),
        *_filling(config, layout.data),
        ("layout", f"{_layout(layout)}, {mesh.device.type}"),
        ("MFU", f"of {peak.flops / 1e12:.3g} TFLOP/s a rank ({peak.source}{_fp8(config)})"),
    ]


def _layout(layout: RankLayout) -> str:
    """Return the size of each axis; context only where it is one, and over how many ranks experts are divided."""
    axes = ("tensor", "pipeline", "context", "data")
    sizes = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in axes if axis != "context" or layout.context > 1)
    return sizes if layout.expert == 1 else f"{sizes}, experts over {layout.expert}"


def _fp8(config: RunConfig) -> str:
    return "" if config.train.fp8 == "none" else "; products in fp8 are counted against it too"


def _muons(config: RunConfig, parameters: int) -> list[tuple[str, str]]:
    """Return what the console says of two optimizers."""
    if config.optim.kind != "muon":
        return []
    own, frozen = muon_parameters(config), any(rule.freeze for rule in config.optim.rules)
    rest = "all else that is not frozen" if frozen else f"{parameters - own:,}"
    return [("optimizer", f"Muon for {own:,} parameters, AdamW for {rest}")]


def _rows(config: RunConfig, windows: Windows) -> list[tuple[str, str]]:
    """Return what the console says of rows that are padded."""
    if config.data.rows == "stream":
        return []
    padding = 1.0 - predicted_tokens(windows) / (len(windows) * config.model.sequence)
    places = config.model.sequence
    return [("rows", f"{len(windows):,} of {places} places, of one document each; {padding:.1%} are padding")]


def _length(config: RunConfig, windows: Windows, done: TrainState) -> str:
    """Return the length with the samples that were used, whatever their batches, and those that will be."""
    samples = done.samples + samples_before(config, config.steps) - samples_before(config, done.step)
    tokens = format_count(samples * config.model.sequence)
    return f"{config.steps:,} steps, {tokens} tokens, {samples / len(windows):.3g} epochs"


def _filling(config: RunConfig, data_ranks: int) -> list[tuple[str, str]]:
    """Return what the console says of rows that fill up a batch."""
    batch = config.train.global_batch
    rows = rows_of_rank(config, batch, data_ranks) * data_ranks
    return [] if rows == batch else [("filling", f"{rows - batch} of {rows} rows of a batch, which have no loss")]


def _ramps(config: RunConfig) -> list[tuple[str, str]]:
    """Return what the console says of batches and sequences that grow."""
    start, first = config.batch_ramp.start, config.sequence_warmup.start
    batch = f"{start} to {config.train.global_batch} sequences over {ramp_steps(config):,} steps"
    sequence = f"{first} to {config.model.sequence} tokens over {sequence_steps(config):,} steps"
    return [*([] if start is None else [("batch", batch)]), *([] if first is None else [("sequences", sequence)])]
