"""Whether a written directory is the model: transformers reads it, and both compute the logits of random prompts.

In fp32, with the weights as the files have them, the same sums in another order differ by a few millionths of the
largest logit, transformers' angles of rotary positions (computed in fp32, ours in fp64) by some more at later places. A
tensor in a wrong place, or a wrong word in the config, changes logits by about as much as they are large. So the limit
stands a thousand times above the one and a thousand times below the other. Where two experts have all but the
same score a token may go to either: with experts one token in a hundred may differ.
"""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import RunConfig
from megalm.distributed.world import joined_mesh
from megalm.errors import CheckpointError, ConfigError
from megalm.models.build import build_stage
from megalm.models.trained import read_weights
from megalm.tensor_parallel.float8 import quiet_torchao

TOLERANCE = 1e-4
"""Of the largest logit."""
ROWS, TOKENS, LONGEST = 3, 48, 1024


def require_transformers() -> None:
    """Raise ConfigError where transformers is missing; nothing is imported."""
    if find_spec("transformers") is None:
        raise ConfigError(
            "export-hf compares what it writes with transformers, which is missing; pip install 'megalm[hf]'"
        )


def check_logits(
    directory: Path, config: RunConfig, vocab: int, reader: CheckpointReader, averaged: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the largest difference and the tolerance. Raises CheckpointError where the logits differ by more, and
    where they are none in fp32.

    One of the two models is in memory at a time. Joins a world of one, so none may be there.
    """
    tokens = _prompts(config, vocab)
    ours = _our_logits(config, vocab, reader, averaged, dtype, tokens)
    if not bool(ours.isfinite().all()):
        raise CheckpointError(
            "the model's own logits of random prompts are not finite in fp32, so nothing can be compared with them; "
            "its weights are too large: export an earlier checkpoint (--step)"
        )
    theirs = _their_logits(directory, tokens)
    scale = float(ours.abs().max())
    off = (ours - theirs).abs().amax(dim=-1).flatten() / max(scale, 1e-30)
    allowed = off.numel() // 100 if config.model.experts is not None else 0
    largest = float(off.nan_to_num(nan=torch.inf).sort(descending=True).values[allowed])
    if largest > TOLERANCE:
        raise CheckpointError(
            f"transformers computes other logits from {directory.name} than megalm: they differ by {largest:.2g} of "
            f"the largest, {TOLERANCE:g} is allowed; nothing is left, and this is a fault of megalm's: please report it"
        )
    return {"largest_difference": largest, "tolerance": TOLERANCE}


def _prompts(config: RunConfig, vocab: int) -> Tensor:
    """Return random tokens, long enough that a window hides some, where it is not too long for a processor."""
    model = config.model
    windows = [window for n in range(model.layers) if (window := model.window_of(n)) is not None]
    length = max(TOKENS, *(window + TOKENS // 2 for window in windows), 0)
    length = min(length if length <= LONGEST else TOKENS, model.sequence)
    return torch.randint(vocab, (ROWS, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _our_logits(
    config: RunConfig, vocab: int, reader: CheckpointReader, averaged: bool, dtype: torch.dtype, tokens: Tensor
) -> Tensor:
    kept = {"sequence": tokens.shape[1]} if config.model.position == "rotary" else {}
    model_section = config.model.model_copy(update={**kept, "document_mask": False})
    config = config.model_copy(update={"precision": "fp32", "model": model_section})
    with joined_mesh(config) as mesh:
        model = build_stage(config, vocab, mesh).eval()
        read_weights(model, reader, averaged)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        logits: Tensor = model(tokens)[..., :vocab].clone()
    del model
    gc.collect()
    return logits


@torch.no_grad()
def _their_logits(directory: Path, tokens: Tensor) -> Tensor:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_torchao():  # which transformers imports where it is there
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                attn_implementation="eager",
            )  # fmt: skip
        logits: Tensor = model.eval()(tokens, use_cache=False).logits.float()
    except Exception as error:  # of any kind: it is the judge
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot read what was written: {type(error).__name__}: {words}") from error
    return logits
