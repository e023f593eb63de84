"""Megatron-LM's format torch_dist: chunks of whole tensors, with masters and moments kept by parameter."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megalm.errors import CheckpointError
from megalm.models.foreign.command import import_model
from megalm.models.foreign.megatron_distributed import ChunkedTensor, _placed
from megalm.models.foreign.read import read_foreign_megatron
from tests.models.foreign.gpt import TE, Weights, arguments, logits, random_weights, renamed, tensor_rank
from tests.models.foreign.runs import logits_of, tensors_of
from tests.models.foreign.test_megatron import LLAMA, TOKENS, ours

DIRECTORY = "iter_0000040"


def whole_tensors(weights: Weights, stacked: bool) -> dict[str, Tensor]:
    """Return the model as megatron.core describes it to this format: names of the whole model, gates before the rest.

    Versions before 0.14 stack the layers in a first dim, and leave their number out of the name.
    """
    tensors = renamed(tensor_rank(LLAMA, weights, 0, 1), TE)
    if not stacked:
        return tensors
    first = {name: name.replace("layers.0.", "layers.") for name in tensors if "layers.0." in name}
    found = {name: tensor for name, tensor in tensors.items() if "layers." not in name}
    for name, short in first.items():
        found[short] = torch.stack([tensors[name.replace("layers.0.", f"layers.{n}.")] for n in range(LLAMA.layers)])
    return found


def write(directory: Path, tensors: dict[str, Tensor], cut: int, name: str = "__0_0.distcp") -> None:
    """Write tensors as torch's FileSystemWriter does, each first dim in chunks of `cut`."""
    index, places = {}, {}
    with (directory / "__0_0.distcp").open("wb") as file:
        for key, tensor in tensors.items():
            chunks = []
            for at in range(0, tensor.shape[0], cut):
                part, offsets = tensor[at : at + cut].clone(), torch.Size([at] + [0] * (tensor.dim() - 1))
                blob = io.BytesIO()
                torch.save(part, blob)
                places[MetadataIndex(key, offsets)] = _StorageInfo(name, file.tell(), len(blob.getvalue()))
                chunks.append(ChunkStorageMetadata(offsets, part.size()))
                file.write(blob.getvalue())
            index[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(Metadata(state_dict_metadata=index, storage_data=places), file)


def save(root: Path, weights: Weights, states: dict[str, Weights], stacked: bool, **options: str) -> Path:
    directory = root / DIRECTORY
    directory.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("40")
    tensors = whole_tensors(weights, stacked)
    for kind, values in states.items():
        named = whole_tensors(values, stacked).items()
        tensors |= {f"optimizer.state.{kind}.{name}": tensor for name, tensor in named}
    tensors["rng_state"] = torch.zeros(3)
    write(directory, tensors, 3, **options)
    common = {"args": arguments(LLAMA, 2, 2, bf16=True), "iteration": 40, "checkpoint_version": 3.0}
    torch.save({**common, "optimizer": {"state": {"common_step": torch.tensor(39)}}}, directory / "common.pt")
    return root


@pytest.mark.parametrize("stacked", [True, False])
def test_masters_and_moments_come_whole_out_of_chunks(tmp_path: Path, stacked: bool) -> None:
    weights = random_weights(LLAMA, torch.float32)
    first, second = ({name: value * factor for name, value in weights.items()} for factor in (0.1, 0.01))
    rounded = {name: value.bfloat16() for name, value in weights.items()}
    states = {"fp32_param": weights, "exp_avg": first, "exp_avg_sq": second}
    root = save(tmp_path / "megatron", rounded, states, stacked)
    theirs = {name: torch.empty_like(tensor) for name, tensor in whole_tensors(rounded, stacked).items()}
    dcp.load(theirs, checkpoint_id=root / DIRECTORY, no_dist=True)  # torch reads what the test has written
    assert all(torch.equal(theirs[name], tensor) for name, tensor in whole_tensors(rounded, stacked).items())
    found = read_foreign_megatron(root)
    assert (found.step, found.precision, found.facts["optimizer_steps"]) == (40, "bf16", 39)
    import_model(found, tmp_path / "run", None)
    for kind, values in (("weight", weights), ("exp_avg", first), ("exp_avg_sq", second)):
        expected, have = ours(LLAMA, values), tensors_of(tmp_path / "run", kind)
        assert expected.keys() == have.keys()
        assert all(torch.equal(have[name], tensor) for name, tensor in expected.items()), kind
    torch.testing.assert_close(
        logits_of(tmp_path / "run", TOKENS), logits(LLAMA, weights, TOKENS), rtol=1e-5, atol=1e-5
    )


def test_what_torch_itself_saves_is_read(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    root = save(tmp_path / "megatron", weights, {}, stacked=False)
    for path in (root / DIRECTORY).glob("*.distcp"):
        path.unlink()
    dcp.save(whole_tensors(weights, stacked=False), checkpoint_id=root / DIRECTORY, no_dist=True)
    import_model(read_foreign_megatron(root), tmp_path / "run", None)
    have = tensors_of(tmp_path / "run")
    assert all(torch.equal(have[name], tensor) for name, tensor in ours(LLAMA, weights).items())


@pytest.mark.parametrize("place", ["../../secret", "/etc/passwd", "a/../b.distcp", ""])
def test_chunks_elsewhere_are_refused(tmp_path: Path, place: str) -> None:
    root = save(tmp_path / "megatron", random_weights(LLAMA), {}, stacked=False, name=place)
    with pytest.raises(CheckpointError, match="not an index"):
        read_foreign_megatron(root)


def less(index: Metadata) -> None:
    chunks_of(index, "output_layer.weight").pop()


def outside(index: Metadata) -> None:
    chunks_of(index, "output_layer.weight")[0].sizes = torch.Size([300, 16])


def overlapping(index: Metadata) -> None:
    """Move the last chunk over the one before: as many elements as before, of which one is twice and one nowhere."""
    last = chunks_of(index, "decoder.final_layernorm.weight")[-1]
    place = index.storage_data.pop(MetadataIndex("decoder.final_layernorm.weight", last.offsets))
    last.offsets = torch.Size([10])
    index.storage_data[MetadataIndex("decoder.final_layernorm.weight", last.offsets)] = place


def many_layers(index: Metadata) -> None:
    """Claim more layers than the files hold."""
    for name, about in index.state_dict_metadata.items():
        if ".layers." in name:
            about.size = torch.Size([LAYERS, *about.size[1:]])
            about.chunks = about.chunks[:1]
            about.chunks[0].sizes = about.size


def chunks_of(index: Metadata, name: str) -> list[ChunkStorageMetadata]:
    about = index.state_dict_metadata[name]
    assert isinstance(about, TensorStorageMetadata)
    return about.chunks


LAYERS = 100_000
DAMAGES: dict[str, tuple[Callable[[Metadata], None], bool, str]] = {
    "less": (less, False, "not an index"),
    "outside": (outside, False, "not an index"),
    "overlapping": (overlapping, False, "the chunks of decoder.final_layernorm.weight are not the whole of it, each"),
    "many layers": (many_layers, True, r"is no tensor of \[100000, "),
    "no more than claimed": (lambda index: None, False, "holds 4 layers, its arguments describe 100000"),
    "stacked, no more than claimed": (lambda index: None, True, r"\[4, .*its arguments describe 100000 layers"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_chunks_that_are_not_the_whole_are_refused(tmp_path: Path, name: str) -> None:
    damage, stacked, reason = DAMAGES[name]
    root = save(tmp_path / "megatron", random_weights(LLAMA), {}, stacked=stacked)
    path, common = (root / DIRECTORY / file for file in (".metadata", "common.pt"))
    index = pickle.loads(path.read_bytes())
    damage(index)
    path.write_bytes(pickle.dumps(index))
    if "layers" in name or "claimed" in name:
        held = torch.load(common, weights_only=False)
        held["args"].num_layers = LAYERS
        torch.save(held, common)
    with pytest.raises(CheckpointError, match=reason):
        read_foreign_megatron(root)


def test_of_nothing_there_are_no_layers() -> None:
    """An empty tensor may have any length without a byte in the files."""
    tensor = ChunkedTensor("decoder.layers.mlp.linear_fc2.weight", (10**9, 0), {})
    with pytest.raises(CheckpointError, match=r"\[1000000000, 0\], its arguments describe 1000000000 layers"):
        list(_placed({tensor.name: tensor}, 10**9, Path("DIR")))


def test_masters_are_enough(tmp_path: Path) -> None:
    weights = random_weights(LLAMA)
    root = save(tmp_path / "megatron", weights, {"fp32_param": weights}, stacked=False)
    path = root / DIRECTORY / ".metadata"
    index = pickle.loads(path.read_bytes())
    for name in [name for name in index.state_dict_metadata if not name.startswith("optimizer.")]:
        del index.state_dict_metadata[name]
    path.write_bytes(pickle.dumps(index))
    have = dict(read_foreign_megatron(root).tensors())
    assert all(torch.equal(have[name], tensor) for name, tensor in ours(LLAMA, weights).items())
