"""Checksums of blocks: what a read checks, how much it reads, and what no damage gets past."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalm.checkpoint.blocks import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    BlockCache,
    CheckedFile,
    FileRecord,
    WrittenDigests,
    hash_file,
    open_regular,
)
from megalm.checkpoint.commands import verify
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.tensor_file import BEGIN_BYTES, write_tensor_file
from megalm.distributed.sharding import ShardSpec
from megalm.errors import CheckpointError, DamagedCheckpoint
from tests.checkpoint.forge import body_of, parsed, seal
from tests.checkpoint.simulated import (
    HastyFileSystem,
    Logical,
    even_fragments,
    small_model,
    write_ranks,
    zero_fragments,
)

BLOCK_VALUES = BLOCK_BYTES // 4
COLUMNS = 1000


def large_model() -> dict[str, Logical]:
    """Return tensors that lie in the middle of a block, in several, and at the end of a file."""
    sizes = {"a": 10, "b": 5 * BLOCK_VALUES + 3, "c": 700, "d": BLOCK_VALUES - 5}
    model = {name: Logical(torch.randn(count)) for name, count in sizes.items()}
    model["e"] = Logical(torch.randn(500, COLUMNS), 1)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Logical]]:
    model = large_model()
    return write_ranks(tmp_path_factory.mktemp("blocks"), 1, zero_fragments(model, "weight", 1, 1)), model


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Give the list of (offset, bytes) of all reads from files."""
    found: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        found.append((offset, count))
        return count

    monkeypatch.setattr("os.preadv", counted)
    yield found


def whole(reader: CheckpointReader, model: dict[str, Logical], name: str) -> Tensor:
    return reader.read_local(ShardSpec.whole(name, tuple(model[name].values.shape)), "weight")


def test_the_manifest_has_the_digests_of_all_bytes(checkpoint: tuple[Path, dict[str, Logical]]) -> None:
    path, _ = checkpoint
    records = Manifest.load(path).files
    assert len(records) == 2
    for record in records.values():
        data = (path / record.name).read_bytes()
        assert record.size == len(data) and (record.sha256 is None) == (record.blocks is not None)
    state = (path / "state.json").read_bytes()
    assert records["state.json"].sha256 == hashlib.sha256(state).hexdigest()
    record = next(record for record in records.values() if record.blocks)
    data = (path / record.name).read_bytes()
    blocks = [data[at : min(at + BLOCK_BYTES, record.end)] for at in range(0, record.end, BLOCK_BYTES)]
    digests = b"".join(hashlib.sha256(block).digest() for block in blocks)
    assert len(blocks) == record.block_count > 12
    assert data[record.end :] == digests and hashlib.sha256(digests).hexdigest() == record.blocks
    size = (path / "manifest.json").stat().st_size
    assert size < 2000, "what a file's blocks need stands in the file"


@pytest.mark.parametrize("end", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 7])
def test_any_range_of_a_file_is_read_and_checked(tmp_path: Path, end: int) -> None:
    data = random.Random(end).randbytes(end)
    parts = [data[at : at + BLOCK_BYTES] for at in range(0, end, BLOCK_BYTES)]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    path = tmp_path / "x"
    path.write_bytes(data + digests)
    record = FileRecord("x", end + len(digests), blocks=hashlib.sha256(digests).hexdigest())
    assert (record.end, record.block_count) == (end, len(parts))
    edges = sorted({min(end, max(0, at + by)) for at in range(0, end + 1, BLOCK_BYTES) for by in (-1, 0, 1)} | {end})
    file = CheckedFile(path, record, BlockCache())
    for start in edges:
        for stop in (edge for edge in edges if edge >= start):
            out = torch.zeros(stop - start, dtype=torch.uint8).numpy()
            with open_regular(path) as opened:
                file.fill(opened.fileno(), start, out)
            assert out.tobytes() == data[start:stop], (start, stop)
    with open_regular(path) as opened, pytest.raises(CheckpointError, match="ends at byte"):
        file.fill(opened.fileno(), end, torch.zeros(1, dtype=torch.uint8).numpy())


