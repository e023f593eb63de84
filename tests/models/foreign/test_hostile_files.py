"""Files that mean harm: nothing in them runs, nothing is written, memory stays bounded, and each is named.

A payload that ran would make the file RAN. The walk itself is in this process here, so that a payload would hit the
test; the process that an import uses is another test's.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.errors import CheckpointError
from megalm.models.foreign import opcodes, torch_file
from megalm.models.foreign.archive import contents_of
from megalm.models.foreign.deepspeed_universal import universal_directory
from megalm.models.foreign.megatron import iteration_directory
from megalm.models.foreign.opcodes import Refused
from megalm.models.foreign.torch_file import Piece, StoredTensor, read_file, read_files

RAN = "/tmp/megalm-test-payload-ran"
SHELL = f"touch {RAN}"
PYTHON = f"open({RAN!r}, 'w')"


class Payload:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


class Armed:
    """Objects whose state is set by a method of their own."""

    def __setstate__(self, state: Any) -> None:
        os.system(SHELL)


def armed(**state: Any) -> Armed:
    made = Armed()
    made.__dict__.update(state)
    return made


@pytest.fixture(autouse=True)
def nothing_ran() -> Any:
    assert not os.path.exists(RAN), "left from before"
    yield
    ran = os.path.exists(RAN)
    Path(RAN).unlink(missing_ok=True)
    assert not ran, "a payload ran"


def archive(data: bytes, others: dict[str, bytes] | None = None, root: str = "a") -> bytes:
    """Return a file as torch.save lays it out, of a pickle and other entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", **(others or {})}.items():
            file.writestr(f"{root}/{name}", content)
    return out.getvalue()


def look(content: bytes, alone: bool = False) -> Any:
    return contents_of(io.BytesIO(content), 0, len(content), alone)


def short(value: int | str) -> bytes:
    text = str(value).encode()
    return b"X" + struct.pack("<I", len(text)) + text


INERT: dict[str, bytes] = {
    "os.system": pickle.dumps(Payload(os.system, SHELL)),
    "eval": pickle.dumps(Payload(eval, PYTHON)),
    "exec": pickle.dumps(Payload(exec, PYTHON)),
    "exec of protocol 0": pickle.dumps(Payload(exec, PYTHON), protocol=0),
    "Popen": pickle.dumps(Payload(__import__("subprocess").Popen, ["touch", RAN])),
    "inside a dict": pickle.dumps({"args": {"deep": [Payload(os.system, SHELL)]}}),
    "as a key": pickle.dumps({Payload(os.system, SHELL): 1}),
    "a call's result called": b"cbuiltins\ngetattr\n(cos\nsystem\n"
    + short("__call__")
    + b"tR("
    + short(SHELL)
    + b"tR.",
    "INST": b"(" + short(SHELL) + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + short(SHELL) + b"o.",
    "NEWOBJ": b"cos\nsystem\n(" + short(SHELL) + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n(" + short(SHELL) + b"t}\x92.",
    "STACK_GLOBAL": b"\x80\x04" + short("os") + short("system") + b"\x93(" + short(SHELL) + b"tR.",
    "a state": pickle.dumps(armed(x=1)),
    "a state on a state": pickle.dumps(Payload(Armed, state=armed(y=armed(z=2)))),
    "a reconstructor": b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\n" + short(SHELL) + b"tR.",
    "a pickle in a pickle": pickle.dumps(
        Payload(torch.storage._load_from_bytes, pickle.dumps(Payload(os.system, SHELL)))
    ),
    "a mapping of calls": b"ccollections\nOrderedDict\n(cos\nsystem\n" + short(SHELL) + b"\x86t\x85R.",
}


@pytest.mark.parametrize("name", INERT)
def test_what_a_pickle_would_call_becomes_a_name(name: str) -> None:
    found = str(look(archive(INERT[name])))
    assert "object" in found or "list" in found


def test_what_is_inert_here_runs_where_it_is_unpickled() -> None:
    """The payloads are real: without the walk one would have run."""
    pickle.loads(INERT["os.system"])
    assert os.path.exists(RAN)
    Path(RAN).unlink()


