"""Nothing in the source unpickles, or runs what it reads: checkpoints are safetensors and JSON, recipes safe YAML.

A pickle is a program. `torch.load` runs it, with `weights_only=True` too where its walls have a hole (CVE-2025-32434,
CVE-2026-24747), so a file of another program is read by its opcodes (`megalm.models.foreign.opcodes`, the one place
that imports pickletools, which only names them). Two things that write are left alone: torch's memory snapshot, for
torch's own viewer, and what it compiles. Tests may unpickle and torch.save: they read what they have written a moment
ago, and must make the files that an import is given. benchmarks/ may call torch.distributed.checkpoint, which has a
pickle for its index, as the yardstick, on files of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("megalm", "kernels", "benchmarks", "setup.py")
READER = "megalm/models/foreign/opcodes.py"

MODULES = {
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "jsonpickle", "joblib"), "unpickling runs a program"),
    **dict.fromkeys(("shelve", "marshal", "torch.serialization", "torch.package", "torch.hub"), "it unpickles"),
    **dict.fromkeys(
        ("multiprocessing.connection", "multiprocessing.managers", "torch.distributed.rpc"), "it unpickles"
    ),
    "pickletools": f"only {READER} reads opcodes",
    "torch.distributed.checkpoint": "its index is a pickle",
}
CALLS = {
    **dict.fromkeys(("torch.load", "torch.save", "torch.jit.load", "torch.export.load"), "torch's files are pickles"),
    **dict.fromkeys(
        ("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"), "not safe YAML"
    ),
    **dict.fromkeys(("eval", "exec", "builtins.eval", "builtins.exec"), "it runs what it is given"),
}
METHODS = {
    **dict.fromkeys(("read_pickle", "to_pickle"), "pandas' pickles"),
    **dict.fromkeys(
        ("all_gather_object", "gather_object", "send_object_list", "recv_object_list"),
        "use megalm.distributed.exchange",
    ),
    **dict.fromkeys(("broadcast_object_list", "scatter_object_list"), "use megalm.distributed.exchange"),
}
LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader")


class _Finder(ast.NodeVisitor):
    """Collects (line, what, why) of a module. Names are followed through its imports."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.safe_loaders = set(LOADERS)
        self.found: list[tuple[int, str, str]] = []

    def full_name(self, node: ast.AST) -> str:
        """Return the dotted name that an expression refers to, "" where it is none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.full_name(node.value)
            return f"{base}.{node.attr}" if base else f"?.{node.attr}"
        return ""

    def _note_module(self, line: int, name: str) -> None:
        for module, why in MODULES.items():
            if name == module or name.startswith(f"{module}."):
                self.found.append((line, name, why))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )
            self._note_module(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self.names[alias.asname or alias.name] = name
            self._note_module(node.lineno, name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(self.full_name(base) in LOADERS for base in node.bases):
            self.safe_loaders.add(node.name)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.full_name(node)
        self._note_module(node.lineno, name)
        self._note_name(node.lineno, name)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._note_name(node.lineno, self.full_name(node))

    def _note_name(self, line: int, name: str) -> None:
        """Note a function that is named, for a name that is passed on is called elsewhere."""
        is_method = "." in name and not name.startswith("megalm.")
        why = CALLS.get(name) or METHODS.get(name.rpartition(".")[2] if is_method else "")
        if why:
            self.found.append((line, name, why))

    def visit_Call(self, node: ast.Call) -> None:
        name = self.full_name(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        allowed = keywords.get("allow_pickle")
        if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
            self.found.append((node.lineno, "allow_pickle", "numpy's objects are pickles"))
        if name in ("yaml.load", "yaml.load_all"):
            loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or self.full_name(loader) not in self.safe_loaders:
                self.found.append((node.lineno, name, "not safe YAML"))
        if name in ("importlib.import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self._note_module(node.lineno, str(node.args[0].value))
        self.generic_visit(node)


def forbidden(source: str, path: str) -> list[str]:
    """Return a line for each thing that reads, or may read, a pickle or code."""
    finder = _Finder()
    finder.visit(ast.parse(source))
    found = set(finder.found)
    if path == READER:
        found = {item for item in found if not item[1].startswith("pickletools")}
    if path.startswith("benchmarks/"):
        found = {item for item in found if not item[1].startswith("torch.distributed.checkpoint")}
    return [f"{path}:{line} {what}: {why}" for line, what, why in sorted(found)]


def sources() -> Iterator[Path]:
    for name in SOURCES:
        place = ROOT / name
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def test_nothing_in_the_source_unpickles() -> None:
    files = list(sources())
    assert len(files) > 150
    problems = []
    for path in files:
        problems += forbidden(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert problems == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import cloudpickle as c",
        "import importlib\nimportlib.import_module('dill')",
        "import shelve",
        "import pickletools",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import torch as t\nt.load(path)",
        "from torch import load as read\nread(path)",
        "import torch\nread = torch.load",
        "import torch\ntorch.save(state, path)",
        "import torch\ntorch.serialization.load(path)",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "import torch.distributed.checkpoint as dcp",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.load(text, yaml.FullLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "eval(text)",
        "import builtins\nbuiltins.exec(text)",
        "import torch.distributed as dist\ndist.all_gather_object(out, value)",
        "from torch.distributed import broadcast_object_list\nbroadcast_object_list(x)",
        "from multiprocessing.connection import Listener",
        "import pandas as pd\npd.read_pickle(path)",
    ],
)
def test_what_unpickles_is_caught(source: str) -> None:
    assert len(forbidden(source, "megalm/planted.py")) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path)\nnp.load(path, allow_pickle=False)",
        "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(text, Loader=L)\nyaml.safe_load(text)",
        "import json\njson.load(file)\njson.loads(text)",
        "model.eval()\nre.compile('x')\nimport torch\ntorch.compile(model)",
        "def read_pickle(data): ...\nread_pickle(data)",
    ],
)
def test_what_only_looks_like_it_passes(source: str) -> None:
    assert forbidden(source, "megalm/planted.py") == []
