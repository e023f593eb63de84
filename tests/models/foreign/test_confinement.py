"""The process that reads pickles has neither network nor files, and what it imports is the standard library's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megalm
from megalm.errors import CheckpointError
from megalm.models.foreign import torch_file

ROOT = Path(megalm.__file__).resolve().parents[1]
MODULES = ("confinement", "archive", "opcodes")
_TRY = """
import sys; sys.path.append({root!r})
import os, socket, json
from megalm.models.foreign.confinement import confine
os.dup2(0, 9)  # descriptors below it are free
left = confine()
def refused(act):
    try: act()
    except OSError as error: return error.strerror
    return None
print(json.dumps({{
    "left": left,
    "file": refused(lambda: open("/etc/hostname")),
    "socket": refused(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
    "write": refused(lambda: os.write(os.open("/tmp/megalm-test-confined", os.O_CREAT | os.O_WRONLY), b"x")),
    "networks": refused(lambda: socket.if_nameindex()),
    "open": refused(lambda: os.fstat(9)),
}}))
try:
    hoard = bytearray(4 << 30); print("memory")
except MemoryError: print("bounded")
"""


def test_a_confined_process_has_no_files_no_sockets_and_little_memory() -> None:
    program = _TRY.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, env={}, timeout=60, check=True
    )
    told, memory = done.stdout.strip().splitlines()
    assert told.count("Too many open files") == 4, told
    assert memory == "bounded"


def test_it_imports_the_standard_library_alone() -> None:
    for name in MODULES:
        tree = ast.parse((ROOT / "megalm/models/foreign" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for imported in names:
                own = imported.removeprefix("megalm.models.foreign.") in MODULES
                assert own or imported.split(".")[0] in sys.stdlib_module_names, f"{name} imports {imported}"
                assert imported.split(".")[0] not in ("pickle", "marshal", "importlib", "subprocess"), imported


def test_a_reader_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    for program, reason in (("raise SystemExit(3)", "ended with 3"), ("print('[]')", "gave no sense")):
        monkeypatch.setattr(torch_file, "_PROGRAM", program)
        with pytest.raises(CheckpointError, match=reason):
            torch_file.read_file(tmp_path / "a.pt")
