"""One process of the training-step benchmark: `python step_process.py JOB.json`, started by `train_step.py`.

Owns what is measured and how; the job says which recipe, how often and with how many threads. Rank 0 writes what was
measured beside the job.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import PlainBatches, PlainLoop, PlainModel, PlainShape
from workers import result_of

from megalm.config.run import RunConfig
from megalm.data.loader import Loader
from megalm.data.sampler import GlobalOrder
from megalm.data.token_file import HEADER_BYTES, TokenFile
from megalm.data.windows import training_windows
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.world import joined_mesh
from megalm.models.build import DTYPES, build_executor, build_stage
from megalm.train.monitor import flops_per_token, peak_flops, peak_memory_bytes
from megalm.train.optimizers import build_optimizer
from megalm.train.trainer import Trainer, TrainState
from megalm.zero.build import build_engine, partitioner
from megalm.zero.engine import shard_of

CHECKED_STEPS, WARM_STEPS = 3, 2
KINDS = {("layernorm", "gelu", "learned", True): False, ("rmsnorm", "swiglu", "rotary", False): True}
"""(norm, activation, position, bias) of the models that the plain loop can train -> whether it is the Llama kind."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-4}
"""Relative. bf16 keeps 8 bits, and the two models may multiply in a different order."""


def build_trainer(config: RunConfig, tokens: TokenFile, mesh: ParallelMesh) -> Trainer:
    """Return the trainer that `megalm train` would build for the recipe, over a token file."""
    vocab = config.model.vocab
    assert vocab is not None, "a measured shape gives its vocabulary"
    model = build_stage(config, vocab, mesh, partitioner(config, mesh), document_start=0)
    engine = build_engine(config, model, mesh, partial(build_optimizer, config.optim), model.tied_weight)
    windows = training_windows(tokens, config.model.sequence, config.data.rows)
    loader = Loader(tokens, windows, GlobalOrder(len(windows), config.seed), mesh.coordinates.data, mesh.size("data"))
    return Trainer(config, mesh, build_executor(config, engine.module, mesh), engine, loader, TrainState())


def build_plain(config: RunConfig, tokens: TokenFile, trainer: Trainer, samples: int) -> tuple[PlainLoop, PlainBatches]:
    """Return the plain loop with the trainer's weights, and its reader of the trainer's first `samples` samples."""
    model, optim = config.model, config.optim
    assert model.vocab is not None, "a measured shape gives its vocabulary"
    kind = (model.norm, model.activation, model.position, model.bias)
    assert kind in KINDS and model.tie_embeddings and model.key_value_heads == model.heads, f"no plain model of {model}"
    shape = PlainShape(
        llama=KINDS[kind],
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        feed_forward=model.feed_forward,
        sequence=model.sequence,
        vocab=model.vocab,
        norm_eps=model.norm_eps,
        rotary_base=model.rotary_base,
    )
    weights = list(trainer.engine.module.parameters())
    plain = PlainModel(shape).to(device=weights[0].device, dtype=weights[0].dtype)
    plain.read({shard_of(weight).name: weight for weight in weights}, model.heads)
    loop = PlainLoop(
        plain,
        micro_batch=config.train.micro_batch,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad_norm=config.train.clip_grad_norm,
    )
    order = GlobalOrder(len(training_windows(tokens, model.sequence, config.data.rows)), config.seed)
    starts = order.indices(0, samples) * model.sequence
    dtype = np.dtype(tokens.tokens.dtype)
    return loop, PlainBatches(tokens.path, dtype, HEADER_BYTES, starts, model.sequence, trainer.mesh.device)


def measure_pairs(config: RunConfig, tokens: TokenFile, pairs: int, steps_a_side: int) -> dict[str, Any]:
    """Return the times of both training loops, pair by pair, after their losses were found to agree."""
    batch = config.train.global_batch
    with joined_mesh(config) as mesh:
        trainer = build_trainer(config, tokens, mesh)
        total_steps = CHECKED_STEPS + WARM_STEPS + pairs * steps_a_side
        loop, batches = build_plain(config, tokens, trainer, total_steps * batch)
        done = 0

        def plain_step() -> torch.Tensor:
            nonlocal done
            done += 1
            return loop.step(*batches.read((done - 1) * batch, batch))

        losses = [(trainer.train_step().loss, plain_step().item()) for _ in range(CHECKED_STEPS)]
        difference = max(abs(ours - plain) / abs(plain) for ours, plain in losses)
        tolerance = LOSS_TOLERANCE[config.precision]
        assert difference <= tolerance, f"(ours, plain) losses {losses} differ by more than {tolerance}"
        for _ in range(WARM_STEPS):
            trainer.train_step()
            plain_step()
        times = race({"ours": trainer.train_step, "plain": plain_step}, pairs, steps_a_side, mesh.device)
    return {
        "losses": losses,
        "loss_difference": difference,
        "parameters": sum(p.numel() for p in loop.weights),
        "tokens_per_step": batch * config.model.sequence,
        **times,
    }


