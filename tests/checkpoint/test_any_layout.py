"""A checkpoint of any layout, read into any other: bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.sharding import Fragment
from tests.checkpoint.simulated import Logical, even_fragments, small_model, write_ranks, zero_fragments

shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64])


@st.composite
def models(draw: st.DrawFn) -> dict[str, tuple[Logical, Logical]]:
    """Return tensors as they are split when written and when read (perhaps along another dim)."""
    tensors = {}
    for index in range(draw(st.integers(1, 4))):
        shape = (0, 3) if draw(st.integers(0, 20)) == 0 else draw(shapes)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(draw(dtypes))
        dims = st.one_of(st.none(), st.integers(0, len(shape) - 1)) if shape else st.none()
        tensors[f"blocks.{index}.weight"] = (Logical(values, draw(dims)), Logical(values, draw(dims)))
    return tensors


sizes = st.integers(1, 5)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=models(),
    written=st.tuples(sizes, sizes),
    read=st.tuples(sizes, sizes),
    file_bytes=st.integers(1, 2000),
    cut=st.sampled_from([zero_fragments, even_fragments]),
)
def test_any_layout_reads_what_any_other_wrote(
    model: dict[str, tuple[Logical, Logical]],
    written: tuple[int, int],
    read: tuple[int, int],
    file_bytes: int,
    cut: Callable[..., list[list[Fragment]]],
) -> None:
    sources = {name: source for name, (source, _) in model.items()}
    targets = {name: target for name, (_, target) in model.items()}
    with tempfile.TemporaryDirectory() as directory:
        ranks = cut(sources, "exp_avg", *written)
        path = write_ranks(Path(directory), 7, ranks, file_bytes=file_bytes)
        reader = CheckpointReader(path)
        assert reader.names("exp_avg") == sorted(model)
        for rank, fragments in enumerate(zero_fragments(targets, "exp_avg", *read)):
            for wanted in fragments:
                stop = wanted.start + wanted.values.numel()
                got = reader.read_flat(wanted.shard, "exp_avg", wanted.start, stop)
                into = torch.ones_like(got)
                assert reader.read_flat(wanted.shard, "exp_avg", wanted.start, stop, out=into) is into
                assert torch.equal(into, got)
                assert got.dtype == wanted.values.dtype and torch.equal(got, wanted.values), (
                    rank,
                    wanted.shard,
                )
        for name, item in targets.items():
            for index in range(read[0]):
                spec = item.spec(name, index, read[0])
                local = reader.read_local(spec, "exp_avg")
                assert torch.equal(local, item.local(name, index, read[0])), spec
        reader.close()


def test_bits_survive_that_comparisons_do_not_see(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -1, -(2**31), 0x7F800001, 1], dtype=torch.int32)
    model = {"x.weight": Logical(bits.view(torch.float32))}
    reader = CheckpointReader(write_ranks(tmp_path, 1, zero_fragments(model, "weight", 1, 2)))
    got = reader.read_local(model["x.weight"].spec("x.weight", 0, 1), "weight")
    assert torch.equal(got.view(torch.int32), bits)


def test_a_read_opens_only_the_files_and_bytes_that_it_needs(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = {"x.weight": Logical(torch.randn(64, 1000), 0)}
    weights, moments = (zero_fragments(model, kind, 4, 2) for kind in ("weight", "exp_avg"))
    ranks = [[*one, *two] for one, two in zip(weights, moments, strict=True)]
    path = write_ranks(tmp_path, 1, ranks)
    reader = CheckpointReader(path, verify=False)
    for other in path.glob("rank-*"):
        if other.name != "rank-00002-weight.safetensors":
            other.unlink()
    got = reader.read_flat(model["x.weight"].spec("x.weight", 2, 4), "weight", 100, 200)
    assert torch.equal(got, model["x.weight"].values[32:].flatten()[100:200])
    total = 0
    preadv = __import__("os").preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal total
        count = preadv(descriptor, buffers, offset)
        total += count
        return count

    monkeypatch.setattr("os.preadv", counted)
    reader.read_flat(model["x.weight"].spec("x.weight", 2, 4), "weight", 100, 200)
    assert total == 400


def test_fragments_are_consumed_as_a_stream(tmp_path: Path) -> None:
    alive: list[int] = []
    peak = 0

    def stream():  # type: ignore[no-untyped-def]
        nonlocal peak
        import weakref

        for index in range(50):
            fragment = zero_fragments({f"x{index}": Logical(torch.full((1000,), index))}, "weight", 1, 1)[0][0]
            alive.append(index)
            weakref.finalize(fragment.values, alive.remove, index)
            peak = max(peak, len(alive))
            yield fragment

    path = write_ranks(tmp_path, 1, [stream()], file_bytes=40_000)
    assert peak <= 8, "8000 bytes each, 40000 a file"
    assert len(list(path.glob("rank-00000-weight*"))) == 10
    model = {"x49": Logical(torch.full((1000,), 49))}
    assert CheckpointReader(path).read_local(model["x49"].spec("x49", 0, 1), "weight").eq(49).all()


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = small_model()
    model["half"] = Logical(torch.randn(5).bfloat16())
    path = write_ranks(tmp_path, 1, zero_fragments(model, "weight", 1, 1))
    loaded = load_file(path / "rank-00000-weight.safetensors")
    assert loaded.pop("block-digests").numel() == 32
    assert {key.split("/")[0]: value.numel() for key, value in loaded.items()} == {
        name: item.values.numel() for name, item in model.items()
    }
    for key, value in loaded.items():
        assert torch.equal(value, model[key.split("/")[0]].values.flatten())
