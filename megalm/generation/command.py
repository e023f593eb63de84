"""`megalm generate`: a run's model continues a text.

Owns text in and text out; the loop over tokens is `generate`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megalm.config.trained import FOR_GENERATION, trained_config
from megalm.data.tokenizer import Tokenizer
from megalm.distributed.world import joined_mesh
from megalm.errors import DataError, LaunchError
from megalm.generation.generate import WindowModel, generate_tokens
from megalm.generation.sampling import Sampling
from megalm.models.trained import load_trained, require_checkpoint

logger = logging.getLogger(__name__)


def generate(
    run: str,
    overrides: Sequence[str],
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    echo: bool = True,
    averaged: bool = False,
    step: int | None = None,
) -> str | None:
    """Return `prompt` (without `echo`: not) and up to `tokens` new tokens; None on all ranks but 0.

    `averaged`: with the average of the run's weights. `step`: of that checkpoint (None: of the newest one).
    Temperature 0 is greedy. The same seed gives the same text in every layout. An empty prompt begins a
    document; one longer than the model's window is seen from its end only, with a warning. The layout is one
    process unless `overrides` say else. Raises ConfigError, DataError, CheckpointError, and LaunchError for
    superfluous ranks.
    """
    directory = Path(run)
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what the shell gave was not UTF-8
        raise DataError(f"the prompt {prompt[:40]!r} holds bytes that are no UTF-8; give it in UTF-8")
    sampling = Sampling(temperature, top_k, 1.0 if top_p is None else top_p, seed)
    config = trained_config(directory, (*overrides, *FOR_GENERATION))
    tokenizer = Tokenizer.load(directory)
    require_checkpoint(directory, step)
    start = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    window = config.model.sequence
    with joined_mesh(config) as mesh:
        if mesh.size("data") > 1:
            needed = config.parallel.ranks
            raise LaunchError(f"{mesh.layout.world_size} processes for a model that takes {needed}; start {needed}")
        if len(start) > window and mesh.rank == 0:
            logger.warning("the prompt has %d tokens, the model sees the last %d of them", len(start), window)
        vocab = config.model.vocab or tokenizer.vocabulary
        trained = load_trained(directory, config, vocab, mesh, tokenizer.end_of_text, averaged, step)
        model = WindowModel(trained.executor, mesh, window=window, vocab=tokenizer.vocabulary)
        new = list(generate_tokens(model, mesh, start, tokens, sampling, tokenizer.end_of_text))
        if mesh.rank != 0:
            return None
    # Together, not one by one: a character may be spread over several tokens.
    return tokenizer.decode((start if echo and prompt else []) + new)
