"""Generated tokens: the same in every layout, and those of a plain loop over the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import MegalmError
from megalm.generation.generate import WindowModel, gather_vocabulary, generate_tokens
from megalm.generation.sampling import Sampling, draw_token
from megalm.models.build import build_executor, build_stage
from tests.train.recipes import small_recipe
from tests.worker_pool import WorkerError, WorkerPool

VOCAB, WINDOW, END = 11, 16, 0
# Each pipeline size has a model of its own, so that tied and untied heads and both kinds of positions have
# their turn.
MODELS = {
    1: {"init_std": 0.5, "position": "rotary", "tie_embeddings": False},
    2: {"layers": 4, "init_std": 0.5, "position": "learned", "tie_embeddings": True},
}
PROMPT = [3, 1, 4, 1, 5]
SAMPLINGS = [Sampling(temperature=0.0), Sampling(temperature=1.5, top_k=7, top_p=0.9, seed=8)]
LAYOUTS = [RankLayout(), RankLayout(tensor=2), RankLayout(pipeline=2), RankLayout(pipeline=2, tensor=2)]


def window_model(mesh: ParallelMesh, schedule: str) -> WindowModel:
    config = small_recipe(
        precision="fp64",
        model=MODELS[mesh.layout.pipeline],
        parallel={"tensor": mesh.layout.tensor, "pipeline": mesh.layout.pipeline, "schedule": schedule},
    )
    model = build_stage(config, VOCAB, mesh)
    return WindowModel(build_executor(config, model, mesh), mesh, window=WINDOW, vocab=VOCAB)


def generated(mesh: ParallelMesh, sampling: Sampling, count: int, end: int, schedule: str = "1f1b") -> list[int]:
    return list(generate_tokens(window_model(mesh, schedule), mesh, PROMPT, count, sampling, end))


def plain(mesh: ParallelMesh, sampling: Sampling, count: int, pipeline: int) -> list[int]:
    """The whole model, called on the last tokens again and again."""
    model = build_stage(small_recipe(precision="fp64", model=MODELS[pipeline]), VOCAB, mesh)
    tokens = list(PROMPT)
    for draw in range(count):
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens[-WINDOW:]]))[0, -1]
        tokens.append(draw_token(logits_V, sampling, draw))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_every_layout_continues_as_a_plain_loop_does(pool: WorkerPool, sampling: Sampling) -> None:
    count = 30  # beyond the window of 16
    for layout in LAYOUTS:
        expected = pool.run(plain, sampling, count, layout.pipeline, layout=RankLayout())[0]
        assert len(set(expected)) > 1
        assert pool.run(generated, sampling, count, VOCAB, layout=layout) == [expected] * layout.world_size
    assert pool.run(generated, sampling, count, VOCAB, "zb-v", layout=layout) == [expected] * layout.world_size


def test_generation_stops_at_the_end_of_text_on_all_ranks(pool: WorkerPool) -> None:
    layout = RankLayout(pipeline=2, tensor=2)
    whole = pool.run(generated, SAMPLINGS[1], 30, VOCAB, layout=layout)[0]
    end = whole[7]
    stopped = whole[: whole.index(end)]
    assert pool.run(generated, SAMPLINGS[1], 30, end, layout=layout) == [stopped] * 4


def gathered(mesh: ParallelMesh) -> list[float]:
    rows = -(-VOCAB // mesh.layout.tensor)
    first = mesh.coordinates.tensor * rows
    return gather_vocabulary(torch.arange(first, first + rows).double(), mesh.group("tensor"), VOCAB).tolist()


def test_vocabulary_is_gathered_in_order_without_its_padding(pool: WorkerPool) -> None:
    for ranks in (1, 2, 4):
        assert pool.run(gathered, layout=RankLayout(tensor=ranks)) == [[float(n) for n in range(VOCAB)]] * ranks


class Broken:
    """A model whose logits are not numbers."""

    window = WINDOW

    def __init__(self, mesh: ParallelMesh) -> None:
        self._last = mesh.is_last_stage
        self.loss_stage = mesh.layout.pipeline - 1

    def next_logits(self, tokens: list[int]) -> Tensor | None:
        return torch.full((VOCAB,), float("nan")) if self._last else None


def broken(mesh: ParallelMesh) -> str:
    with pytest.raises(MegalmError) as caught:
        list(generate_tokens(Broken(mesh), mesh, PROMPT, 3, SAMPLINGS[1], END))  # type: ignore[arg-type]
    return str(caught.value)


def test_all_ranks_fail_together_when_no_token_can_be_drawn(pool: WorkerPool) -> None:
    messages = pool.run(broken, layout=RankLayout(pipeline=2, tensor=2), timeout_s=20.0)
    assert "not finite" in messages[2]
    assert all("rank 2 could draw no token" in messages[rank] for rank in (0, 1, 3))


def test_data_ranks_are_refused(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="2 data ranks would all generate the same text"):
        pool.run(generated, SAMPLINGS[0], 1, END, layout=RankLayout(data=2))
