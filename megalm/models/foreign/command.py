"""`megalm import-megatron` and `megalm import-deepspeed`: another program's checkpoint becomes a run's directory."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalm.answers import answer
from megalm.data.tokenizer import Tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.models.foreign.imported_model import ForeignModel
from megalm.models.foreign.read import read_foreign_deepspeed, read_foreign_megatron
from megalm.models.imported import require_free, write_run

TRUST = (
    "{directory}: its .pt files are pickles of another program, which run what they like where they are unpickled. "
    "Here they are not: a process without network and without other files reads their opcodes, nothing that they name "
    "is imported or called, and their numbers are copied as they stand. That cannot tell whether the weights are those "
    "you want; say --trust if you know who made them"
)


def import_megatron(args: Namespace) -> int:
    """`megalm import-megatron`: Megatron-LM's formats torch and torch_dist."""
    return _import(args, read_foreign_megatron)


def import_deepspeed(args: Namespace) -> int:
    """`megalm import-deepspeed`: DeepSpeed's universal checkpoints of Megatron-DeepSpeed."""
    return _import(args, read_foreign_deepspeed)


def _import(args: Namespace, read: Callable[[Path, int | None], ForeignModel]) -> int:
    directory, out = Path(args.directory).resolve(), Path(args.out)  # links below are refused
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is no directory; name one with checkpoints")
    if not args.trust:
        raise ConfigError(TRUST.format(directory=directory))
    require_free(out)
    found, tokenizer = read(directory, args.vocab), Path(args.tokenizer) if args.tokenizer else None
    if tokenizer is not None:
        tokens, rows = Tokenizer.load(tokenizer).vocabulary, found.model.vocab
        if rows is not None and tokens > rows:
            counts = f"has {tokens} tokens, and the model's embedding {rows} rows"
            raise ConfigError(f"--tokenizer={tokenizer} {counts}; give the model's own")
    return answer(import_model(found, out, tokenizer), args.json)


def import_model(found: ForeignModel, out: Path, tokenizer: Path | None) -> dict[str, Any]:
    """Write the run's directory and return what it holds, in JSON values. Raises CheckpointError."""
    kinds: set[str] = set()

    def noted() -> Any:
        for fragment in found.optimizer():
            kinds.add(fragment.kind)
            yield fragment

    checkpoint = write_run(
        out,
        found.model.model_dump(exclude_unset=True),
        found.tensors(),
        tokenizer,
        found.facts,
        noted(),
        step=found.step,
        precision=found.precision,
    )
    return {
        "run": str(out),
        "checkpoint": str(checkpoint),
        "source": dict(found.facts),
        "optimizer": sorted(kinds) or "weights alone",
        "model": found.model.model_dump(mode="json", exclude_unset=True),
    }
