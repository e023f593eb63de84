"""The part of the compile check that runs once for each target, in a process of its own: see `compile_check`.

    python -m tests.kernels.compile_worker ORDER FILE

ORDER is JSON with the arguments of `work`, FILE is written as it goes: a line [number, row] for each row. Owns what is
launched, compiled and read off the result; which rows are wanted and how they look is left to `compile_check`.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

SHARED_LIMIT_KB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""What one block may take (CUDA programming guide, "Technical specifications"; CDNA 3 whitepaper)."""
FILES = {
    "sm_89": ("attention", "grouped_matmul", "layernorm", "rmsnorm"),
    "sm_120": ("attention", "grouped_matmul"),
}
"""All that is compiled for targets which mostly take the rows without an arch: what needs most shared memory. sm_120
has sm_89's limit and its matrix instructions, so the norms are compiled for one of the two."""
RESERVED_BYTES = 1024
"""From sm_90 on a block's listed shared memory holds what the system keeps, which is no part of the limit."""
DIED = "the compiler ends the process, later kernels are not compiled"
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 multiprocessor

_RESOURCES = re.compile(r"REG:(?P<REG>\d+).*STACK:(?P<STACK>\d+).*SHARED:(?P<SHARED>\d+)")
_LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
_HALF_PRODUCT = re.compile(r"tt\.dot .*: tensor<\d+x\d+xb?f16>")


@dataclass(frozen=True)
class Row:
    """What became of one kernel for one target; `problems` is empty where all is well."""

    kernel: str
    """file.function"""
    launch: str
    """The first launch that wants it."""
    types: str = ""
    """Element types of its pointers, in the order of the arguments."""
    constants: dict[str, str] = field(default_factory=dict)
    arch: str = ""
    triton: str = ""
    seconds: float = 0.0
    """What compiling took; next to nothing if Triton's cache had it."""
    registers: int | None = None
    shared_kb: float | None = None
    spills: int | None = None
    """Bytes of a thread's stack where local memory is read or written; on gfx942 the registers that are spilled."""
    wgmma: int | None = None
    """HGMMA instructions, where the kernel multiplies 16-bit matrices on sm_90."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """A kernel that a launch asked for, as Triton's launcher hands it to the compiler."""

    function: Any
    launch: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def types(self) -> list[str]:
        """Return the element types of the pointers."""
        return [kind[1:] for kind in self.signature.values() if str(kind).startswith("*")]

    def row(self, arch: str, version: str) -> Row:
        """Return the row of this kernel before it is compiled."""
        names = list(self.signature)
        constants = {names[path[0]]: str(value) for path, value in self.constants.items()}
        constants |= {key: str(self.options[key]) for key in ("num_warps", "num_stages")}
        kinds = (f"{len(list(run))}x{kind}" for kind, run in itertools.groupby(self.types()))
        return Row(name_of(self.function), self.launch, " ".join(kinds), constants, arch, version)


