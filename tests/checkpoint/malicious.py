"""Checkpoints and runs that an attacker has made, every checksum right where the attacker could make it so.

    python -m tests.checkpoint.malicious

loads each in every way in a process with a limit of memory and time. Each must be refused by one line that names the
file, or, where only numbers of the right shape were exchanged, be read. Nothing may run, nothing be written outside,
memory must stay bounded. Ends with 1, and the case, where that is not so.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.checkpoint.commands import inspect, verify
from megalm.checkpoint.manager import latest_checkpoint
from megalm.checkpoint.names import CHECKPOINTS, MANIFEST, STATE, find_checkpoints
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.trained import trained_config
from megalm.distributed.sharding import ShardSpec
from megalm.errors import MegalmError
from megalm.train.run_identity import read_identity
from tests.checkpoint.forge import body_of, parsed, reseal, seal
from tests.checkpoint.simulated import small_model, write_ranks, zero_fragments
from tests.checkpoint.subject import listening

WEIGHTS = "rank-00000-weight.safetensors"
MEMORY_BYTES = 768 << 20
RESIDENT_BYTES = 640 << 20  # a manifest of 10^6 files is 80 MB of text, and takes 500
CPU_S, WALL_S = 20, 900

Act = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """What is done to a checkpoint's directory, and which file an error must name; "": it may also be read."""

    name: str
    file: str
    act: Act
    ways: int = 5
    """In how many ways it is loaded: fewer where each takes long."""


class Evil:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _mark(checkpoint: Path) -> Path:
    """Return where code of the attacker's would leave its mark: outside of the run."""
    return checkpoint.parents[2] / "outside" / "ran"


def _shard(data: bytes | Callable[[Path], bytes]) -> Act:
    """Put other bytes in a shard's place, with size and sum to match."""

    def act(checkpoint: Path) -> None:
        (checkpoint / WEIGHTS).write_bytes(data(checkpoint) if callable(data) else data)
        reseal(checkpoint)

    return act


def _header(change: Callable[[dict[str, Any]], object] | str | bytes, length: int | None = None) -> Act:
    """Change a shard's header, or put a text in its place; `length`: what it says of its length."""

    def act(checkpoint: Path) -> None:
        path = checkpoint / WEIGHTS
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        if callable(change):
            header = json.loads(data[8:end])
            change(header)
            text = json.dumps(header).encode()
        else:
            text = change.encode() if isinstance(change, str) else change
        size = len(text) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + text + data[end:])
        reseal(checkpoint)

    return act


def _tensor(**values: Any) -> Act:
    """Give the first tensor of a shard's header other entries."""

    def change(header: dict[str, Any]) -> None:
        next(entry for key, entry in header.items() if key != "__metadata__").update(values)

    return _header(change)


def _offsets(start: Any, stop: Any) -> Act:
    return _tensor(data_offsets=[start, stop])


def _manifest(change: Callable[[dict[str, Any]], object]) -> Act:
    """Change the manifest's values."""

    def act(checkpoint: Path) -> None:
        values = parsed(checkpoint)
        change(values)
        seal(checkpoint, body_of(values))

    return act


def _text(old: str, new: str) -> Act:
    """Change the manifest's text."""

    def act(checkpoint: Path) -> None:
        body = body_of(parsed(checkpoint))
        assert old in body, old
        seal(checkpoint, body.replace(old, new, 1))

    return act


def _file(place: int, value: Any) -> Act:
    """Change an entry of the manifest's first file."""
    return _manifest(lambda values: values["files"][0].__setitem__(place, value))


def _piece(place: int, value: Any) -> Act:
    """Change an entry of the first piece of each tensor in the manifest."""

    def change(values: dict[str, Any]) -> None:
        for tensor in values["tensors"]:
            tensor["pieces"][0][place] = value

    return _manifest(change)


def _tensors(**more: Any) -> Act:
    return _manifest(lambda values: [tensor.update(more) for tensor in values["tensors"]])


def _state(text: str | bytes) -> Act:
    def act(checkpoint: Path) -> None:
        (checkpoint / STATE).write_bytes(text.encode() if isinstance(text, str) else text)
        reseal(checkpoint)

    return act


def _instead(name: str, make: Callable[[Path], object]) -> Act:
    """Put something that is no file in a file's place."""

    def act(checkpoint: Path) -> None:
        path = checkpoint / name
        shutil.copy(path, checkpoint.parents[2] / "outside" / name)
        path.unlink()
        make(path)

    return act