def measure_compiled(config: RunConfig, tokens: TokenFile, pairs: int, steps_a_side: int) -> dict[str, Any]:
    """Return the times of the compiled and the eager trainer, pair by pair, after their losses were found to agree."""
    from megalm.train.compilation import compile_blocks

    with joined_mesh(config) as mesh:
        compiled, eager = (build_trainer(config, tokens, mesh) for _ in range(2))
        compile_blocks(config, compiled.engine.module, mesh.device)  # type: ignore[arg-type]
        begin = time.perf_counter()
        first = compiled.train_step().loss
        cold_start_s = time.perf_counter() - begin
        losses = [(first, eager.train_step().loss)]
        losses += [(compiled.train_step().loss, eager.train_step().loss) for _ in range(CHECKED_STEPS + WARM_STEPS - 1)]
        difference = max(abs(ours - plain) / abs(plain) for ours, plain in losses)
        tolerance = LOSS_TOLERANCE[config.precision]
        assert difference <= tolerance, f"(compiled, eager) losses {losses} differ by more than {tolerance}"
        times = race({"ours": compiled.train_step, "plain": eager.train_step}, pairs, steps_a_side, mesh.device)
    return {
        "loss_difference": difference,
        "cold_start_s": cold_start_s,
        "parameters": sum(p.numel() for p in eager.engine.module.parameters()),
        "tokens_per_step": config.train.global_batch * config.model.sequence,
        **times,
    }


def race(
    sides: dict[str, Callable[[], object]], pairs: int, steps_a_side: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds a step of each side, by the clock on the wall and of the processor, pair by pair."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in sorted(sides, reverse=pair % 2 == 1):
            wall, processor = timed(sides[name], steps_a_side, device)
            times[name].append((wall / steps_a_side, processor / steps_a_side))
    return {
        clock: {name: [t[index] for t in values] for name, values in times.items()}
        for index, clock in enumerate(("wall_s", "processor_s"))
    }


def timed(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of `count` steps by the clock on the wall, and those that this process computed."""
    synchronize(device)
    begin, begin_processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - begin, time.process_time() - begin_processor


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_layout(config: RunConfig, tokens: TokenFile, steps: int) -> dict[str, Any]:
    """Return the wall time of each of `steps` steps of this rank's trainer, after some to warm up."""
    from megalm.train.compilation import compile_blocks

    with joined_mesh(config) as mesh:
        trainer = build_trainer(config, tokens, mesh)
        if config.train.compile:
            compile_blocks(config, trainer.engine.module, mesh.device)  # type: ignore[arg-type]
        loss = trainer.train_step().loss
        for _ in range(WARM_STEPS):
            trainer.train_step()
        seconds = [timed(trainer.train_step, 1, mesh.device)[0] for _ in range(steps)]
        peak = peak_flops(mesh.device, DTYPES[config.precision])
        vocab = config.model.vocab
        assert vocab is not None, "a measured shape gives its vocabulary"
        return {
            "first_loss": loss,
            "wall_s": seconds,
            "tokens_per_step": config.train.global_batch * config.model.sequence,
            "flops_per_token": flops_per_token(config.model, vocab),
            "peak_flops": peak.flops,
            "peak_source": peak.source,
            "peak_bytes": peak_memory_bytes(mesh.device),
        }


def work(job_path: Path) -> None:
    """Do the job described in a file, and write rank 0's result beside it."""
    job = json.loads(job_path.read_text())
    torch.set_num_threads(job["threads"])
    config = RunConfig.model_validate_json(job["config"])
    tokens = TokenFile(job["tokens"])
    if job["kind"] in ("pairs", "compiled"):
        measure = measure_pairs if job["kind"] == "pairs" else measure_compiled
        result = measure(config, tokens, job["repeats"], job["steps_a_side"])
    else:
        result = measure_layout(config, tokens, job["repeats"])
    if int(os.environ.get("RANK", "0")) == 0:
        result_of(job_path).write_text(json.dumps(result))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