def name_of(function: Any) -> str:
    """Return file.function of a jitted function."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def work(
    arch: str, folder: Path, names: list[str], short: bool, part: tuple[int, int], tell: Callable[[int, Row], None]
) -> None:
    """Tell the numbered rows of one target; `part` (k, n) compiles every n-th kernel only, from the k-th on.

    A row is told before its kernel is compiled too, as that of a compiler that died; the last one of a number counts.
    """
    import triton

    target = set_target(arch)
    launches, failures = read_launches(folder, names)
    if arch in FILES:
        launches = {(file, name): call for (file, name), call in launches.items() if file in FILES[arch]}
    wanted, unprepared = record(launches)
    failures += unprepared
    if arch == "sm_90":
        missing = uncovered(jitted(folder), {item.function for item in wanted})
        failures += [Row(name, "", problems=["no launch"]) for name in missing if selected(name, names)]
    if part[0] == 0:  # they are the same in every part
        for number, row in enumerate(failures):
            tell(-1 - number, replace(row, arch=arch, triton=triton.__version__))
    if short:
        wanted = first_of_each(wanted)
    for number in range(part[0], len(wanted), part[1]):
        row = wanted[number].row(arch, triton.__version__)
        tell(number, replace(row, problems=[DIED]))
        begin = time.monotonic()
        row = compiled(wanted[number], target, row)
        tell(number, replace(row, seconds=time.monotonic() - begin))


def set_target(arch: str) -> Any:
    """Make Triton and the launch tables believe that the current GPU is of this architecture; return the target."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)

    class NoDriver(DriverBase):
        """A driver that can be asked what is compiled for, and nothing else."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched here")

        def get_current_target(self) -> GPUTarget:
            return target

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError("there is no device")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is launched here")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(NoDriver())
    return target


def read_launches(folder: Path, names: list[str]) -> tuple[dict[tuple[str, str], Callable[[], None]], list[Row]]:
    """Return the chosen launches by (file, name), and a row for each file that cannot be imported."""
    launches, failures = {}, []
    for path in sorted(folder.glob("*_launches.py")):
        file = path.stem.removesuffix("_launches")
        try:
            module = import_from(path)
        except Exception as error:
            failures.append(Row(f"{file}.*", path.name, problems=[f"no import: {one_line(error)}"]))
            continue
        for name, call in module.LAUNCHES.items():
            if not names or any(part in f"{file}: {name}" for part in names):
                launches[file, name] = call
    return launches, failures


def import_from(path: Path) -> Any:
    """Return the module of a file of this repository."""
    return importlib.import_module(".".join(path.resolve().relative_to(ROOT).with_suffix("").parts))


def record(launches: dict[tuple[str, str], Callable[[], None]]) -> tuple[list[Wanted], list[Row]]:
    """Return the distinct kernels that the launches want compiled, and a row for each launch that fails before."""
    from triton.runtime.jit import JITFunction

    from megalm.kernels import launch

    wanted: dict[tuple[int, str], Wanted] = {}
    failures = []
    current = ""
    run = JITFunction.run

    def only_prepare(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **options)

    def take_down(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, *_: Any
    ) -> None:
        given = Wanted(self, current, signature, constants, attributes, dict(options.__dict__))
        wanted.setdefault((id(self), key), given)

    def fused(*tensors: Any) -> bool:
        given = [tensor for tensor in tensors if tensor is not None]
        return all(t.dtype in launch.DTYPES or not t.is_floating_point() for t in given)

    JITFunction.run, JITFunction._do_compile, launch.fused = only_prepare, take_down, fused
    for (file, name), call in launches.items():
        current = f"{file}: {name}"
        try:
            call()
        except Exception as error:
            failures.append(Row(f"{file}.*", current, problems=[f"no launch: {one_line(error)}"]))
    return list(wanted.values()), failures


def first_of_each(wanted: list[Wanted]) -> list[Wanted]:
    """Return for each jitted function the first kernel with bf16 arguments, or its first."""
    chosen: dict[int, Wanted] = {}
    for item in sorted(wanted, key=lambda item: "bf16" not in item.types()):
        chosen.setdefault(id(item.function), item)
    return list(chosen.values())


def jitted(folder: Path) -> list[Any]:
    """Return the jitted functions of the launch files' modules and, if the folder is this one, of kernels/."""
    from triton.runtime.jit import JITFunction

    import megalm.kernels

    modules = [module for name, module in sys.modules.items() if name.endswith("_launches")]
    if folder == HERE:
        names = (found.name for found in pkgutil.iter_modules(megalm.kernels.__path__))
        modules += [importlib.import_module(f"megalm.kernels.{name}") for name in names]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    ]


def uncovered(functions: list[Any], launched: set[Any]) -> list[str]:
    """Return the names of jitted functions that nothing launches, directly or from another one."""
    reached = set()
    waiting = list(launched)
    while waiting:
        function = waiting.pop()
        if id(function) not in reached:
            reached.add(id(function))
            waiting += called_by(function)
    return [name_of(function) for function in functions if id(function) not in reached]