def test_a_read_takes_the_blocks_that_it_needs_once(
    checkpoint: tuple[Path, dict[str, Logical]], reads: list[tuple[int, int]]
) -> None:
    path, model = checkpoint
    reader = CheckpointReader(path)
    spec = ShardSpec.whole("b", tuple(model["b"].values.shape))
    reader.read_flat(spec, "weight", 0, 1)
    reads.clear()
    got = reader.read_flat(spec, "weight", 2 * BLOCK_VALUES, 3 * BLOCK_VALUES)
    assert torch.equal(got, model["b"].values[2 * BLOCK_VALUES : 3 * BLOCK_VALUES])
    assert sum(count for _, count in reads) == 2 * BLOCK_BYTES, "a range of a block's length lies in two"
    again = CheckpointReader(path)
    reads.clear()
    for name, item in model.items():
        assert torch.equal(whole(again, model, name), item.values)
    file = next(record for record in again.manifest.files.values() if record.blocks)
    assert sum(count for offset, count in reads if offset < file.end) == file.end, "each block once, shared ones too"
    assert sum(count for _, count in reads) == file.size
    again.close()


def test_columns_of_a_matrix_are_checked_too(checkpoint: tuple[Path, dict[str, Logical]]) -> None:
    path, model = checkpoint
    reader = CheckpointReader(path)
    for index in range(4):
        spec = ShardSpec.split("e", (500, COLUMNS), 1, index, 4)
        assert torch.equal(reader.read_local(spec, "weight"), model["e"].values[:, 250 * index : 250 * (index + 1)])
    reader.close()


def test_a_flipped_bit_is_found_by_who_reads_its_block_and_by_nobody_else(
    checkpoint: tuple[Path, dict[str, Logical]], tmp_path: Path
) -> None:
    source, model = checkpoint
    path = tmp_path / source.name
    shutil.copytree(source, path)
    file = next(path.glob("rank-*"))
    record = Manifest.load(path).files[file.name]
    data, chosen = file.read_bytes(), random.Random(3)
    header = 8 + int.from_bytes(data[:8], "little")
    places = {
        "header": range(header),
        "values": range(header, record.end),
        "digests": range(record.end, record.size),
    }
    read = 0
    for region, where in places.items():
        for _ in range(6):
            at = chosen.choice(where)
            damaged = bytearray(data)
            damaged[at] ^= 1 << chosen.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name):
                verify(path)
            caught = []
            for name, item in model.items():
                try:
                    assert torch.equal(whole(CheckpointReader(path), model, name), item.values)
                    read += 1
                except CheckpointError as error:
                    assert file.name in str(error) and ";" in str(error)
                    caught.append(name)
            assert caught if region == "values" else len(caught) == len(model), (region, at)
    assert read > 6, "blocks that are whole are read as ever"


def test_digests_of_another_file_do_not_fit(checkpoint: tuple[Path, dict[str, Logical]], tmp_path: Path) -> None:
    """Whoever changes a block and its digest has to change the manifest, whose own checksum tells."""
    source, model = checkpoint
    path = tmp_path / source.name
    shutil.copytree(source, path)
    file = next(path.glob("rank-*"))
    record = Manifest.load(path).files[file.name]
    data = bytearray(file.read_bytes())
    data[5 * BLOCK_BYTES] ^= 1
    block = data[5 * BLOCK_BYTES : 6 * BLOCK_BYTES]
    at = record.end + 5 * DIGEST_BYTES
    data[at : at + DIGEST_BYTES] = hashlib.sha256(block).digest()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="blocks' digests"):
        whole(CheckpointReader(path), model, "b")


