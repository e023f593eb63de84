"""`megalm train RECIPE --dry-run RANK/WORLD`: one rank of a layout, without the others, data, a GPU or a launcher."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from megalm.answers import answer, show
from megalm.config.loop_checks import COMPILED_MASKS
from megalm.config.run import RunConfig
from megalm.data.datasets import open_prepared
from megalm.distributed.world import FUSED_ON_CPU, layout_of
from megalm.dry_run.rank import run_rank
from megalm.dry_run.report import as_json, as_text
from megalm.errors import ConfigError, DataError
from megalm.train.parameter_rules import check_rules


def dry_run(config: RunConfig, recipe: str, place: Sequence[int], in_json: bool) -> int:
    """Print what the rank place[0] of a world of place[1] is and does in a step; return the exit status.

    Nothing is compiled or written. Raises ConfigError where the world does not fit the recipe, where neither recipe nor
    data tell the vocabulary.
    """
    rank, world = place
    layout = layout_of(config, world)
    vocab = _vocabulary(config)
    config = _with_kernels(config)
    if config.optim.rules:
        check_rules(config, vocab)
    run = run_rank(config, layout, rank, vocab)
    return answer(as_json(run), as_json=True) if in_json else show(as_text(run, recipe))


def _vocabulary(config: RunConfig) -> int:
    if config.model.vocab is not None:
        return config.model.vocab
    try:
        return open_prepared(config.data.path).vocabulary
    except DataError as error:
        raise ConfigError(
            f"the recipe has no model.vocab and the data does not tell it ({error}); give model.vocab=N, the tokens of "
            "the tokenizer"
        ) from error


def _with_kernels(config: RunConfig) -> RunConfig:
    """Return the recipe with the kernels that it computes with: without a word of a CPU, those of a GPU."""
    kernels = config.model.kernels
    if kernels == "auto":
        kernels = "reference" if config.run.device == "cpu" else "fused"
    if kernels == "fused" and config.run.device == "cpu":
        raise ConfigError(FUSED_ON_CPU)
    if kernels == "fused" and config.train.compile and config.model.draws_masks:
        raise ConfigError(COMPILED_MASKS)
    if kernels == "fused" and find_spec("triton") is None:
        raise ConfigError("the kernels of a GPU need triton, which is not installed here; use model.kernels=reference")
    return config.model_copy(update={"model": config.model.model_copy(update={"kernels": kernels})})
