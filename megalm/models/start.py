"""The first weights of a new run from those of another, of one checkpoint, or of a Hugging Face directory.

Owns what must fit, which is found out from headers alone, and what is said of the rest. Each rank reads its own part
of what its layout asks for.
"""

from __future__ import annotations

from pathlib import Path

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.model import ModelSection
from megalm.config.run import RunConfig
from megalm.errors import ConfigError
from megalm.models.build import whole_tensors
from megalm.models.huggingface.configs import differences
from megalm.models.huggingface.reader import HuggingFaceReader
from megalm.models.sources import is_huggingface, newest_checkpoint

Source = CheckpointReader | HuggingFaceReader


def check_start(config: RunConfig, vocab: int) -> Source:
    """Return the source at `train.init_from`, whose tensors are those of the model, open for reading.

    Raises ConfigError, with both shapes, where they are not; CheckpointError where the source is damaged.
    """
    assert config.train.init_from is not None
    path = Path(config.train.init_from)
    source: Source = HuggingFaceReader(path) if is_huggingface(path) else CheckpointReader(newest_checkpoint(path))
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
    return source


def shapes_of(source: Source) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by logical name."""
    if isinstance(source, HuggingFaceReader):
        return source.shapes()
    entries = {name: source.manifest.entries("weight", name)[0] for name in source.names("weight")}
    return {name: entry.piece.shard.global_shape for name, entry in entries.items()}


def notes(config: RunConfig, source: Source) -> list[str]:
    """Return what a run says of its first weights: where they are from, and what its model computes otherwise."""
    lines = [f"starting with the weights of {source.directory}"]
    section = source.section if isinstance(source, HuggingFaceReader) else source.state.get("config", {}).get("model")
    if section is not None:
        theirs = ModelSection.model_validate(section)
        changed = differences(config.model.model_copy(update={"vocab": theirs.vocab}), section)
        lines += [f"the source computed otherwise than {', '.join(changed)}"] if changed else []
    return lines