@pytest.mark.parametrize("parts", [(1,), (BLOCK_BYTES,), (100, BLOCK_BYTES - 100), (7 * BLOCK_BYTES // 2, 5, 300_000)])
def test_digests_do_not_depend_on_how_the_bytes_come(parts: tuple[int, ...]) -> None:
    chunks = [random.Random(count).randbytes(count) for count in parts * 30]
    data = b"".join(chunks)
    with ThreadPoolExecutor(2) as hashers:
        digests = WrittenDigests(hashers)
        for chunk in chunks:
            digests.update(chunk)
        found = digests.finish()
    blocks = (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
    assert found == b"".join(hashlib.sha256(block).digest() for block in blocks)


def test_the_disk_is_told_to_begin_with_a_long_file(tmp_path: Path) -> None:
    class Noting(HastyFileSystem):
        def __init__(self) -> None:
            self.begun: list[tuple[int, int]] = []

        def begin_sync(self, descriptor: int, offset: int, count: int) -> None:
            assert os.fstat(descriptor).st_size == offset + count, "of bytes that are written"
            self.begun.append((offset, count))
            super().begin_sync(descriptor, offset, count)

    files, values = Noting(), torch.zeros(5 * BEGIN_BYTES // 8)
    with ThreadPoolExecutor(1) as hashers:
        record = write_tensor_file(files, tmp_path / "x", [("x", values)], {}, hashers)
    assert len(files.begun) == 2 and files.begun[0][0] == 0 and files.begun[1][0] == files.begun[0][1] >= BEGIN_BYTES
    hash_file(tmp_path / "x", record)


def test_a_record_without_a_digest_is_refused(checkpoint: tuple[Path, dict[str, Logical]], tmp_path: Path) -> None:
    """Or whoever writes a manifest could have the program read without a check."""
    path = tmp_path / checkpoint[0].name
    shutil.copytree(checkpoint[0], path)
    values = parsed(path)
    for nothing in ([None], [None, None], [""], [None, ""], [5], [None, 5]):
        name = values["files"][0][2]
        values["files"][0] = [nothing[0], values["files"][0][1], name, *nothing[1:]]
        seal(path, body_of(values))
        with pytest.raises(DamagedCheckpoint, match="not a manifest"):
            CheckpointReader(path)


def test_a_checkpoint_of_version_2_is_read_and_checked(
    checkpoint: tuple[Path, dict[str, Logical]], tmp_path: Path
) -> None:
    """It had the SHA-256 of whole files besides, to which all of a file is compared where all of it is."""
    source, model = checkpoint
    path = tmp_path / source.name
    shutil.copytree(source, path)
    values = parsed(path)
    for row in values["files"]:
        row[0] = hashlib.sha256((path / row[2]).read_bytes()).hexdigest()
    seal(path, body_of({**values, "version": 2}))
    with closing(CheckpointReader(path)) as reader:
        for name, item in model.items():
            assert torch.equal(whole(reader, model, name), item.values)
    assert verify(path)["checkpoints"][0]["files"] == 2
    values["files"][0][0] = "0" * 64
    seal(path, body_of({**values, "version": 2}))
    with pytest.raises(CheckpointError, match=r"SHA-256 .* is not the manifest's"):
        verify(path)


def test_a_checkpoint_of_version_3_is_read_and_says_what_version_4_does(tmp_path: Path) -> None:
    """It has a row for each piece, where version 4 has one for those that are cut evenly."""
    old = Path(__file__).with_name("version_3") / "step-00000007"
    new = write_ranks(tmp_path, 7, even_fragments(small_model(), "weight", 2, 3))
    found = []
    for path in (old, new):
        with closing(CheckpointReader(path)) as reader:
            for name, item in small_model().items():
                assert torch.equal(whole(reader, small_model(), name), item.values)
            entries = [entry for key in reader.manifest.tensors for entry in reader.manifest.entries(*key)]
            pieces = {(piece.file, piece.key, piece.piece) for entry in entries for piece in entry.pieces()}
            found.append((pieces, len(entries)))
        assert verify(path)["checkpoints"][0]["files"] == 7
    assert found[0][0] == found[1][0] and [rows for _, rows in found] == [21, 7]
    assert {file.name: file.stat().st_size for file in old.glob("rank-*")} == {
        file.name: file.stat().st_size for file in new.glob("rank-*")
    }


def test_a_checkpoint_of_version_1_is_read_and_checked(tmp_path: Path) -> None:
    source = Path(__file__).with_name("version_1") / "step-00000007"
    path = tmp_path / source.name
    shutil.copytree(source, path)
    model = small_model()
    reader = CheckpointReader(path)
    assert reader.step == 7 and reader.kinds() == ["exp_avg", "weight"]
    for name, item in model.items():
        for kind in reader.kinds():
            spec = ShardSpec.whole(name, tuple(item.values.shape))
            assert torch.equal(reader.read_local(spec, kind), item.values)
    assert verify(path)["checkpoints"][0]["files"] == 5
    chosen = random.Random(4)
    for file in sorted(path.glob("rank-*-weight*")):
        data = file.read_bytes()
        for _ in range(10):
            damaged = bytearray(data)
            damaged[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name):
                whole(CheckpointReader(path), model, "embedding.weight")
        file.write_bytes(data)
    reader.close()
