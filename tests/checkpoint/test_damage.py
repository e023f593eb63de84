"""Foreign and incomplete checkpoints: none is read in silence; an error is a line with a remedy. See test_fuzz too."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from megalm.checkpoint.manifest import VERSION
from megalm.checkpoint.names import MANIFEST
from megalm.checkpoint.reader import CheckpointReader
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.errors import CheckpointError
from tests.checkpoint.simulated import small_model, write_ranks, zero_fragments


def read_everything(path: Path) -> None:
    reader = CheckpointReader(path)
    model = small_model()
    for name in reader.names("weight"):
        reader.read_local(ShardSpec.whole(name, tuple(model[name].values.shape)), "weight")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_ranks(tmp_path, 3, zero_fragments(small_model(), "weight", 2, 2), {"note": "\u00e9 seeds", "a": 1.5})


def fails(action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and ";" in message, message
    for part in parts:
        assert part in message, message


def test_swapped_and_foreign_files_are_caught(checkpoint: Path, tmp_path: Path) -> None:
    other = write_ranks(tmp_path / "other", 3, zero_fragments(small_model(1), "weight", 2, 2))
    one, two = sorted(checkpoint.glob("rank-*"))[:2]
    first = one.read_bytes()
    one.write_bytes((other / one.name).read_bytes())
    fails(lambda: read_everything(checkpoint), one.name, "SHA-256")
    one.write_bytes(two.read_bytes())
    fails(lambda: read_everything(checkpoint), one.name)
    one.unlink()
    one.symlink_to(other / one.name)
    fails(lambda: read_everything(checkpoint), one.name)
    one.unlink()
    one.write_bytes(first)
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000009"))
    fails(lambda: read_everything(checkpoint.with_name("step-00000009")), "holds step 3")


def rewrite(checkpoint: Path, old: str, new: str) -> None:
    """Change the manifest's text and give it the checksum that belongs to it."""
    import hashlib

    path = checkpoint / MANIFEST
    text = path.read_text()
    assert old in text
    body = text[: text.rindex('\n"checksum"')].replace(old, new)
    path.write_text(body + f'\n"checksum": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (f'"version": {VERSION}', f'"version": {VERSION + 1}', "newer"),
        ("rank-00000-weight", "../rank-00000-weight", "file name"),
        ("rank-00000-weight", "/etc/passwd", "file name"),
        ('"megalm-checkpoint"', '"other"', "format"),
        ('"step": 3', '"step": ' + "[" * 50_000 + "]" * 50_000, "manifest.json"),
        ('"step": 3', '"step": ' + "9" * 5_000, "manifest.json"),
    ],
)
def test_manifests_of_other_programs_and_of_attackers_are_refused(
    checkpoint: Path, old: str, new: str, says: str
) -> None:
    rewrite(checkpoint, old, new)
    fails(lambda: read_everything(checkpoint), says)


def test_a_giant_header_is_refused_before_memory_is_taken(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000-weight.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    reader = CheckpointReader(checkpoint, verify=False)
    fails(lambda: reader.read_local(ShardSpec.whole("embedding.weight", (37, 8)), "weight"), path.name, "header")


def test_another_model_is_told_the_tensor_and_both_shapes(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    spec = ShardSpec.whole("embedding.weight", (64, 8))
    fails(lambda: reader.read_local(spec, "weight"), "embedding.weight", "(37, 8)", "(64, 8)", "config.yaml")
    fails(
        lambda: reader.read_local(ShardSpec.whole("position.weight", (9, 8)), "weight"),
        "no tensor position.weight",
    )
    fails(
        lambda: reader.read_local(ShardSpec.whole("embedding.weight", (37, 8)), "exp_avg"),
        "exp_avg",
        "has weight",
    )


def test_memory_that_does_not_fit_is_not_read_into(checkpoint: Path) -> None:
    reader, spec = CheckpointReader(checkpoint), ShardSpec.whole("final_norm.weight", (8,))
    for out in (torch.ones(9), torch.ones(7), torch.ones(2, 4)):
        fails(lambda out=out: reader.read_flat(spec, "weight", 0, 8, out=out), "correct the caller")  # type: ignore[misc]
        assert out.eq(1).all()
    right = reader.read_flat(spec, "weight", 0, 8)
    for out in (torch.ones(8), torch.ones(8, dtype=torch.float64), torch.ones(16)[::2], nn.Parameter(torch.ones(8))):
        with torch.no_grad():
            assert reader.read_flat(spec, "weight", 0, 8, out=out) is out and torch.equal(out.float(), right)


def fragment(start: int, stop: int, index: int = 0, dtype: torch.dtype = torch.float32) -> Fragment:
    return Fragment(ShardSpec.split("x", (8, 4), 0, index, 2), "weight", start, torch.ones(stop - start, dtype=dtype))


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([[fragment(0, 16)]], "indices 4 to 8 of dim 0 are missing"),
        ([[fragment(0, 10)], [fragment(12, 16), fragment(0, 16, 1)]], "elements 10 to 12 are missing"),
        ([[fragment(0, 12)], [fragment(10, 16), fragment(0, 16, 1)]], "elements 12 to 10 are written twice"),
        ([[fragment(0, 16), fragment(0, 16, 1)], [fragment(0, 16)]], "written twice"),
        ([[fragment(0, 16), fragment(0, 16)]], "given twice"),
        ([[fragment(0, 16)], [fragment(0, 16, 1, torch.bfloat16)]], "dtype"),
        ([[fragment(0, 17)]], "outside of the 16 elements"),
    ],
)
def test_a_save_with_gaps_or_doubles_is_refused(tmp_path: Path, ranks: list[list[Fragment]], says: str) -> None:
    fails(lambda: write_ranks(tmp_path, 1, ranks), says, "x")


@pytest.mark.parametrize("state", [{"a": {1: 2}}, {"a": [torch.ones(1)]}, {"a": b"x"}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    fails(lambda: write_ranks(tmp_path, 1, [[fragment(0, 16), fragment(0, 16, 1)]], state), "state.a")


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"loss": 0.1 + 0.2, "tokens": 2**53 + 1, "best": float("inf"), "text": "\u2028\x00", "none": None}
    path = write_ranks(tmp_path, 1, [[fragment(0, 16), fragment(0, 16, 1)]], state)
    found = CheckpointReader(path).state
    assert found == {**state, "best": "Infinity"}, "as JSON has no such numbers"
    assert "Infinity," not in (path / "state.json").read_text() and float(found["best"]) == math.inf
