"""Any part of any tensor, from the bytes that it needs; and what nobody should trust is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalm.config.run import RunConfig
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.errors import UserError
from megalm.models.build import build_stage
from megalm.models.huggingface import safetensors_files
from megalm.models.huggingface.importing import import_model
from megalm.models.huggingface.mapping import flat_boxes
from megalm.models.huggingface.reader import HuggingFaceReader
from tests.models.huggingface.families import CONFIGS, VOCAB
from tests.models.huggingface.plain import SMALL, make, raw, tensors_of, values_of
from tests.shards import part_of, spec_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceReader]:
    """Return a reader of each configuration."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: HuggingFaceReader(make(folder / str(n), values_of(name))) for n, name in enumerate(CONFIGS)}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of all reads from here on."""
    sizes: list[int] = []
    plain = safetensors_files.read_into

    def read_into(descriptor: int, path: Path, offset: int, out: Any) -> None:
        sizes.append(out.nbytes)
        plain(descriptor, path, offset, out)

    monkeypatch.setattr(safetensors_files, "read_into", read_into)
    return sizes


def stages(reader: HuggingFaceReader, tensor: int, expert: int = 1) -> list[Any]:
    """Return the parameters of the ranks of a layout, on the meta device."""
    layout = RankLayout(data=expert, tensor=tensor, expert=expert)
    config = RunConfig.model_validate(
        {
            "model": {**reader.section, "kernels": "reference"}, "optim": {"lr": 1.0},
            "train": {"steps": 1, "global_batch": 4, "micro_batch": 1},
            "parallel": {"tensor": tensor, "expert": expert},
        }
    )  # fmt: skip
    meshes = [ParallelMesh.on_meta(layout, rank) for rank in range(tensor * expert)]
    return [parameter for mesh in meshes for parameter in build_stage(config, VOCAB, mesh).parameters()]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shard_is_its_part_of_the_whole(readers: dict[str, HuggingFaceReader], name: str) -> None:
    reader = readers[name]
    wholes = dict(reader.tensors())
    tensor = 4 if reader.model.heads % 4 == 0 and reader.model.key_value_heads in (1, 4) else 2
    for parameter in stages(reader, tensor, expert=2 if (reader.model.experts or 1) % 2 == 0 else 1):
        spec = spec_of(parameter)
        part = part_of(wholes[spec.name], spec)
        assert torch.equal(reader.read_local(spec), part), spec
        size = part.numel()
        for start, stop in ((0, size // 3), (size // 3, size - 1), (size - 1, size), (size, size)):
            assert torch.equal(reader.read_flat(spec, "weight", start, stop), part.flatten()[start:stop]), spec
            wide = torch.full((stop - start,), 7.0, dtype=torch.float64)
            assert reader.read_flat(spec, "weight", start, stop, wide) is wide
            assert torch.equal(wide, part.flatten()[start:stop].double()), spec


@pytest.mark.parametrize("name", ["gpt2", "llama 3, grouped, tied", "mixtral", "gemma 2"])
def test_ranks_together_read_each_byte_once(
    readers: dict[str, HuggingFaceReader], counted: list[int], name: str
) -> None:
    """Of what is divided: what every rank holds whole, each of them reads."""
    reader = readers[name]
    before, wanted = reader.bytes_read, 0
    for parameter in stages(reader, 2):
        spec = spec_of(parameter)
        wanted += 4 * part_of(torch.zeros(spec.global_shape), spec).numel()
        if spec.dim is not None:  # but for padding
            wanted -= 4 * (prod(spec.local_shape) - prod(spec.local_shape) // spec.local_shape[spec.dim] * spec.length)
        reader.read_local(spec)
    assert reader.bytes_read - before == wanted
    assert sum(counted) <= 2 * wanted  # where a matrix is cut across short rows, each is read with the other's half


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_of_a_range_are_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    boxes = list(flat_boxes(tuple(shape), start, stop))
    found = [whole[tuple(slice(*bounds) for bounds in box)].flatten() for box in boxes]
    assert torch.equal(torch.cat([torch.arange(0), *found]), torch.arange(start, stop))
    assert len(boxes) <= 2 * len(shape)


def test_a_view_with_gaps_is_read_in_blocks(tmp_path: Path, counted: list[int]) -> None:
    path = tmp_path / "model.safetensors"
    whole = torch.randn(700, 300)
    path.write_bytes(
        raw({"w": {"dtype": "F32", "shape": [700, 300], "data_offsets": [0, 840_000]}}, whole.numpy().tobytes())
    )
    stored = safetensors_files.read_header(path)["w"]
    counted.clear()
    blank = torch.empty(700, 300, device="meta")
    for view, real in (
        (blank.t()[40:190], whole.t()[40:190]),
        (blank[:, 5:6], whole[:, 5:6]),
        (blank[3:4], whole[3:4]),
    ):
        assert torch.equal(safetensors_files.read_view(stored, view), real)
    assert len(counted) == 1 + 700 + 1, "a block with its gaps, runs too far apart, a row"


Damage = Callable[[Path], None]


def changed(**values: Any) -> Damage:
    """Change the config.json."""
    return lambda directory: (directory / "config.json").write_text(json.dumps({**SMALL, **values})) and None


def header(value: Any, payload: bytes = b"") -> Damage:
    """Put another file of weights in place."""
    return lambda directory: (directory / "model.safetensors").write_bytes(raw(value, payload)) and None


def tensor(**changes: Any) -> Damage:
    """Put a file of one tensor in place."""
    plain = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return header({"model.norm.weight": {**plain, **changes}}, bytes(8))


def index(weight_map: Any) -> Damage:
    """Put an index beside the file."""
    text = json.dumps({"weight_map": weight_map})
    return lambda directory: (directory / "model.safetensors.index.json").write_text(text) and None


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def linked(name: str) -> Damage:
    """Replace a file by a link to it, moved to another directory."""

    def link(directory: Path) -> None:
        elsewhere = directory.with_name("elsewhere")
        elsewhere.mkdir()
        (directory / name).rename(elsewhere / name)
        (directory / name).symlink_to(elsewhere / name)

    return link


def text(name: str, content: str | bytes) -> Damage:
    """Write a file's content."""
    return lambda directory: (
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def extra(**tensors: Tensor) -> Damage:
    """Add tensors, or put others in place."""
    return lambda directory: make(directory, SMALL, **tensors) and None


def lacking(name: str) -> Damage:
    """Leave a tensor out."""
    return lambda directory: make(directory, SMALL, **{name: None}) and None


DAMAGES: dict[str, tuple[Damage, str]] = {
    "only a pickle": (only_a_pickle, "pytorch_model.bin, a pickle, which may run any program"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "config.json: cannot read"),
    "linked weights": (linked("model.safetensors"), "a symbolic link, which is not followed"),
    "linked config": (linked("config.json"), "a symbolic link, which is not followed"),
    "a pipe for weights": (
        lambda d: ((d / "model.safetensors").unlink(), os.mkfifo(d / "model.safetensors"))[1], "not a regular file",
    ),
    "config of deep lists": (text("config.json", "[" * 200_000), "config.json: not JSON"),
    "config that is a list": (text("config.json", "[]"), "a list, not an object"),
    "config with a key twice": (text("config.json", '{"a": 1, "a": 2}'), "a key stands twice"),
    "header of deep lists": (header(b"[" * 200_000), "not JSON"),
    "header longer than the file": (
        text("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"), "a header of 1099511627776",
    ),
    "header that says nothing": (text("model.safetensors", b"{}"), "a header of"),
    "no file at all": (text("model.safetensors", b""), "a header of 0 bytes in a file of 0"),
    "shape larger than the bytes": (tensor(shape=[2**40]), "of shape [1099511627776] has bytes [0, 8]"),
    "shape that overflows": (tensor(shape=[2**47, 2**47]), "has bytes [0, 8]"),
    "negative shape": (tensor(shape=[-2, -1]), "is no description of a tensor"),
    "shape of booleans": (tensor(shape=[True, 2]), "is no description of a tensor"),
    "shape of a hundred dims": (tensor(shape=[1] * 100), "is no description of a tensor"),
    "offsets beyond the file": (tensor(data_offsets=[80, 88]), "begins at byte"),
    "offsets backwards": (tensor(data_offsets=[8, 0]), "has bytes [8, 0]"),
    "unknown dtype": (tensor(dtype="PICKLE"), "has dtype 'PICKLE'"),
    "a dtype that is no text": (tensor(dtype=["F32"]), "has dtype ['F32']"),
    "integers for weights": (
        extra(**{"model.norm.weight": torch.zeros(8, dtype=torch.int32)}), "is torch.int32 of shape (8,)",
    ),
    "bytes that belong to nobody": (header({}, bytes(8)), "its tensors end at byte 10, the file has 18"),
    "two tensors on the same bytes": (
        header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)), "begins at byte",
    ),
    "a header that is text": (header("x"), "a str, not an object"),
    "an index with a path": (index({"a": "../outside.safetensors"}), "is not the name of a file beside it"),
    "an index with an absolute path": (index({"a": "/etc/passwd"}), "is not the name of a file beside it"),
    "an index with a number": (index({"a": 5}), "is not the name of a file beside it"),
    "an index with a list": (index({"a": []}), "[] is not the name of a file beside it"),
    "an index without tensors": (index({}), "weight_map is no list"),
    "an index of other tensors": (index({"a": "model.safetensors"}), "is in the file or in"),
    "an index of missing files": (index({"a": "model-00001-of-00002.safetensors"}), "cannot read"),
    "a million layers": (changed(num_hidden_layers=1_000_000), "num_hidden_layers=1000000 is no whole number from 1"),
    "more layers than tensors": (
        changed(num_hidden_layers=1000), "num_hidden_layers=1000 is more layers than there are tensors, 21",
    ),
    "windows of more layers than tensors": (
        changed(model_type="qwen2", use_sliding_window=True, num_hidden_layers=2**17, max_window_layers=2**16),
        "num_hidden_layers=131072 is more layers than there are tensors",
    ),
    "more experts than tensors": (
        changed(model_type="mixtral", num_local_experts=10**5), "num_local_experts=100000 is more experts than",
    ),
    "layers that are a text": (changed(num_hidden_layers="two"), "num_hidden_layers='two' is no whole number"),
    "layers that are missing": (changed(num_hidden_layers=None), "num_hidden_layers=None is no whole number"),
    "negative width": (changed(hidden_size=-8), "hidden_size=-8 is no whole number"),
    "positions without end": (changed(max_position_embeddings=10**12), "is no whole number from 1 to 16777216"),
    "an epsilon that is no number": (changed(rms_norm_eps=float("nan")), "rms_norm_eps=nan is no number"),
    "a flag that is a number": (changed(tie_word_embeddings=1), "tie_word_embeddings=1 is neither true nor false"),
    "another activation": (changed(hidden_act="gelu"), "hidden_act='gelu' is an activation that megalm lacks"),
    "positions by kinds of layers": (changed(rope_parameters={"a": {"rope_theta": 1.0}}), "by kinds of layers"),
    "positions that grow by themselves": (
        changed(rope_scaling={"type": "dynamic", "factor": 2.0}), "a scaling that megalm lacks",
    ),
    "quantized": (changed(quantization_config={"bits": 4}), "is quantized weights, which megalm has not"),
    "heads that do not divide": (
        changed(num_key_value_heads=3), "config.json: num_attention_heads (model.heads)=2 is not divisible by",
    ),
    "BERT": (changed(model_type="bert"), "bidirectional), token types"),
    "T5": (changed(model_type="t5"), "an encoder, cross-attention"),
    "a family that is a list": (changed(model_type=[]), "is no family that megalm reads"),
    "an unknown family": (changed(model_type="rwkv"), "is no family that megalm reads"),
    "another width": (changed(intermediate_size=16), "of which config.json makes a float of shape (16, 8)"),
    "a tensor too many": (extra(**{"score.weight": torch.zeros(2, 8)}), "is none of a Llama model"),
    "a tensor too few": (lacking("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight"),
    "a head of its own that is tied": (changed(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    "a tokenizer that is none": (text("tokenizer.json", "{}"), "is not a tokenizer.json"),
    "a token that is a text": (changed(eos_token_id="</s>"), "eos_token_id='</s>' is neither a token's number nor"),
    "a list of tokens with a text": (changed(eos_token_id=[1, "x"]), "is neither a token's number nor a list"),
    "generation that is a list": (text("generation_config.json", "[]"), "a list, not an object"),
    "a template that is no text": (text("chat_template.jinja", b"\xff"), "no text in UTF-8"),
    "a template that is long": (text("chat_template.jinja", bytes(17 << 20)), "at most 16777216 are read"),
    "a linked template": (
        lambda d: (d / "chat_template.jinja").symlink_to("/etc/hostname"), "a symbolic link, which is not followed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_nothing_is_made_of_what_cannot_be_trusted(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    source = make(tmp_path / "source")
    damage(source)
    with pytest.raises(UserError) as caught:
        import_model(source, tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "elsewhere") == ["source"]


def refuse_all_in_little_memory(folder: str) -> None:
    """Import each damaged directory where 128 MiB more than are in use cannot be had; for a process of its own."""
    sources = [make(Path(folder) / str(number) / "source") for number in range(len(DAMAGES))]
    import_model(sources[0], Path(folder) / "whole")  # so that what is imported late is there
    for source, (damage, _) in zip(sources, DAMAGES.values(), strict=True):
        damage(source)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (128 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for source in sources:
        with pytest.raises(UserError):
            import_model(source, source.with_name("run"))


def test_what_cannot_be_trusted_takes_little_memory(tmp_path: Path) -> None:
    program = f"from {__name__} import refuse_all_in_little_memory as refuse; refuse({str(tmp_path)!r})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_not_damaged_is_taken(tmp_path: Path) -> None:
    """The same directory, also of a bare model, of old files with buffers, and of a tied head that is written out."""
    import_model(make(tmp_path / "plain"), tmp_path / "run")
    whole = dict(HuggingFaceReader(tmp_path / "plain").tensors())
    tensors = tensors_of(SMALL)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    none = dict.fromkeys(tensors, None)
    make(tmp_path / "bare", SMALL, **{**none, **bare})
    make(tmp_path / "old", SMALL, **old)
    for name in ("bare", "old"):
        found = dict(HuggingFaceReader(tmp_path / name).tensors())
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    tied = {**SMALL, "tie_word_embeddings": True}
    copy = {"lm_head.weight": tensors_of(tied)["model.embed_tokens.weight"].clone()}
    assert "head.weight" not in HuggingFaceReader(make(tmp_path / "tied", tied, **copy)).bound


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        import_model(make(tmp_path / "source"), tmp_path / "run")