def selected(function: str, names: list[str]) -> bool:
    """Return whether the file of a jitted function is checked as a whole; attention has attention_scores too."""
    file = function.split(".")[0]
    return not names or any(file == name or file.startswith(f"{name}_") for name in names)


def called_by(function: Any) -> Iterator[Any]:
    """Yield the jitted functions that a jitted function names."""
    from triton.runtime.jit import JITFunction

    for node in ast.walk(function.parse()):
        value = None
        if isinstance(node, ast.Name):
            value = function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(function.__globals__.get(node.value.id), node.attr, None)
        if isinstance(value, JITFunction):
            yield value


def compiled(item: Wanted, target: Any, row: Row) -> Row:
    """Return the row with what the compiler made of the kernel."""
    import triton

    source = triton.compiler.ASTSource(item.function, item.signature, item.constants, item.attributes)
    try:
        kernel = triton.compile(source, target=target, options=item.options)
        row = measured_amd(kernel, row) if target.backend == "hip" else measured_nvidia(kernel, row)
    except Exception as error:
        return replace(row, problems=[f"does not compile: {one_line(error)}"])
    problems = []
    if row.spills:
        problems.append("spills")
    if row.shared_kb is not None and row.shared_kb > SHARED_LIMIT_KB[row.arch]:
        problems.append(f"shared memory above {SHARED_LIMIT_KB[row.arch]} KB")
    if row.wgmma == 0:
        problems.append("no wgmma")
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        problems.append(f"{columns} columns of tensor memory, {TENSOR_MEMORY_COLUMNS} are there")
    return replace(row, problems=problems)


def measured_nvidia(kernel: Any, row: Row) -> Row:
    """Return the row with the figures of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = tool("cuobjdump", "--dump-resource-usage", file.name)
        found = _RESOURCES.search(text)
        assert found is not None, f"cuobjdump gives no resources: {text}"
        registers, stack, static = (int(found[name]) for name in ("REG", "STACK", "SHARED"))
        if row.arch not in ("sm_80", "sm_89") and static:
            static -= RESERVED_BYTES
        product = row.arch == "sm_90" and _HALF_PRODUCT.search(kernel.asm["ttir"]) is not None
        code = tool("nvdisasm", "-c", file.name) if stack or product else ""
    return replace(
        row,
        registers=registers,
        shared_kb=(kernel.metadata.shared + static) / 1024,
        spills=stack if _LOCAL_MEMORY.search(code) else 0,  # a stack alone is also what a call takes
        wgmma=len(re.findall(r"\bHGMMA\b", code)) if product else None,
    )


def tool(name: str, *arguments: str) -> str:
    """Return what one of the tools in Triton's wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def measured_amd(kernel: Any, row: Row) -> Row:
    """Return the row with the figures of an AMD kernel's text."""
    figures = {}
    for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "group_segment_fixed_size"):
        found = re.search(rf"\.{key}:\s*(\d+)", kernel.asm["amdgcn"])
        assert found is not None, f"the assembly has no .{key}"
        figures[key] = int(found[1])
    # scalar registers are spilled into vector registers, which costs next to nothing, so they do not count
    return replace(
        row,
        registers=figures["vgpr_count"],
        shared_kb=max(kernel.metadata.shared, figures["group_segment_fixed_size"]) / 1024,
        spills=figures["vgpr_spill_count"],
    )


def one_line(error: BaseException) -> str:
    """Return an error, or the one at the bottom of a compiler's chain of errors, as one line of bounded length."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(getattr(error, "error_message", None) or error).split())
    return f"{type(error).__name__}: {text[-400:]}"


def main() -> None:
    """Do the order."""
    order = json.loads(sys.argv[1])
    with open(sys.argv[2], "w", encoding="utf-8") as file:

        def tell(number: int, row: Row) -> None:
            file.write(json.dumps([number, asdict(row)]) + "\n")
            file.flush()

        work(**order | {"folder": Path(order["folder"])}, tell=tell)


if __name__ == "__main__":
    main()