def _outside(path: Path) -> Path:
    return path.parents[3] / "outside" / path.name


def _sparse(size: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


def _large_state(checkpoint: Path) -> None:
    _sparse(1 << 40)(checkpoint / STATE)
    _manifest(lambda values: [row.__setitem__(1, 1 << 40) for row in values["files"] if row[2] == STATE])(checkpoint)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's whole path may not be long
        end.bind(path.name)
        os.chdir(before)


def _run_file(name: str, text: str) -> Act:
    return lambda checkpoint: (checkpoint.parents[1] / name).write_text(text)


def _zip(checkpoint: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(64 << 20))
    return out.getvalue()


def _torch_file(checkpoint: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"x": Evil(_mark(checkpoint))}, out)
    return out.getvalue()


def _numpy_file(checkpoint: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Evil(_mark(checkpoint))], dtype=object), allow_pickle=True)
    return out.getvalue()


def _twice(header: dict[str, Any]) -> None:
    keys = [key for key in header if key != "__metadata__"]
    header[keys[1]]["data_offsets"] = list(header[keys[0]]["data_offsets"])
    header[keys[1]]["shape"] = list(header[keys[0]]["shape"])


def _key_twice(checkpoint: Path) -> None:
    """Put a tensor's key in front once more, with the place of another one."""
    data = (checkpoint / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    keys = [key for key in header if key != "__metadata__"]
    _header("{" + json.dumps({keys[0]: header[keys[1]]})[1:-1] + ", " + json.dumps(header)[1:])(checkpoint)


def _a_million_files(values: dict[str, Any]) -> None:
    values["files"] += [["0" * 64, 8, f"rank-{rank:07d}-weight.safetensors"] for rank in range(1_000_000)]


def _many_pieces(values: dict[str, Any]) -> None:
    values["tensors"][0]["pieces"] *= 30_000


def _expert_of_a_scalar(values: dict[str, Any]) -> None:
    tensor = values["tensors"][0]
    tensor |= {"shape": [], "pieces": [[tensor["pieces"][0][0], [], None, 0, 0, [0, 1], 0]]}


def _overlapping(values: dict[str, Any]) -> None:
    for tensor in values["tensors"]:
        tensor["pieces"] *= 2


def _run(size: Any, stride: Any, shape: int | None = None) -> Act:
    """Make a run of each tensor's pieces of one shard; `shape`: the tensors have so many elements then."""

    def change(values: dict[str, Any]) -> None:
        for tensor in values["tensors"]:
            file, local_shape, _, _, _, flat = tensor["pieces"][0]
            if shape is not None:
                tensor["shape"] = local_shape = [shape]
                flat = [0, shape]
                tensor["pieces"] = [[file, local_shape, None, 0, 0, flat]]
            tensor["pieces"][0][5] = [*flat[:2], size, stride]

    return _manifest(change)


def _many_runs(values: dict[str, Any]) -> None:
    """Let 20,000 runs of 20,000 pieces be in 20,000 files."""
    names = [f"rank-{rank:05d}-weight.safetensors" for rank in range(20_000)]
    files = [file for file in values["files"] if file[2] not in names]
    values["files"] = files + [["0" * 64, 8, name] for name in names]
    shape = [40_000]
    for tensor in values["tensors"]:
        tensor["shape"] = shape
        tensor["pieces"] = [[names[0], shape, None, 0, 0, [0, 40_000, 2, 1]]] * 20_000


def _half_twice(values: dict[str, Any]) -> None:
    """Have as many elements as there are, but the first half of each shard twice."""
    for tensor in values["tensors"]:
        halves = [[*piece[:5], [0, piece[5][1] // 2]] for piece in tensor["pieces"]]
        tensor["pieces"] = halves + halves


def _lookalike(old: str, new: str) -> Act:
    """Rename a shard, in the manifest as well."""

    def act(checkpoint: Path) -> None:
        (checkpoint / WEIGHTS).rename(checkpoint / WEIGHTS.replace(old, new))
        seal(checkpoint, body_of(parsed(checkpoint)).replace(WEIGHTS, json.dumps(WEIGHTS.replace(old, new))[1:-1]))

    return act


def _linked_directory(checkpoint: Path) -> None:
    moved = checkpoint.parents[2] / "outside" / "elsewhere"
    checkpoint.rename(moved)
    moved.joinpath(MANIFEST).write_bytes(b"{}")
    checkpoint.symlink_to(moved)


DEEP = "[" * 200_000 + "]" * 200_000
LAUGHS = "seed:\n- &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in pairwise("abcdefghijkl")
)
ABROAD = "/etc/passwd"

CASES = (
    Case("a pickle for a shard", WEIGHTS, _shard(lambda at: pickle.dumps(Evil(_mark(at))))),
    Case("a torch file for a shard", WEIGHTS, _shard(_torch_file)),
    Case("a numpy file with objects for a shard", WEIGHTS, _shard(_numpy_file)),
    Case("a zip bomb for a shard", WEIGHTS, _shard(_zip)),
    Case("a pickle for the state", STATE, _state(pickle.dumps({"step": 1}))),
    Case("a pickle for the manifest", MANIFEST, lambda at: (at / MANIFEST).write_bytes(pickle.dumps(Evil(_mark(at))))),
    Case("an empty header", WEIGHTS, _header("{}")),
    Case("a header of 2^62 bytes", WEIGHTS, _header("{}", 2**62)),
    Case("a header of 2^64 - 1 bytes", WEIGHTS, _header("{}", 2**64 - 1)),
    Case("a header that ends behind the file", WEIGHTS, _header("{}", 1 << 20)),
    Case("a header of no bytes", WEIGHTS, _header("", 0)),
    Case("a deep header", WEIGHTS, _header(f'{{"x": {DEEP}}}')),
    Case("a header that is a list", WEIGHTS, _header("[1, 2]")),
    Case("a header that is not UTF-8", WEIGHTS, _header(b'{"\xff\xfe": 1}')),
    Case("a header of numbers of 5,000 digits", WEIGHTS, _header('{"x": ' + "9" * 5000 + "}")),
    Case("a tensor twice in a header", WEIGHTS, _key_twice),
    Case("offsets of another tensor", WEIGHTS, _header(_twice)),
    Case("negative offsets", WEIGHTS, _offsets(-8, 0)),
    Case("offsets behind the file", WEIGHTS, _offsets(1 << 40, (1 << 40) + 8)),
    Case("offsets the wrong way round", WEIGHTS, _offsets(64, 0)),
    Case("an offset that is NaN", WEIGHTS, _offsets(0, float("nan"))),
    Case("an offset that is infinite", WEIGHTS, _offsets(0, float("inf"))),
    Case("an offset that is text", WEIGHTS, _offsets("0", "8")),
    Case("a shape of no number", WEIGHTS, _tensor(shape=[None])),
    Case("a shape whose product overflows", WEIGHTS, _tensor(shape=[1 << 32, 1 << 32])),
    Case("a negative shape", WEIGHTS, _tensor(shape=[-4])),
    Case("a dtype of other width", WEIGHTS, _tensor(dtype="F64")),
    Case("a dtype of the same width", WEIGHTS, _tensor(dtype="I32")),
    Case("an unknown dtype", WEIGHTS, _tensor(dtype="OBJECT")),
    Case("a link for a shard", WEIGHTS, _instead(WEIGHTS, lambda path: path.symlink_to(_outside(path)))),
    Case("a link to a device for a shard", WEIGHTS, _instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))),
    Case("a hard link for a shard", "", _instead(WEIGHTS, lambda path: path.hardlink_to(_outside(path)))),
    Case("a pipe for a shard", WEIGHTS, _instead(WEIGHTS, os.mkfifo)),
    Case("a socket for a shard", WEIGHTS, _instead(WEIGHTS, _socket)),
    Case("a directory for a shard", WEIGHTS, _instead(WEIGHTS, Path.mkdir)),
    Case("a file of 1 TB for a shard", WEIGHTS, _instead(WEIGHTS, _sparse(1 << 40))),
    Case("a pipe for the manifest", MANIFEST, _instead(MANIFEST, os.mkfifo)),
    Case("a device for the manifest", MANIFEST, _instead(MANIFEST, lambda path: path.symlink_to("/dev/zero"))),
    Case("a directory for the manifest", MANIFEST, _instead(MANIFEST, Path.mkdir)),
    Case("a file of 1 TB for the manifest", MANIFEST, _instead(MANIFEST, _sparse(1 << 40))),
    Case("a pipe for the state", STATE, _instead(STATE, os.mkfifo)),
    Case("a link for the state", STATE, _instead(STATE, lambda path: path.symlink_to(_outside(path)))),
    Case("a link for the checkpoint", "manifest.json", _linked_directory),
    Case("a path to a parent in the manifest", MANIFEST, _file(2, "../../outside/" + WEIGHTS)),
    Case("a whole path in the manifest", MANIFEST, _file(2, ABROAD)),
    Case("a path to a parent in a piece", "manifest.json", _piece(0, "../" + WEIGHTS)),
    Case("a name with a NUL", MANIFEST, _file(2, WEIGHTS + "\0")),
    Case("a name with a line break", MANIFEST, _file(2, WEIGHTS + "\n")),
    Case("a name of other scripts' digits", MANIFEST, _lookalike("00000", "\u0660\u0661\u0662\u0663\u0664")),
    Case("a name that runs from right to left", MANIFEST, _lookalike("rank", "\u202erank")),
    Case("a negative size", WEIGHTS[:5], _file(1, -1)),
    Case("a size that is NaN", "rank-", _file(1, float("nan"))),
    Case("a sum that is no sum", "rank-", _file(0, 7)),
    Case("a manifest of 10^6 files", "rank-", _manifest(_a_million_files), ways=1),
    Case("a tensor of 30,000 pieces", "", _manifest(_many_pieces), ways=2),
    Case("half of each shard twice", MANIFEST, _manifest(_half_twice)),
    Case("an expert of a scalar", "step-", _manifest(_expert_of_a_scalar)),
    Case("pieces twice", "step-", _manifest(_overlapping)),
    Case("a tensor of no piece", MANIFEST, _manifest(lambda values: values["tensors"][0].update(pieces=[]))),
    Case("a run of 10^18 pieces", MANIFEST, _run(1, 1, 10**18)),
    Case("a run of 2^80 pieces", MANIFEST, _run(1, 1, 1 << 80)),
    Case("a run of more pieces than files", MANIFEST, _run(1, 1)),
    Case("a run in files that are not listed", "rank-00005-weight.safetensors", _run(76, 5)),
    Case("a run in other files than it was written in", "rank-00001-weight.safetensors", _run(76, 1)),
    Case("a run that goes backwards", MANIFEST, _run(48, -1)),
    Case("a run that stays in a file", MANIFEST, _run(48, 0)),
    Case("a run of pieces of no elements", MANIFEST, _run(0, 1)),
    Case("a run of pieces of NaN elements", MANIFEST, _run(float("nan"), 1)),
    Case("a run of a text", MANIFEST, _run("1", [])),
    Case("a run from a fraction on", MANIFEST, _piece(5, [0.0, 152, 76, 1])),
    Case("a run of three numbers", MANIFEST, _piece(5, [0, 48, 1, 1, 1])),
    Case("20,000 runs of 20,000 pieces", "step-", _manifest(_many_runs), ways=3),
    Case("a deep manifest", MANIFEST, _text('"layout": ', f'"layout": {DEEP}, "more": ')),
    Case("a key twice in the manifest", "", _text('"step": 3', '"step": 9, "step": 3')),
    Case("a step that is infinite", "step-", _text('"step": 3', '"step": Infinity')),
    Case("a step of 5,000 digits", MANIFEST, _text('"step": 3', '"step": ' + "9" * 5000)),
    Case("tensors that are a number", MANIFEST, _manifest(lambda values: values.update(tensors=3))),
    Case("a tensor of 2^80 elements", "step-", _tensors(shape=[1 << 40, 1 << 40])),
    Case("a dtype that the file has not", "step-", _tensors(dtype="I64")),
    Case("a range behind a tensor", "step-", _piece(5, [0, 1 << 50])),
    Case("a negative range", "step-", _piece(5, [-8, 8])),
    Case("a shard behind its tensor", "step-", _piece(3, 1 << 40)),
    Case("a local shape that overflows", "step-", _piece(1, [1 << 40, 1 << 40])),
    Case("a state of 1 TB", STATE, _large_state),
    Case("a deep state", STATE, _state(f'{{"a": {DEEP}}}')),
    Case("a state that is a list", STATE, _state("[1]")),
    Case("a state that is not UTF-8", STATE, _state(b'{"a": "\xff"}')),
    Case("a state of numbers of 5,000 digits", STATE, _state('{"a": ' + "9" * 5000 + "}")),
    Case("a recipe that grows without end", "config.yaml", _run_file("config.yaml", LAUGHS)),
    Case(
        "a recipe that calls functions",
        "config.yaml",
        _run_file("config.yaml", "a: !!python/object/apply:os.getcwd []"),
    ),
    Case("a deep recipe", "config.yaml", _run_file("config.yaml", "a: " + DEEP)),
    Case("a recipe of 1 TB", "config.yaml", lambda at: _sparse(1 << 40)(at.parents[1] / "config.yaml")),
    Case("a deep run.json", "run.json", _run_file("run.json", DEEP)),
    Case("a run.json of 1 TB", "run.json", lambda at: _sparse(1 << 40)(at.parents[1] / "run.json")),
)


def make_run(directory: Path) -> Path:
    """Return the directory of a checkpoint in a run, beside which `outside` lies."""
    (directory / "outside").mkdir(parents=True)
    (directory / "outside" / "kept").write_text("kept")
    path = write_ranks(directory / "run" / CHECKPOINTS, 3, zero_fragments(small_model(), "weight", 2, 1))
    (directory / "run" / "run.json").write_text("{}")
    (directory / "run" / "config.yaml").write_text("{}")
    return path


def _loads(checkpoint: Path, case: Case) -> list[Callable[[], object]]:
    run = checkpoint.parents[1]
    if case.file == "config.yaml":
        return [lambda: trained_config(run, [])]
    if case.file == "run.json":
        return [lambda: read_identity(run)]
    looks: list[Callable[[], object]] = [
        lambda: latest_checkpoint(run),
        lambda: _read(checkpoint, True),
        lambda: _read(checkpoint, False),
        lambda: verify(run),
        lambda: inspect(run),
    ]
    return looks[: case.ways]


def _read(checkpoint: Path, check: bool) -> None:
    """Read all that the model needs, as its own shapes say."""
    with closing(CheckpointReader(checkpoint, verify=check)) as reader:
        for name, item in small_model().items():
            reader.read_local(ShardSpec.whole(name, tuple(item.values.shape)), "weight")
            reader.read_local(item.spec(name, 1, 2), "weight")


def _try(checkpoint: Path, case: Case) -> list[str]:
    """Load in every way; return what is wrong. At least one load must refuse, none may fail otherwise."""
    wrong, refused = [], 0
    for load in _loads(checkpoint, case):
        with listening() as listener:
            try:
                load()
            except MegalmError as error:
                refused += 1
                listener.said.append(str(error))
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = " ".join(str(error).split())[:100]
                wrong.append(f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})")
                continue
        lines = [text for text in listener.said if not _is_clear(text, case.file)]
        wrong += [f"the error does not name {case.file} in a line: {line[:300]}" for line in lines]
    if case.file and not refused and not wrong:
        wrong.append("was read without a word")
    return wrong