def deflated(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", data)
    return out.getvalue()


def with_entry(change: Callable[[zipfile.ZipInfo], object], name: str = "a/data/0") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a/data.pkl", b"N.")
        entry = zipfile.ZipInfo(name)
        change(entry)
        file.writestr(entry, b"/etc/passwd")
    return out.getvalue()


def twice() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a/data.pkl", b"N.")
        file.writestr("a/data.pkl", INERT["os.system"])
    return out.getvalue()


def legacy() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def moved() -> bytes:
    content = archive(b"N.")
    return content.replace(b"PK\x03\x04", b"PK\x03\x00", 1)


def laughs(rounds: int = 60) -> bytes:
    """Return lists of which each has the one before twice: 2^60 items in a few hundred bytes."""
    return (
        b"]q\x00"
        + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(rounds))
        + b"."
    )


def persistent(*identity: bytes) -> bytes:
    return b"(" + b"".join(identity) + b"tQ."


FLOAT = b"ctorch\nFloatStorage\n"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "an entry above": (lambda: with_entry(lambda entry: None, "a/../../evil"), "outside the archive"),
    "an absolute entry": (lambda: with_entry(lambda entry: None, "/etc/evil"), "outside the archive"),
    "an entry of windows": (lambda: with_entry(lambda entry: None, "a/..\\evil"), "outside the archive"),
    "a link": (lambda: with_entry(lambda entry: setattr(entry, "external_attr", 0o120777 << 16)), "a link"),
    "an entry twice": (twice, "there twice"),
    "a bomb": (lambda: deflated(b"\0" * (8 << 20)), "compressed"),
    "a program": (lambda: archive(b"N.", {"code/__torch__.py": b"import os"}), "TorchScript"),
    "big endian": (lambda: archive(b"N.", {"byteorder": b"big"}), "big-endian"),
    "no pickle": (lambda: with_entry(lambda entry: None).replace(b"data.pkl", b"date.pkl"), "no entry 'data.pkl'"),
    "before zip": (legacy, "before 1.6"),
    "a header elsewhere": (moved, "not where the directory says"),
    "cut off": (lambda: archive(b"N.")[:-10], "cut off"),
    "not a zip": (lambda: b"hello, this is text" * 9, "not a file of torch.save"),
    "empty": (lambda: b"", "not a file of torch.save"),
    "a text of 2^60 bytes": (lambda: archive(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x."), "not a whole"),
    "a frame of 2^60 bytes": (lambda: archive(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N"), "not a whole"),
    "nested 2,000 deep": (lambda: archive(b"N" + b"\x85" * 2_000 + b"."), "nested more than"),
    "a list in itself": (lambda: archive(b"]q\x00h\x00a."), "nested more than"),
    "a billion laughs": (lambda: archive(laughs()), "more than"),
    "an extension": (lambda: archive(b"\x80\x02\x82\x01."), "none that torch writes"),
    "an unknown persistent id": (lambda: archive(persistent(short("os"), short("system"))), "not that of a storage"),
    "a memo not made": (lambda: archive(b"h\x05."), "has not made"),
    "an empty stack": (lambda: archive(b"0."), "nothing on the stack"),
    "a mark as a value": (lambda: archive(b"(."), "nothing on the stack"),
    "items of a number": (lambda: archive(b"K\x01K\x02a."), "adds items to a int"),
    "opcodes after no end": (lambda: archive(b"N" * 1000), "not a whole"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_write_is_refused_in_little_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = REFUSED[name]
    content = make()
    monkeypatch.setattr(opcodes, "MOST_NODES", 5_000)
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match=reason):
            look(content)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_opcodes_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MOST_OPCODES", 1000)
    with pytest.raises(Refused, match="more than 1000 opcodes"):
        look(archive(b"N0" * 1000 + b"N."))


def test_a_number_of_many_digits_is_a_name() -> None:
    assert look(archive(b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".")) == {
        "object": ["builtins.int", None, None]
    }


def tensor(key: str = "0", count: int = 6, offset: int = 0, shape: Any = (2, 3), strides: Any = (3, 1)) -> bytes:
    """Return the pickle of a tensor, as torch writes it but for the numbers."""

    def number(value: int) -> bytes:
        return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)

    def numbers(values: Any) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + short("storage") + FLOAT + short(key) + short("cpu") + number(count) + b"tQ"
    arguments = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89N"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


TENSORS: dict[str, tuple[dict[str, Any], str | None]] = {
    "an offset behind its storage": ({"offset": 1}, "elements up to 7 of a storage of 6"),
    "a negative offset": ({"offset": -1}, "negative"),
    "a negative stride": ({"strides": (-3, 1)}, "negative"),
    "a negative length": ({"shape": (-2, 3)}, "negative"),
    "more lengths than strides": ({"strides": (3,)}, "as many lengths"),
    "lengths of 2^62": ({"shape": (1 << 62, 1), "strides": (0, 1)}, None),
    "strides of 2^62": ({"strides": (1 << 62, 1)}, "elements up to"),
    "one element everywhere": ({"strides": (0, 0)}, None),
    "rows that overlap": ({"strides": (2, 1)}, None),
    "a shape of 2^70": ({"shape": (1 << 70, 3)}, "no memory holds"),
    "a storage that is not there": ({"key": "9"}, "no entry"),
    "a storage above": ({"key": "../../../etc/passwd"}, "no entry"),
}
"""What is wrong, and the reason given; None: it is no tensor then, but a name."""


def read_here(path: Path, content: bytes) -> Any:
    """Return what the reader makes of a file, without its process."""
    path.write_bytes(content)
    return torch_file._Decoder(path, len(content)).decode(look(content))


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_outside_of_their_bytes_are_refused(tmp_path: Path, name: str) -> None:
    change, reason = TENSORS[name]
    content = archive(tensor(**change), {"data/0": b"\0" * 24})
    if reason is None:
        assert "share memory" in read_here(tmp_path / "a.pt", content).name
        return
    with pytest.raises((CheckpointError, Refused), match=reason):
        read_here(tmp_path / "a.pt", content)


def test_a_tensor_inside_its_bytes_is_read_and_one_of_a_short_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive(tensor(), {"data/0": struct.pack("<6f", *range(6))}))
    (found,) = read_files([Piece(path)])
    assert isinstance(found, StoredTensor) and found.read().tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CheckpointError, match="elements up to 6 of a storage of 5"):
        read_here(path, archive(tensor(), {"data/0": b"\0" * 20}))


def test_flipped_bits_are_told_by_the_archive_s_own_checksums(tmp_path: Path) -> None:
    """torch.load does not look at them."""
    path = tmp_path / "a.pt"
    whole = torch.arange(6.0)
    torch.save({"a": whole, "b": whole[2:4]}, path)
    content = path.read_bytes()
    at = content.index(struct.pack("<6f", *range(6)))
    assert torch.equal(read_file(path)["a"].read(), whole)
    path.write_bytes(content[: at + 21] + bytes([content[at + 21] ^ 4]) + content[at + 22 :])
    for name, tensor in read_file(path).items():
        with pytest.raises(CheckpointError, match=r"a\.pt: bytes .* CRC-32"):
            print(name, tensor.read())
    at = content.index(b"_rebuild_tensor_v2") + 40
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"a\.pt: .*CRC-32"):
        read_file(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": whole}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_file(path)["a"].read(), whole), "files without them are read as ever"


def test_links_pipes_and_directories_in_a_files_place_are_refused(tmp_path: Path) -> None:
    real = tmp_path / "real" / "a.pt"
    real.parent.mkdir()
    real.write_bytes(archive(b"N."))
    (tmp_path / "link.pt").symlink_to(real)
    (tmp_path / "other").symlink_to(real.parent)
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "directory.pt").mkdir()
    for path in (tmp_path / "link.pt", tmp_path / "other" / "a.pt"):
        with pytest.raises(CheckpointError, match="symbolic link"):
            read_file(path)
    for path in (tmp_path / "pipe.pt", tmp_path / "directory.pt", tmp_path / "missing.pt"):
        with pytest.raises(CheckpointError, match=path.name):
            read_file(path)


@pytest.mark.parametrize("word", ["../../etc", "/etc", "1; rm", "", "9" * 30, "..", "a/b"])
def test_pointers_lead_nowhere_else(tmp_path: Path, word: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(word)
    (tmp_path / "latest_universal").write_text(word)
    with pytest.raises(CheckpointError, match="latest_checkpointed_iteration"):
        iteration_directory(tmp_path)
    with pytest.raises(CheckpointError, match="latest_universal"):
        universal_directory(tmp_path)
