"""Imports point down only, those inside functions too, and the heavy ones stand where they belong."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the top down; packages on one floor do not import each other.
FLOORS = [
    {"arguments", "cli", "commands", "__main__"},
    {"quickstart", "bench"},
    {"launch", "dry_run"},
    {"train"},
    {"evaluation", "watchdog"},
    {"generation"},
    {"models"},
    {"nn"},
    {"preflight"},
    {"tensor_parallel", "context_parallel", "expert_parallel", "pipeline_parallel", "zero", "checkpoint"},
    {"nn.ops"},
    {"distributed", "data"},
    {"config"},
    {"answers", "errors", "registry", "files", "version"},
]
# Packages that share the top floor are one program, and the lowest floor may use its own errors.
MAY_SHARE = [FLOORS[0], FLOORS[-1]]
WITHOUT_TORCH = (
    "megalm/config/*.py",
    "megalm/registry.py",
    "megalm/answers.py",
    "megalm/errors.py",
    "megalm/cli.py",
    "megalm/commands.py",
    "megalm/launch/*.py",
    "megalm/bench/*.py",
    "megalm/checkpoint/names.py",
    "megalm/distributed/layout.py",
    "megalm/distributed/rendezvous.py",
    "megalm/models/sources.py",
    "megalm/preflight/cluster.py",
    "megalm/preflight/environment.py",
    "megalm/preflight/finding.py",
    "megalm/preflight/gpus.py",
    "megalm/preflight/judge.py",
    "megalm/preflight/machine.py",
    "megalm/preflight/report.py",
    "megalm/preflight/storage.py",
    "megalm/preflight/witness.py",
    "megalm/pipeline_parallel/actions.py",
    "megalm/pipeline_parallel/drawing.py",
    "megalm/pipeline_parallel/schedules.py",
    "megalm/pipeline_parallel/zero_bubble.py",
    "megalm/pipeline_parallel/simulator.py",
    "megalm/pipeline_parallel/partition.py",
)


DYNAMIC_IMPORTS = ("importlib.import_module", "import_module", "__import__")


def floor_of(package: str) -> int | None:
    return next((level for level, packages in enumerate(FLOORS) if package in packages), None)


def imports_of(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import statement, wherever it stands.

    `from a import b` yields a.b, for b may be a module. Imports under `if TYPE_CHECKING` count: they are arrows too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC_IMPORTS and node.args:
            yield node.lineno, ast.unparse(node.args[0]).strip("'")


def modules(root: Path) -> dict[str, Path]:
    """Return every module of megalm by dotted name; kernels/ is megalm.kernels."""
    found = {}
    for folder, name in ((root / "megalm", "megalm"), (root / "kernels", "megalm.kernels")):
        for path in sorted(folder.rglob("*.py")):
            found[".".join([name, *path.relative_to(folder).with_suffix("").parts])] = path
    return found


def package_of(name: str) -> str:
    """Return the part of megalm that a dotted name belongs to: megalm.nn.block.TransformerBlock -> nn.

    nn.ops is a part of its own, with nn.masks and nn.activations: the tensor-parallel layers below nn use it too.
    """
    parts = name.split(".")
    return "nn.ops" if parts[1:3] in (["nn", "ops"], ["nn", "masks"], ["nn", "activations"]) else ".".join(parts[1:2])


def broken_rules(root: Path) -> list[str]:
    """Return a line for each import that the floors forbid."""
    problems = []
    for module, path in modules(root).items():
        relative = path.relative_to(root).as_posix()
        here = package_of(module)
        for line, name in imports_of(path.read_text(encoding="utf-8"), module):
            top = name.split(".")[0]
            reason = None
            if here == "kernels":
                allowed = top in {"torch", "triton"} or top in sys.stdlib_module_names
                if not allowed and not name.startswith("megalm.kernels"):
                    reason = "kernels import torch and triton only"
            elif top == "megalm":
                reason = _reason_against(module, here, name)
            elif top == "deepspeed" and here != "zero":
                reason = "only megalm.zero imports deepspeed"
            if top in ("torch", "deepspeed", "triton") and any(path.match(str(root / p)) for p in WITHOUT_TORCH):
                reason = f"{relative} works without {top}"
            if here == "data" and name.startswith(("torch.distributed", "megalm.distributed")):
                reason = "data is told its rank and imports no torch.distributed"
            if reason:
                problems.append(f"{relative}:{line} imports {name}: {reason}")
    return problems


def _reason_against(module: str, here: str, name: str) -> str | None:
    there = package_of(name)
    if there == "kernels":
        return None if module == "megalm.nn.ops" else "only megalm.nn.ops imports megalm.kernels"
    if there == here or not here or there in ("ds_configs", "slurm"):
        return None
    level, target = floor_of(here), floor_of(there)
    if level is None or target is None:
        return f"megalm.{here if level is None else there} stands on no floor; add it to FLOORS"
    if target < level:
        return f"megalm.{there} stands above megalm.{here}"
    if target == level and not any({here, there} <= floor for floor in MAY_SHARE):
        return f"megalm.{there} stands beside megalm.{here}"
    return None


def plant(root: Path, files: dict[str, str]) -> list[str]:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return broken_rules(root)


def test_imports_point_down() -> None:
    assert len(modules(ROOT)) > 20
    assert broken_rules(ROOT) == []


def test_every_package_stands_on_a_floor() -> None:
    packages = {package_of(name) for name in modules(ROOT)} - {"kernels", "__init__"}
    assert {package for package in packages if floor_of(package) is None} == set()


def test_an_import_upwards_is_caught_even_inside_a_function(tmp_path: Path) -> None:
    source = "def f():\n    from megalm.train import trainer\n"
    assert plant(tmp_path, {"megalm/data/planted.py": source}) == [
        "megalm/data/planted.py:2 imports megalm.train.trainer: megalm.train stands above megalm.data"
    ]


def test_an_import_sideways_is_caught(tmp_path: Path) -> None:
    (problem,) = plant(tmp_path, {"megalm/zero/planted.py": "import megalm.checkpoint.reader\n"})
    assert problem.endswith("megalm.checkpoint stands beside megalm.zero")


def test_relative_and_dynamic_imports_are_seen(tmp_path: Path) -> None:
    files = {
        "megalm/data/a.py": "from ..train import trainer\n",
        "megalm/data/b.py": "import importlib\nimportlib.import_module('megalm.models.build')\n",
    }
    assert [problem.split(": ")[1] for problem in plant(tmp_path, files)] == [
        "megalm.train stands above megalm.data",
        "megalm.models stands above megalm.data",
    ]


def test_heavy_imports_outside_their_place_are_caught(tmp_path: Path) -> None:
    files = {
        "megalm/train/a.py": "def f():\n    import deepspeed\n",
        "megalm/models/b.py": "from megalm.kernels import softmax\n",
        "megalm/config/c.py": "import torch\n",
        "megalm/pipeline_parallel/schedules.py": "def f():\n    import torch\n",
        "megalm/data/d.py": "import torch.distributed as dist\n",
        "kernels/e.py": "from megalm.errors import ConfigError\n",
        "kernels/f.py": "import numpy\nimport torch\nimport triton.language as tl\nfrom megalm.kernels import e\n",
        "megalm/unknown/g.py": "from megalm.errors import ConfigError\n",
    }
    problems = plant(tmp_path, files)
    assert len(problems) == 8, "\n".join(problems)


def test_allowed_imports_pass(tmp_path: Path) -> None:
    files = {
        "megalm/zero/a.py": "import deepspeed\nfrom megalm.distributed import mesh\n",
        "megalm/nn/ops.py": "from megalm.kernels import softmax\n",
        "megalm/cli.py": "from megalm import commands\nfrom megalm.errors import ConfigError\n",
        "megalm/errors.py": "from megalm.version import __version__\n",
    }
    assert plant(tmp_path, files) == []
