"""Activations in the host's memory: what leaves, when it is free, when it is back, and that no bit changes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import ConfigError
from megalm.launch.checks import check_device
from megalm.models import offload
from megalm.models.build import build_stage
from megalm.models.offload import Offload
from megalm.models.transformer import Transformer
from megalm.nn.masks import DropoutKeys
from tests.offloading import ArrayMover, offloading_on_a_cpu
from tests.parity.harness import LLAMA, VOCAB, Case, train_rank
from tests.parity.options import BALANCED, LATENT
from tests.worker_pool import WorkerPool

OFFLOAD = {"train.offload_activations": True}
SHAPE: dict[str, Any] = {"model.layers": 5, "model.hidden": 32, "model.sequence": 16}
DROPOUT = {"model.dropout": 0.1}


class Noting(ArrayMover):
    """Notes what is asked of it, and knows of each storage that it has copied whether it is still there."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.sent: list[list[weakref.ref[Any]]] = []
        self.left_bytes = 0

    def to_host(self, flats: Sequence[Tensor]) -> tuple[list[Any], Any]:
        number = len(self.sent)
        self.said.append(f"send {number}")
        self.sent.append([weakref.ref(flat.untyped_storage()) for flat in flats])
        self.left_bytes += sum(flat.nbytes for flat in flats)
        return super().to_host(flats)[0], f"sent {number}"

    def to_device(self, copies: Sequence[Any]) -> tuple[list[Tensor], Any]:
        self.said.append("bring")
        return super().to_device(copies)[0], "brought"

    def wait(self, event: Any) -> None:
        self.said.append(f"wait: {event}")

    def release(self, flats: Sequence[Tensor]) -> None:
        self.said.append("release")

    def there(self) -> list[int]:
        """Return of each block how many of its storages are still there."""
        return [sum(storage() is not None for storage in block) for block in self.sent]


def alone(device: str = "cpu") -> ParallelMesh:
    return replace(ParallelMesh.on_meta(RankLayout(), 0), device=torch.device(device))


def recipe(**overrides: Any) -> RunConfig:
    return Case(overrides={**SHAPE, **overrides}).config()


def model_of(config: RunConfig, mover: offload.Mover | None, small: int = 0) -> Transformer:
    model = build_stage(config, VOCAB, alone(), document_start=0)
    model.offload = None if mover is None else Offload(mover, small=small)
    return model


def batch(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, DropoutKeys]:
    tokens_BT = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    return tokens_BT, tokens_BT.roll(-1, 1), tokens_BT >= 0, DropoutKeys(1, 2, 3)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_storages_are_free_two_blocks_later_and_back_one_block_ahead() -> None:
    mover = Noting()
    model = model_of(recipe(), mover)
    loss = model(*batch())
    assert mover.said == [
        "send 0",
        "send 1",
        "wait: sent 0",
        "send 2",
        "wait: sent 1",
        "send 3",
        "wait: sent 2",
        "send 4",
    ]
    there = mover.there()
    assert there[:3] == [0, 0, 0] and min(there[3:]) > 5
    mover.said.clear()
    loss.backward()
    # The last two blocks are still here; of the others each is on its way while the one behind it is computed.
    assert mover.said == [
        "release",
        "release",
        "bring",
        "wait: brought",
        "bring",
        "wait: brought",
        "bring",
        "wait: brought",
    ]
    assert model.offload is not None and model.offload.host_bytes.now == 0 < model.offload.host_bytes.peak
    del loss
    assert mover.there() == [0] * 5 and not model.offload._leaving and model.offload._coming is None


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_pass_behind_another_frees_what_the_first_kept(recompute: str) -> None:
    """As in a pipeline's warm-up: forwards of several microbatches, then their backwards."""
    mover = Noting()
    model = model_of(recipe(**{"train.recompute": recompute}), mover)
    losses = [model(*batch()) for _ in range(3)]
    there = mover.there()
    assert sum(there[:13]) == 0 and all(there[13:]), there
    for number, loss in enumerate(losses):
        loss.backward()
        losses[number] = None
    assert mover.there() == [0] * 15
    plain = model_of(recipe(**{"train.recompute": recompute}), None)
    for _ in range(3):
        plain(*batch()).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))