def _is_clear(text: str, file: str) -> bool:
    """Return whether an error is one short line with the file's name; of a recipe a line for each mistake."""
    lines = text.splitlines()
    return all(file in line for line in lines) and len(text) <= 2000 and (len(lines) == 1 or file == "config.yaml")


def try_case(case: Case, directory: Path) -> list[str]:
    """Make the case in `directory` and load it in a child with limits; return what is wrong."""
    checkpoint = make_run(directory)
    try:
        case.act(checkpoint)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EFBIG):
            return []
        raise
    before = _tree(directory)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        wrong = ["the child could not say what went wrong"]
        try:
            os.close(told)
            _limit()
            begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            wrong = _try(find_checkpoints(checkpoint.parent)[0], case)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) << 10
            if grown > RESIDENT_BYTES:
                wrong.append(f"took {grown >> 20} MiB")
        finally:
            os.write(tell, json.dumps(wrong).encode()[:60_000])
            os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as answers:
        answer = answers.read()
    _, status = os.waitpid(child, 0)
    wrong = json.loads(answer) if answer else [f"status {os.waitstatus_to_exitcode(status)}: time or memory"]
    if _tree(directory) != before:
        wrong.append(f"something was written: {set(_tree(directory)) ^ set(before)}")
    return wrong


def _limit() -> None:
    """Bound this process's memory, CPU time and files."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + MEMORY_BYTES,
        resource.RLIMIT_CPU: int(time.process_time()) + CPU_S,
        resource.RLIMIT_FSIZE: 1 << 20,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WALL_S)


def _tree(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in directory.rglob("*"))


def main() -> int:
    """Load all cases, print what became of each; 0 if every one was harmless."""
    begin, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="malicious-") as directory:
        for number, case in enumerate(CASES):
            wrong = try_case(case, Path(directory) / str(number))
            print(f"{'NOT' if wrong else '':<4}{case.name}", *wrong, sep="\n        ", flush=True)
            bad += bool(wrong)
    print(f"{len(CASES)} malicious checkpoints, {bad} not harmless; {time.monotonic() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
