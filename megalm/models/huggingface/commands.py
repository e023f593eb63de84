"""What `megalm import-hf` and `megalm export-hf` do with their parsed arguments; each returns the exit status."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megalm.answers import answer
from megalm.errors import ConfigError


def import_hf(args: Namespace) -> int:
    """`megalm import-hf`: a model's directory to a run."""
    from megalm.models.huggingface.importing import import_model

    return answer(import_model(Path(args.directory), Path(args.out), args.precision), args.json)


def export_hf(args: Namespace) -> int:
    """`megalm export-hf`: a run to a model's directory."""
    from megalm.models.huggingface.families import FAMILIES

    if args.family is not None and args.family not in FAMILIES:
        raise ConfigError(f"--family={args.family} is none that megalm writes; it writes {', '.join(FAMILIES)}")
    from megalm.models.huggingface.exporting import export_model

    return answer(export_model(Path(args.run), Path(args.out), args.ema, args.dtype, args.family, args.step), args.json)
