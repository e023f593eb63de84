"""What a run keeps in which number format, and what divides it: the storage table of a recipe. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from megalm.config.deepspeed import deepspeed_config
from megalm.config.run import RunConfig

BYTES = {"8 bits": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
ADAMS = ("exp_avg", "exp_avg_sq")


class Stored(NamedTuple):
    """One kind of number that there is for each parameter."""

    what: str
    dtype: str
    from_stage: int
    """The ZeRO stage from which replicas hold a part each; 4: none divides it."""
    group: str
    """The entry of `HeldBytes` that counts it; empty where it is gone when weights are updated."""


def wide_dtype(config: RunConfig) -> str:
    """Return the format in which weights are updated and gradients summed: the weights', or fp32 for 16 bits."""
    return "fp32" if BYTES[config.precision] == 2 else config.precision


def masters_dtype(config: RunConfig) -> str:
    """Return the format of master weights: the wide one, but where a DeepSpeed JSON saves memory."""
    return "bf16" if _saves(config, "bf16_master_weights_and_grads") else wide_dtype(config)


def optimizer_states(config: RunConfig) -> dict[str, str]:
    """Return the numbers that the optimizer keeps for each parameter, by name, and their formats.

    Adafactor keeps some for rows and columns only, and is as good as without. Muon's is that of hidden matrices.
    """
    optim, masters = config.optim, masters_dtype(config)
    momentum = ("momentum_buffer",) if optim.momentum else ()
    states = {
        "lion": ("exp_avg",),
        "sgd": momentum,
        "rmsprop": ("square_avg", *momentum),
        "adagrad": ("sum",),
        "adafactor": (),
        "muon": ("momentum_buffer",),
    }
    narrow = optim.state_dtype == "bf16" or _saves(config, "bf16_optimizer_states")
    kept = "8 bits" if optim.kind == "adamw8bit" else "bf16" if narrow else wide_dtype(config)
    average = {} if optim.ema_decay is None else {"ema": masters}
    return {**dict.fromkeys(states.get(optim.kind, ADAMS), kept), **average}


def muon_parameters(config: RunConfig) -> int:
    """Return how many parameters Muon updates; AdamW has the others, but for frozen ones."""
    return sum(count for name, count in config.model.hidden_matrices.items() if config.optim.is_muons(name))


def _saves(config: RunConfig, key: str) -> bool:
    return bool(deepspeed_config(config).get("bf16", {}).get(key, False))


def stored(config: RunConfig) -> list[Stored]:
    """Return what there is for each parameter, in the order of the table."""
    wide = wide_dtype(config)
    masters = masters_dtype(config)
    rows = [Stored("weights", config.precision, 3, "weights")]
    if wide != config.precision or config.zero.stage > 0:
        rows.append(Stored("master weights", masters, 1, "master_weights"))
    if wide != config.precision:
        rows.append(Stored("gradients of a microbatch", config.precision, 4, ""))
    if config.zero.stage == 1:  # which divides them once all microbatches are summed; buffers of 16 bits' sums stay
        kept = "gradients" if wide != config.precision else ""
        rows += [Stored("gradients, summed", wide, 2, kept), Stored("gradients, reduced", wide, 1, "gradients")]
    else:
        rows.append(Stored("gradients, summed", wide, 2, "gradients"))
    rows.append(Stored("gradients between replicas", config.train.reduce_dtype or wide, 4, ""))
    for state, dtype in optimizer_states(config).items():
        what = "average of the weights (ema)" if state == "ema" else f"optimizer: {state}"
        rows.append(Stored(what, dtype, 1, "optimizer"))
    return rows


def storage_table(config: RunConfig) -> str:
    """Return the table as text."""
    sizes = {"tensor": config.parallel.tensor, "pipeline": config.parallel.pipeline}
    ways = [axis for axis, size in sizes.items() if size > 1]
    replicas = ["data", "context"] if config.parallel.context > 1 else ["data"]
    lines = [("what", "format", "bytes", "divided over the ranks of")]
    for row in stored(config):
        axes = [*ways, *(replicas if config.zero.stage >= row.from_stage else [])]
        lines.append((row.what, row.dtype, str(BYTES[row.dtype]), ", ".join(axes) or "no axis"))
    width = max(len(line[0]) for line in lines)
    text = [f"{what:<{width}}  {dtype:<6}  {size:>5}  {axes}" for what, dtype, size, axes in lines]
    wide = wide_dtype(config)
    notes = [
        f"bytes are those of one parameter; activations travel and are kept in {config.precision},",
        f"norms, softmax and loss are computed in {wide}; a checkpoint holds master weights and optimizer as they are",
    ]
    if config.parallel.expert > 1:
        ranks = config.parallel.expert
        notes.append(f"experts are divided over {ranks} of the replicas, data x context, in each row of the table")
    if config.optim.kind == "adafactor":
        notes.append("adafactor keeps a number for each row and column of a matrix and for each element of a vector")
    if config.optim.kind == "muon":
        notes.append("muon keeps that of hidden matrices, and AdamW's exp_avg and exp_avg_sq of all other parameters")
    if config.optim.kind == "adamw8bit":
        notes.append("256 numbers of 8 bits share a scale in fp32; tensors of less than 4096 keep fp32")
    if config.precision == "fp16":
        notes.append(f"the loss is scaled by {config.loss_scale.initial:g} at first")
    return "\n".join([*text, "", *notes])
