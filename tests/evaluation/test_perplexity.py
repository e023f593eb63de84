"""The held-out loss against a plain loop over the same tokens, the same in every layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megalm.data.loader import HeldOut
from megalm.data.token_file import TokenFile, TokenFileWriter
from megalm.data.windows import all_windows
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.evaluation.perplexity import HeldOutLoss, held_out_loss
from megalm.models.build import build_executor, build_stage
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerPool

VOCAB, SEQUENCE = 11, 16
TOKEN_BYTES = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], dtype=np.int64)


@pytest.fixture(scope="module")
def tokens_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A held-out file of 7 windows, the last of 5 labels."""
    path = tmp_path_factory.mktemp("held-out") / "validation.tokens"
    with TokenFileWriter(path, VOCAB, "f" * 64) as writer:
        writer.append(np.random.default_rng(0).integers(0, VOCAB, 6 * SEQUENCE + 6))
    return str(path)


def measured(
    mesh: ParallelMesh, path: str, sequences: int | None, micro_batch: int, sequence_parallel: bool, schedule: str
) -> tuple[float, int, int]:
    """One rank's answer."""
    layout = mesh.layout
    config = small_recipe(
        precision="fp64",
        model={"layers": 4, "init_std": 0.5, "mtp_depth": 1},
        train={"global_batch": 12},
        loss={"label_smoothing": 0.3, "z_loss": 0.2, "mtp": 0.4},
        parallel={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            "sequence": sequence_parallel,
            "schedule": schedule,
            "virtual_stages": 2 if schedule == "interleaved" else 1,
        },
    )
    model = build_stage(config, VOCAB, mesh)
    file = TokenFile(path)
    held_out = HeldOut(file, all_windows(file, SEQUENCE, "stream"), sequences)
    result = held_out_loss(build_executor(config, model, mesh), model, held_out, TOKEN_BYTES, mesh, micro_batch)
    assert (model.label_smoothing, model.z_loss, model.mtp_weight) == (0.3, 0.2, 0.4)
    assert all(parameter.grad is None for parameter in model.parameters())
    return result.total_nats, result.tokens, result.text_bytes


def plain_loss(mesh: ParallelMesh, path: str, sequences: int | None) -> tuple[float, int, int]:
    """Each window on its own through the whole model, token by token."""
    model = build_stage(small_recipe(precision="fp64", model={"layers": 4, "init_std": 0.5}), VOCAB, mesh)
    stream = TokenFile(path)
    tokens = stream.window(0, len(stream))
    nats, count, text_bytes = 0.0, 0, 0
    starts = range(0, len(tokens) - 1, SEQUENCE)
    for start in list(starts)[:sequences]:
        window = tokens[start : start + SEQUENCE + 1]
        with torch.no_grad():
            logits_TV = model(torch.tensor(window[None, :-1]))[0]
        for position, label in enumerate(window[1:]):
            nats -= torch.log_softmax(logits_TV[position], dim=0)[label].item()
            count, text_bytes = count + 1, text_bytes + int(TOKEN_BYTES[label])
    return nats, count, text_bytes


@pytest.mark.parametrize("sequences", [None, 3])
def test_every_layout_measures_what_a_plain_loop_does(
    pool: WorkerPool, tokens_path: str, sequences: int | None
) -> None:
    nats, count, text_bytes = pool.run(plain_loss, tokens_path, sequences, layout=RankLayout())[0]
    assert count == (101 if sequences is None else 48)
    for layout, *how in [
        (RankLayout(), 2, False, "1f1b"),
        (RankLayout(data=3), 2, False, "1f1b"),
        (RankLayout(pipeline=2, tensor=2), 3, False, "1f1b"),
        (RankLayout(pipeline=2, tensor=2), 1, True, "1f1b"),
        (RankLayout(pipeline=2, data=2), 1, False, "1f1b"),
        (RankLayout(pipeline=2, tensor=2), 1, True, "zb-v"),
        (RankLayout(pipeline=2, data=2), 1, False, "interleaved"),
        (RankLayout(data=2, tensor=2, context=2), 1, True, "1f1b"),
        (RankLayout(pipeline=2, context=2), 2, False, "zb-v"),
    ]:
        answers = pool.run(measured, tokens_path, sequences, *how, layout=layout)
        assert all(answer == answers[0] for answer in answers), f"{layout}: {answers}"
        assert answers[0] == (pytest.approx(nats, rel=1e-12), count, text_bytes), str(layout)


def test_perplexity_and_bits_per_byte_follow_from_the_sums() -> None:
    result = HeldOutLoss(total_nats=10 * math.log(8.0), tokens=10, text_bytes=15)
    assert result.perplexity == pytest.approx(8.0)
    assert result.bits_per_byte == pytest.approx(2.0)
    assert result.record() == {
        "evaluate/loss": result.loss,
        "evaluate/perplexity": result.perplexity,
        "evaluate/bits_per_byte": result.bits_per_byte,
    }


def test_a_loss_beyond_all_bounds_is_still_a_number() -> None:
    assert HeldOutLoss(1e6, 1, 1).perplexity == math.inf
    assert math.isnan(HeldOutLoss(math.nan, 1, 1).perplexity)
    assert math.isnan(HeldOutLoss(1.0, 1, 0).bits_per_byte)
