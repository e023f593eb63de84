"""A disk that may lose what was not synced: records a writer's calls and rebuilds what a crash could leave.

The model: a file's bytes are sure only after its fsync; before it any prefix of them, or zeros, may be there.
A name (made, renamed, removed) is sure only after an fsync of its directory; before it any of the directory's
changes may be there without the others, as long as what they act on is. That is weaker than what ext4, XFS or
NFS promise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.checkpoint.files import FileSystem

Rest = bytes | tuple[Any, ...]  # a file, or a directory: (name, Rest), ...
Calls = list[tuple[str, str, str | bytes]]


class RecordingFileSystem(FileSystem):
    """Does all calls for real and notes them, with paths relative to `root`; nothing is really synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: Calls = []
        self.times_ns: list[int] = []
        """When each call had been made, by a clock that all processes share."""
        self._paths: dict[int, Path] = {}

    def _note(self, call: str, path: Path, more: str | bytes = "") -> None:
        self.calls.append((call, str(path.relative_to(self.root)), more))
        self.times_ns.append(time.monotonic_ns())

    def make_directory(self, path: Path) -> None:
        if not path.is_dir():
            self.make_directory(path.parent)
            path.mkdir()
            self._note("mkdir", path)
            self.sync_directory(path.parent)

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self._note("create", path)
        return descriptor

    def write(self, descriptor: int, data: bytes | memoryview) -> None:
        super().write(descriptor, data)
        self._note("write", self._paths[descriptor], bytes(data))

    def sync(self, descriptor: int) -> None:
        self._note("fsync", self._paths[descriptor])

    def sync_directory(self, path: Path) -> None:
        self._note("fsync-directory", path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._note("rename", source, str(target.relative_to(self.root)))

    def remove_tree(self, path: Path) -> None:
        for file in sorted(path.iterdir()) if path.is_dir() else ():
            self._note("unlink", file)
        if path.is_dir():
            self._note("rmdir", path)
        super().remove_tree(path)


@dataclass
class Node:
    """A file (bytes `data`, those `synced`) or a directory (names `now`, those `sure`, changes `pending`)."""

    directory: bool
    data: bytes = b""
    synced: bytes | None = None
    now: dict[str, Node] = field(default_factory=dict)
    sure: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, Node | None, str]] = field(default_factory=list)  # name, node it gets, name it leaves


class Disk:
    """The state of the disk after some calls, and what may be left of it."""

    def __init__(self) -> None:
        self.root = Node(True)

    def _find(self, path: str) -> Node:
        node = self.root
        for part in Path(path).parts:
            node = node.now[part]
        return node

    def _change(self, path: str, node: Node | None, leaves: str = "") -> None:
        parent = self._find(str(Path(path).parent))
        parent.pending.append((Path(path).name, node, leaves))
        if leaves:
            del parent.now[leaves]
        if node is None:
            del parent.now[Path(path).name]
        else:
            parent.now[Path(path).name] = node

    def apply(self, call: str, path: str, more: str | bytes) -> None:
        if call in ("mkdir", "create"):
            self._change(path, Node(call == "mkdir"))
        elif call == "write":
            assert isinstance(more, bytes)
            self._find(path).data += more
        elif call == "fsync":
            self._find(path).synced = self._find(path).data
        elif call == "fsync-directory":
            node = self._find(path)
            node.sure, node.pending = dict(node.now), []
        elif call == "rename":
            assert isinstance(more, str) and Path(path).parent == Path(more).parent
            self._change(more, self._find(path), Path(path).name)
        else:
            self._change(path, None)

    def rest(self, chosen: random.Random, mode: str) -> Rest:
        """Return what a crash could leave. Modes: all, nothing, names (no data), data (no names), random."""
        return self._rest(self.root, chosen, mode)

    def _rest(self, node: Node, chosen: random.Random, mode: str) -> Rest:
        if not node.directory:
            return self._bytes(node, chosen, mode)
        names = dict(node.sure)
        for name, new, leaves in node.pending:
            if mode in ("nothing", "data") or (mode == "random" and chosen.random() < 0.5):
                continue
            if leaves:
                if leaves not in names:
                    continue
                del names[leaves]
            if new is None:
                names.pop(name, None)
            else:
                names[name] = new
        return tuple((name, self._rest(child, chosen, mode)) for name, child in sorted(names.items()))

    def _bytes(self, node: Node, chosen: random.Random, mode: str) -> bytes:
        if node.synced == node.data or mode in ("all", "data"):
            return node.data
        sure = node.synced or b""
        if mode in ("nothing", "names"):
            return sure
        rest = node.data[len(sure) :]
        if chosen.random() < 0.5:
            return sure + bytes(len(rest))
        return sure + rest[: chosen.randrange(len(rest) + 1)]


def restore(rest: Rest, path: Path) -> None:
    """Write what a crash left to the new file or directory `path`."""
    if isinstance(rest, bytes):
        path.write_bytes(rest)
        return
    path.mkdir()
    for name, child in rest:
        restore(child, path / name)


def crashes(calls: Calls, done: list[int], directory: Path, tries: int) -> Iterator[tuple[int, int, Path]]:
    """Yield (calls made, saves done, what the disk holds) for each prefix of `calls`, in several ways.

    `done` counts the calls after which each save had returned.
    """
    disk, chosen, seen = Disk(), random.Random(0), set()
    for made in range(len(calls) + 1):
        if made:
            disk.apply(*calls[made - 1])
        saves = max(index for index, count in enumerate(done) if made >= count)
        for mode in ["all", "nothing", "names", "data", *["random"] * tries]:
            rest = disk.rest(chosen, mode)
            if (saves, rest) not in seen:
                seen.add((saves, rest))
                target = directory / str(len(seen))
                restore(rest, target)
                yield made, saves, target