class Late(ArrayMover):
    """Copies as late as a stream may, when it is waited for; nobody may have freed what is copied until then."""

    def __init__(self) -> None:
        self.open: list[tuple[weakref.ref[Any], torch.dtype, Any, list[Any]]] = []
        self.numbers = itertools.count()

    def to_host(self, flats: Sequence[Tensor]) -> tuple[list[Any], Any]:
        copies = [[flat.dtype] for flat in flats]
        return copies, self._later("out", flats, copies)

    def to_device(self, copies: Sequence[Any]) -> tuple[list[Tensor], Any]:
        assert all(len(copy) == 2 for copy in copies), "what has not left yet is brought"
        flats = [torch.full((copy[1].size // copy[0].itemsize,), torch.nan).to(copy[0]) for copy in copies]
        return flats, self._later("back", flats, copies)

    def _later(self, way: str, flats: Sequence[Tensor], copies: Sequence[Any]) -> tuple[str, int]:
        event = way, next(self.numbers)
        storages = [weakref.ref(flat.untyped_storage()) for flat in flats]
        self.open += [(ref, flat.dtype, event, copy) for ref, flat, copy in zip(storages, flats, copies, strict=True)]
        return event

    def wait(self, event: Any) -> None:
        for one in [one for one in self.open if one[2] == event]:
            reference, dtype, (way, _), copy = one
            storage = reference()
            assert storage is not None, f"freed on its way {way}"
            array = torch.empty(0, dtype=dtype).set_(storage).view(torch.uint8).numpy()  # type: ignore[call-overload]
            if way == "out":
                copy.append(array.copy())
            else:
                array[:] = copy[1]
        self.open = [one for one in self.open if one[2] != event]

    def release(self, flats: Sequence[Tensor]) -> None:
        keys = {flat.untyped_storage()._cdata for flat in flats}
        there = [(one, one[0]()) for one in self.open]
        self.open = [one for one, storage in there if storage is not None and storage._cdata not in keys]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_copies_may_be_as_late_as_they_are_waited_for(recompute: str) -> None:
    """In a step of 1f1b: two forwards ahead, then a forward and a backward in turn, then what is left."""
    mover, found = Late(), []
    for moves in (mover, None):
        model = model_of(recipe(**DROPOUT, **{"train.recompute": recompute}), moves)
        losses = [model(*batch()) for _ in range(2)]
        for _ in range(3):
            losses.append(model(*batch()))
            losses.pop(0).backward()
        while losses:
            losses.pop().backward()
        found.append(gradients(model))
    assert not mover.open
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_with_blocks_that_are_recomputed_their_inputs_leave_alone() -> None:
    mover = Noting()
    model = model_of(recipe(**{"train.recompute": "full"}), mover)
    model(*batch()).backward()
    assert [len(block) for block in mover.sent] == [1] * 5
    assert mover.left_bytes == 5 * 2 * 16 * 32 * 8


def test_a_storage_leaves_once_and_neither_weights_nor_leaves_nor_small_ones_do() -> None:
    class Strict(Noting):
        def to_host(self, flats: Sequence[Tensor]) -> tuple[list[Any], Any]:
            keys = [flat.untyped_storage()._cdata for flat in flats]
            assert len(set(keys)) == len(keys)
            assert not set(keys) & {tensor.untyped_storage()._cdata for tensor in stay}
            assert all(flat.nbytes >= 1024 for flat in flats)
            return super().to_host(flats)

    # One rotation for all layers, projections cut into views, and a weight that is flattened: parts of one storage.
    config = recipe(**{**LLAMA, "model.kv_heads": 1})
    model = build_stage(config, VOCAB, alone())
    model.plan = replace(model.plan, first=False)
    hidden_BTD = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    position: Any = model.position
    stay = [*model.parameters(), hidden_BTD, position.cos_TR, position.sin_TR]
    model.offload = Offload(Strict(), [position.cos_TR, position.sin_TR], small=1024)
    _, *rest = batch()
    model(hidden_BTD, *rest).backward()
    assert hidden_BTD.grad is not None


def test_the_model_tells_of_its_own_tables() -> None:
    with offloading_on_a_cpu():
        model = build_stage(recipe(**LLAMA, **OFFLOAD), VOCAB, alone())
    position: Any = model.position
    assert model.offload is not None
    assert model.offload._lasting == {table.untyped_storage()._cdata for table in (position.cos_TR, position.sin_TR)}


def test_what_is_read_before_the_backward_pass_or_twice_is_brought() -> None:
    mover = Noting()
    offloaded = Offload(mover, small=0)
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    results = [offloaded.run(lambda: (x * 1.0).exp(), nn.Identity(), x) for _ in range(4)]
    values = [result.detach().clone() for result in results]
    node: Any = results[0].grad_fn
    del results[1:]
    assert "bring" not in mover.said
    assert torch.equal(node._saved_result, values[0]) and mover.said.count("bring") == 1
    results[0].sum().backward(retain_graph=True)
    results[0].sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2.0 * values[0]) and mover.said.count("bring") == 1


def test_without_gradients_nothing_leaves() -> None:
    mover = Noting()
    model = model_of(recipe(), mover)
    with torch.no_grad():
        model(*batch())
    assert not mover.said
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(*batch())
    assert not mover.sent


def test_a_run_on_a_cpu_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.offload_activations=true .* where this run on cpu has them already; use"
    ):
        check_device(recipe(**OFFLOAD))
    with pytest.raises(
        ConfigError, match=r"train\.offload_activations=true has no effect without run\.device=cuda or auto"
    ):
        recipe(**OFFLOAD, **{"run.device": "cpu"})


def same_bits(mesh: ParallelMesh, case: Case) -> int:
    """Return the most bytes that lay in the host; the gradients of a rank must be those without the switch."""
    peaks: list[int] = []

    def watch(trainer: Any) -> None:
        module = trainer.engine.module
        trainer.before_update.append(lambda _: peaks.append(module.offload.host_bytes.peak if module.offload else 0))

    ours = train_rank(mesh, case.config(**{"train__offload_activations": True}), 2, watch)
    plain = train_rank(mesh, case.config(), 2)
    for (_, _, one), (_, _, other) in zip(ours.gradients, plain.gradients, strict=True):
        assert torch.equal(one, other)
    assert (ours.losses, ours.norms) == (plain.losses, plain.norms)
    return peaks[-1]


CASES = [
    Case(2, 1, 1, {"parallel.schedule": "zb-h1", **DROPOUT}),
    Case(2, 1, 1, {"parallel.schedule": "zb-v", "train.recompute": "full", **LLAMA}),
    Case(2, 1, 1, {"parallel.schedule": "dualpipe-v", "train.recompute": "selective", **DROPOUT}),
    Case(2, 1, 1, {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2, "model.mtp_depth": 1}),
    Case(1, 1, 2, {"parallel.sequence": True, **LATENT, "model.position": "rotary", "train.recompute": "full"}),
    Case(1, 2, 1, {**BALANCED, "parallel.expert": 2, "train.recompute": "full", "train.recompute_every": 2}),
    Case(1, 1, 1, {"parallel.context": 2, **LLAMA, **DROPOUT}),
    Case(1, 1, 1, {"train.recompute": "selective", "model.position": "t5", "model.document_mask": True}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_the_same_bits(pool: WorkerPool, case: Case) -> None:
    assert min(pool.run(same_bits, case, layout=case.layout)) > 0


def test_weights_that_zero_3_gathers_are_not_offloaded(pool: WorkerPool) -> None:
    """Neither as they are nor flattened: as much leaves as where they are whole."""
    for kind in ({}, LLAMA):
        whole, divided = (Case(1, 2, 1, {**kind, "zero.stage": stage}) for stage in (0, 3))
        peaks = [pool.run(same_bits, case, layout=case.layout) for case in (whole, divided)]
        assert peaks[0] == peaks[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_on_a_gpu_the_bits_are_the_same_and_the_peak_is_lower(recompute: str) -> None:
    large = {"model.layers": 12, "model.hidden": 1024, "model.heads": 16, "model.sequence": 2048, "precision": "bf16"}
    tokens_BT = torch.randint(VOCAB, (4, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for more in ({}, OFFLOAD):
        config = recipe(**large, **DROPOUT, **more, **{"train.recompute": recompute})
        model = build_stage(config, VOCAB, alone("cuda"))
        for _ in range(3):  # the third uses memory again, of pinned memory too
            torch.cuda.reset_peak_memory_stats()
            model.zero_grad(set_to_none=False)
            losses = [model(tokens_BT, tokens_BT, tokens_BT >= 0, DropoutKeys(1, 2, n)) for n in range(3)]
            for loss in losses:
                loss.backward()
        found.append((losses, gradients(model), torch.cuda.max_memory_allocated()))
    (plain_losses, plain, most), (losses, ours, least) = found
    assert all(torch.equal(a, b) for a, b in zip([*plain, *plain_losses], [*ours, *losses], strict=True))
    assert least < (0.5 if recompute == "none" else 0.9) * most
