"""The first weights of a new run from those of another, of one checkpoint, or of a Hugging Face directory; of the first
two the state of the optimizer too, where it is wanted.

Owns what must fit, which is found out from headers alone, and what is said of the rest. Each rank reads its own part
of what its layout asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.model import ModelSection
from megalm.config.optim import OptimSection
from megalm.config.run import RunConfig
from megalm.data.tokenizer import Tokenizer
from megalm.errors import ConfigError
from megalm.models.build import whole_tensors
from megalm.models.huggingface.companions import companions_of
from megalm.models.huggingface.configs import differences
from megalm.models.huggingface.reader import HuggingFaceReader
from megalm.models.sources import is_huggingface, newest_checkpoint
from megalm.train.continuing import progress_of
from megalm.zero.engine import ZeroEngine

Source = CheckpointReader | HuggingFaceReader

ADAMS = frozenset({"adam", "adamw", "fused_adamw", "apex_adamw"})
"""Optimizers that keep the same: each may go on with the state of another."""


def check_start(config: RunConfig, vocab: int, tokenizer: Tokenizer | None = None) -> Source:
    """Return the source at `train.init_from`, whose tensors are those of the model, open for reading.

    Given the run's `tokenizer`, as one process is, look also at what the run is to keep of the source, and compare a
    head in its files with the embedding that it is tied to. Raises ConfigError, with both shapes, where they are not
    the model's; CheckpointError where the source is damaged.
    """
    assert config.train.init_from is not None
    path = Path(config.train.init_from)
    source: Source = HuggingFaceReader(path) if is_huggingface(path) else CheckpointReader(newest_checkpoint(path))
    if tokenizer is not None:
        companions_of(path, tokenizer)
        if isinstance(source, HuggingFaceReader):
            source.check_tied()
    there = shapes_of(source)
    here = {name: spec.global_shape for name, spec in whole_tensors(config.model, vocab).items()}
    where = f"train.init_from={path}"
    remedy = "make the model section that of the source"
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name]:
            if name in ("embedding.weight", "head.weight") and here[name][1:] == there[name][1:]:
                remedy = f"set model.vocab={there[name][0]}"
            elif name == "position.weight" and here[name][1:] == there[name][1:]:
                remedy = f"set model.sequence={there[name][0]}"
            raise ConfigError(f"{where}: {name} has shape {there[name]} there and {here[name]} in this model; {remedy}")
    for names, said in ((here.keys() - there.keys(), "lacks"), (there.keys() - here.keys(), "has")):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            which = "which this model has" if said == "lacks" else "which this model has not"
            raise ConfigError(f"{where} {said} {first}{more}, {which}; {remedy}")
    if config.train.init_optimizer:
        _check_optimizer(config.optim, source, here)
    return source


def _check_optimizer(optim: OptimSection, source: Source, names: Iterable[str]) -> None:
    """Raise ConfigError where the source has not what the optimizer keeps of each weight that it is to update."""
    where = f"train.init_optimizer=true, {source.directory}"
    remedy = "set train.init_optimizer=false for an optimizer that begins anew"
    if isinstance(source, HuggingFaceReader):
        raise ConfigError(f"{where} is a Hugging Face directory, which holds no optimizer's state; {remedy}")
    kinds = optimizer_kinds(source)
    if not kinds:
        raise ConfigError(f"{where} holds no optimizer's state; {remedy}")
    theirs = source.state.get("config", {}).get("optim", {})
    kind, momentum = str(theirs.get("kind")), bool(theirs.get("momentum"))
    if kind != optim.kind and not {kind, optim.kind} <= ADAMS:
        raise ConfigError(f"{where} has the state of optim.kind={kind}, not {optim.kind}; use that kind, or {remedy}")
    if optim.kind in ("sgd", "rmsprop") and momentum != bool(optim.momentum):
        given = theirs.get("momentum")
        raise ConfigError(f"{where} was trained with optim.momentum={given}, not {optim.momentum:g}; {remedy}")
    there = {name for kind in kinds for name in source.names(kind)}
    rules = ((name, optim.rule_of(name)) for name in names)
    trained = {name for name, rule in rules if rule is None or not rule.freeze}
    lacking = sorted(name for name in trained - there if not name.endswith(".router.bias"))  # which is no parameter
    if lacking:
        raise ConfigError(f"{where} has no optimizer's state of {lacking[0]}, which this run trains; {remedy}")


def optimizer_kinds(source: CheckpointReader) -> list[str]:
    """Return the kinds of the optimizer's state in a checkpoint; an average of the weights is none."""
    return [kind for kind in source.kinds() if kind not in ("weight", "ema")]


def set_start(config: RunConfig, engine: ZeroEngine, source: Source) -> None:
    """Set the weights from a source that `check_start` gave, and the optimizer's state where the recipe says so."""
    if not config.train.init_optimizer:
        engine.load_weights(source.read_flat)
        return
    assert isinstance(source, CheckpointReader), "check_start refuses others"
    engine.load(source.read_flat, optimizer_kinds(source), updates_of(source))


def updates_of(source: CheckpointReader) -> int:
    """Return how many updates the optimizer of a checkpoint has made, megalm's or that of an imported one."""
    if "progress" in source.state:
        return progress_of(source).updates
    return int(source.state.get("imported", {}).get("optimizer_steps") or 0)


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by logical name."""
    if isinstance(source, HuggingFaceReader):
        return source.shapes()
    entries = {name: source.manifest.entries("weight", name)[0] for name in source.names("weight")}
    return {name: entry.piece.shard.global_shape for name, entry in entries.items()}


def notes(config: RunConfig, source: Source) -> list[str]:
    """Return what a run says of its first weights: where they are from, and what its model computes otherwise."""
    lines = [f"starting with the weights of {source.directory}"]
    if config.train.init_optimizer:
        assert isinstance(source, CheckpointReader), "check_start refuses others"
        lines = [f"{lines[0]}, and its optimizer's state after {updates_of(source)} updates"]
    section = source.section if isinstance(source, HuggingFaceReader) else source.state.get("config", {}).get("model")
    if section is not None:
        theirs = ModelSection.model_validate(section)
        changed = differences(config.model.model_copy(update={"vocab": theirs.vocab}), section)
        lines += [f"the source computed otherwise than {', '.join(changed)}"] if changed else []
    return lines
