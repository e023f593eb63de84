"""Where the parts of a file of `torch.save` lie: a zip archive whose entries are stored as they are.

Owns the zip's directory. Nothing is extracted; storages are ranges of bytes of the file, which whoever wants their
numbers reads himself. Standard library only, as it runs in the process of `confinement`.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401  # of entries' names, which zipfile would import where no file can be opened
import io
import stat
import zipfile
import zlib
from typing import IO, Any

from megalm.models.foreign.opcodes import Encoder, Refused, read_pickle

MOST_ENTRIES = 1_000_000
MOST_PICKLE_BYTES = 64 << 20
_LOCAL_HEADER = 30  # bytes before an entry's name
_ENCRYPTED = 1


class Window(io.RawIOBase):
    """The bytes [first, first + size) of a file, as a file."""

    def __init__(self, file: IO[bytes], first: int, size: int) -> None:
        super().__init__()
        self._file, self._first, self._size, self._at = file, first, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place in the window."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the window."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is left of the window, as far as it goes."""
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._first + self._at)
        data = self._file.read(len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


class TorchArchive:
    """The archive in bytes [first, first + size) of a file."""

    def __init__(self, file: IO[bytes], first: int, size: int) -> None:
        """Read the directory. Raises Refused for what torch does not write."""
        self._file, self._first, self._size = io.BufferedReader(Window(file, first, size)), first, size
        if self._file.read(2) == b"\x80\x02":
            raise Refused(
                "written by torch before 1.6, or with _use_new_zipfile_serialization=False; load it and save it again "
                "with a newer torch, where you would trust it"
            )
        try:
            entries = zipfile.ZipFile(self._file).infolist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, UnicodeError) as error:
            raise Refused(f"not a file of torch.save, or cut off ({error})") from error
        if len(entries) > MOST_ENTRIES:
            raise Refused(f"more than {MOST_ENTRIES} entries")
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._root = entries[0].filename.partition("/")[0] if entries else ""
        for entry in entries:
            self._check(entry)
            self._entries[entry.filename.removeprefix(f"{self._root}/")] = entry
        if self._text("byteorder", "little") != "little":
            raise Refused("written on a big-endian machine; convert it there")

    def _check(self, entry: zipfile.ZipInfo) -> None:
        """Raise Refused for an entry that torch does not write, though none is extracted."""
        name = entry.filename
        problem = None
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            problem = "compressed"
        elif entry.flag_bits & _ENCRYPTED:
            problem = "encrypted"
        elif stat.S_ISLNK(entry.external_attr >> 16):
            problem = "a link"
        elif name.partition("/")[0] != self._root or ".." in name.split("/") or "\\" in name or name.startswith("/"):
            problem = "outside the archive's directory"
        elif name.removeprefix(f"{self._root}/") in self._entries:
            problem = "there twice"
        elif name.startswith(f"{self._root}/code/"):
            problem = "a program of TorchScript, which no checkpoint holds"
        if problem:
            raise Refused(f"its entry {name[:80]!r} is {problem}")

    def _text(self, name: str, default: str) -> str:
        if name not in self._entries:
            return default
        first, size = self._place(name)
        if size > 80:
            raise Refused(f"its entry {name} has {size} bytes")
        return self._read(first, size).decode("ascii", "replace")

    def _place(self, name: str) -> tuple[int, int]:
        """Return the first byte, in the file, and the size of an entry's data, behind its own header."""
        entry = self._entries.get(name)
        if entry is None:
            raise Refused(f"there is no entry {name[:80]!r} in it")
        header = self._read(self._first + entry.header_offset, _LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise Refused(f"its entry {name[:80]!r} is not where the directory says")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        first = self._first + entry.header_offset + _LOCAL_HEADER + lengths
        if not self._first <= first <= first + entry.file_size <= self._first + self._size:
            raise Refused(f"its entry {name[:80]!r} ends behind the file")
        return first, entry.file_size

    def _read(self, first: int, size: int) -> bytes:
        self._file.seek(first - self._first)
        return self._file.read(size)

    def _storage(self, key: str) -> tuple[int, int, int]:
        """Return the first byte, the size and the CRC-32 of a storage; 0: torch was told to compute none."""
        name = f"data/{key}"
        return *self._place(name), self._entries[name].CRC

    def contents(self) -> Any:
        """Return what the archive's pickle describes, for `json.dumps`. Raises Refused."""
        first, size = self._place("data.pkl")
        if size > MOST_PICKLE_BYTES:
            raise Refused(f"its pickle has {size} bytes, more than {MOST_PICKLE_BYTES}")
        text, crc = self._read(first, size), self._entries["data.pkl"].CRC
        if crc not in (0, zlib.crc32(text)):
            raise Refused("it is damaged: its pickle has not the CRC-32 that the archive says; copy it again")
        return Encoder(self._storage).encode(read_pickle(text))


def no_storage(key: str) -> tuple[int, int, int]:
    """Refuse a tensor: a pickle that stands alone has no storages beside it."""
    raise Refused("a pickle without an archive refers to a tensor")


def contents_of(file: IO[bytes], first: int, size: int, alone: bool) -> Any:
    """Return what a file of torch.save, or with `alone` a pickle by itself, holds in a range of bytes of `file`."""
    if not alone:
        return TorchArchive(file, first, size).contents()
    if size > MOST_PICKLE_BYTES:
        raise Refused(f"the pickle has {size} bytes, more than {MOST_PICKLE_BYTES}")
    file.seek(first)
    return Encoder(no_storage).encode(read_pickle(file.read(size)))
