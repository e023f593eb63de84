"""`megalm evaluate`: a run's newest checkpoint on a split of its data, under any layout.

Owns what is checked before and what is answered; the sums are `perplexity`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.trained import trained_config
from megalm.data.datasets import TRAIN, VALIDATION, PreparedData, open_prepared
from megalm.data.loader import HeldOut
from megalm.data.tokenizer import Tokenizer
from megalm.data.windows import all_windows
from megalm.distributed.world import joined_mesh
from megalm.errors import DataError
from megalm.evaluation.perplexity import held_out_loss
from megalm.models.trained import load_trained, require_checkpoint


def evaluate(
    run: str,
    overrides: Sequence[str] = (),
    split: str = VALIDATION,
    averaged: bool = False,
    step: int | None = None,
) -> dict[str, Any] | None:
    """Return how well the run's model predicts `split` ("validation" or "train"); None on all ranks but 0.

    `averaged`: with the average of its weights. `step`: of that checkpoint (None: of the newest one).

    Keys: run, step, data, split, weights, tokens, loss (nats per token), perplexity, bits_per_byte. Without overrides
    of the layout one process does it, whatever layout trained the model; under a launcher its ranks form the
    layout, and those beyond tensor x pipeline share the text. Raises ConfigError, DataError, CheckpointError.
    """
    directory = Path(run)
    config = trained_config(directory, overrides)
    data = open_prepared(config.data.path)
    tokenizer = Tokenizer.load(directory)
    _refuse_other_tokenizer(directory, tokenizer, data)
    require_checkpoint(directory, step)
    file = {TRAIN: data.train, VALIDATION: data.validation}[split]
    windows = all_windows(file, config.model.sequence, config.data.rows)
    held_out = HeldOut(file, windows, config.evaluate.sequences)
    with joined_mesh(config) as mesh:
        vocab = config.model.vocab or tokenizer.vocabulary
        trained = load_trained(directory, config, vocab, mesh, tokenizer.end_of_text, averaged, step)
        result = held_out_loss(
            trained.executor, trained.model, held_out, tokenizer.byte_lengths, mesh, config.train.micro_batch
        )
        if mesh.rank != 0:
            return None
    return {
        "run": run,
        "step": trained.step,
        "data": config.data.path,
        "split": split,
        "weights": "averaged" if averaged else "last",
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }


def _refuse_other_tokenizer(run: Path, tokenizer: Tokenizer, data: PreparedData) -> None:
    other = data.description.tokenizer.fingerprint
    if other != tokenizer.fingerprint:
        raise DataError(
            f"{data.path} was made with tokenizer {other[:12]}, the model of {run} with {tokenizer.fingerprint[:12]}; "
            f"prepare the text with --tokenizer {run / 'tokenizer.json'}"
        )
