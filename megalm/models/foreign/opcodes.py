"""What a pickle says, read without unpickling it: plain values, tensors, and names of everything else.

Owns the walk over the opcodes. Nothing here imports or calls what a pickle names: of the globals that it refers to a
few are known by their names, as how torch writes a tensor down, and any other becomes an `Inert` with that name.
Standard library only, as it runs in the process of `confinement`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pickletools import genops
from typing import Any

MOST_OPCODES = 4_000_000
MOST_NODES = 2_000_000  # of the answer, in which what a pickle refers to twice stands twice
MOST_CHARACTERS = 128 << 20
DEEPEST = 64
_LARGEST_INTEGER = 1 << 63

STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
"""The dtype of each kind of storage, by safetensors' names."""
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_MAPPINGS = ("argparse.Namespace", "types.SimpleNamespace", "collections.OrderedDict", "builtins.dict")
_SEQUENCES = ("torch.Size", "builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset")


class Refused(Exception):
    """A file is no pickle, is broken, or wants more memory than any checkpoint needs."""


@dataclass
class Inert:
    """What a pickle names and would have made: never imported, never called."""

    name: str
    arguments: Any = None
    state: Any = None


@dataclass
class Pairs:
    """A mapping, as the pairs that were set: keys may be anything, and are not hashed."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """Numbers in a part of the file beside the pickle: their dtype ("": bytes of any), the part's key, how many."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as torch writes it down: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()


class _Machine:
    """The stack and the memo of a pickle. Each method is one opcode, or several that differ in how they are written."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("an opcode finds nothing on the stack")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise Refused("an opcode finds no mark on the stack")
        self.stack.pop()
        return items[::-1]

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("the pickle refers to a value that it has not made")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise Refused(f"the pickle adds items to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            return
        if not isinstance(target, Pairs) or len(items) % 2:
            raise Refused(f"the pickle sets items of a {type(target).__name__}")
        target.items.extend(zip(items[::2], items[1::2], strict=True))

    def call(self, arguments: Any, function: Any) -> None:
        """Push what a known function would have made, else its name with its arguments."""
        self.stack.append(_made(_name_of(function), arguments))

    def build(self) -> None:
        """Set an object's state: a mapping gets its items, an inert one keeps them."""
        state, target = self.pop(), self.top()
        if isinstance(target, Pairs) and isinstance(state, Pairs):
            target.items.extend(state.items)
        elif isinstance(target, Inert):
            target.state = state

    def find(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("the name of a global is no text")
        self.stack.append(_global(module, name))


def _global(module: str, name: str) -> Inert:
    return Inert(f"{module.replace('__builtin__', 'builtins')}.{name}")


def _name_of(function: Any) -> str:
    """Return the name of what a pickle calls; a result that it calls has none that is known."""
    plain = isinstance(function, Inert) and function.arguments is None and function.state is None
    return function.name if plain else "?"


def _made(name: str, arguments: Any) -> Any:
    given = arguments if isinstance(arguments, tuple) else ()
    if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and given:
        return _made(_name_of(given[0]), ())
    if name in _MAPPINGS and len(given) <= 1:
        pairs = given[0] if given and isinstance(given[0], list | tuple) else []
        return Pairs([(pair[0], pair[1]) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2])
    if name in _SEQUENCES and len(given) == 1 and isinstance(given[0], list | tuple):
        return list(given[0])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state") and given:
        return given[0]
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2") and len(given) >= 4:
        return _tensor(*given[:4])
    if name == "torch._utils._rebuild_tensor_v3" and len(given) >= 7:
        storage, offset, shape, strides = given[:4]
        return _tensor(storage, offset, shape, strides, DTYPES.get(_name_of(given[6]), ""))
    return Inert(name, arguments)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> Any:
    """Return the record of a tensor. Whether it lies inside its storage is for the reader to check."""
    numbers = [offset, *_sequence(shape), *_sequence(strides)]
    if not isinstance(storage, Storage) or any(type(number) is not int for number in numbers):
        raise Refused("a tensor is written down in a way that torch does not write")
    if dtype is not None:
        storage = Storage(dtype, storage.key, storage.count)
    return TensorRecord(storage, offset, tuple(_sequence(shape)), tuple(_sequence(strides)))


def _sequence(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise Refused("the shape of a tensor is no sequence")
    return list(value)


def _storage(identity: Any) -> Storage:
    """Return the storage that a persistent id names: ("storage", kind, key, device, number of elements)."""
    if isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage":
        _, kind, key, _, count = identity[:5]
        if isinstance(key, str) and type(count) is int and isinstance(kind, Inert):
            return Storage(STORAGES.get(kind.name, ""), key, count)
    raise Refused("a persistent id is not that of a storage")


_PLAIN = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
"""Opcodes whose argument is the value."""

_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "NONE": lambda machine, argument: machine.stack.append(None),
    "NEWTRUE": lambda machine, argument: machine.stack.append(True),
    "NEWFALSE": lambda machine, argument: machine.stack.append(False),
    "MARK": lambda machine, argument: machine.stack.append(_MARK),
    "POP": lambda machine, argument: machine.pop(),
    "POP_MARK": lambda machine, argument: machine.pop_mark(),
    "DUP": lambda machine, argument: machine.stack.append(machine.top()),
    "EMPTY_LIST": lambda machine, argument: machine.stack.append([]),
    "EMPTY_SET": lambda machine, argument: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, argument: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, argument: machine.stack.append(Pairs()),
    "LIST": lambda machine, argument: machine.stack.append(machine.pop_mark()),
    "FROZENSET": lambda machine, argument: machine.stack.append(machine.pop_mark()),
    "TUPLE": lambda machine, argument: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "APPEND": lambda machine, argument: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, argument: machine.extend(machine.pop_mark()),
    "ADDITEMS": lambda machine, argument: machine.extend(machine.pop_mark()),
    "DICT": lambda machine, argument: _dict(machine),
    "SETITEM": lambda machine, argument: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, argument: machine.set_items(machine.pop_mark()),
    "PUT": lambda machine, argument: machine.remember(argument),
    "BINPUT": lambda machine, argument: machine.remember(argument),
    "LONG_BINPUT": lambda machine, argument: machine.remember(argument),
    "MEMOIZE": lambda machine, argument: machine.remember(len(machine.memo)),
    "GET": lambda machine, argument: machine.recall(argument),
    "BINGET": lambda machine, argument: machine.recall(argument),
    "LONG_BINGET": lambda machine, argument: machine.recall(argument),
    # genops gives module and name with a space between
    "GLOBAL": lambda machine, argument: machine.stack.append(_global(*argument.rsplit(" ", 1))),
    "STACK_GLOBAL": lambda machine, argument: machine.find(),
    "BINPERSID": lambda machine, argument: machine.stack.append(_storage(machine.pop())),
    "REDUCE": lambda machine, argument: machine.call(machine.pop(), machine.pop()),
    "NEWOBJ": lambda machine, argument: machine.call(machine.pop(), machine.pop()),
    "NEWOBJ_EX": lambda machine, argument: _new_with_keywords(machine),
    "INST": lambda machine, argument: machine.call(tuple(machine.pop_mark()), _global(*argument.rsplit(" ", 1))),
    "OBJ": lambda machine, argument: _object(machine),
    "BUILD": lambda machine, argument: machine.build(),
}


def _dict(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append(Pairs())
    machine.set_items(items)


def _new_with_keywords(machine: _Machine) -> None:
    machine.pop()
    machine.call(machine.pop(), machine.pop())


def _object(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.call(tuple(items[1:]), items[0] if items else None)


def read_pickle(data: bytes) -> Any:
    """Return what a pickle describes: None, bool, int, float, str, bytes, list, tuple, and the classes above.

    Raises Refused for what is no pickle, or has opcodes that torch does not write.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(genops(io.BytesIO(data))):
            if number >= MOST_OPCODES:
                raise Refused(f"the pickle has more than {MOST_OPCODES} opcodes")
            if opcode.name in _PLAIN:
                machine.stack.append(argument)
            elif opcode.name == "STOP":
                break
            elif opcode.name in _ACTIONS:
                _ACTIONS[opcode.name](machine, argument)
            else:
                raise Refused(f"the opcode {opcode.name} is none that torch writes")
        return machine.pop()
    except (ValueError, TypeError, IndexError, AttributeError, UnicodeError, OverflowError) as error:
        raise Refused(f"not a whole pickle ({' '.join(str(error).split())[:200]})") from error


class Encoder:
    """Values as JSON has them, with tensors where `place` finds them in the file.

    None, bool, int, float and str are themselves; others are objects of one key: list, dict (pairs), bytes (their
    number), tensor ([dtype, first byte, bytes, CRC-32, offset, shape, strides]), object ([name, arguments, state]).
    """

    def __init__(self, place: Callable[[str], tuple[int, int, int]]) -> None:
        self._place = place
        self._nodes = self._characters = 0

    def encode(self, value: Any, depth: int = 0) -> Any:
        """Return the value for `json.dumps`. Raises Refused where it is too deep or too large."""
        self._nodes += 1
        if depth > DEEPEST:
            raise Refused(f"values are nested more than {DEEPEST} deep")
        if self._nodes > MOST_NODES or self._characters > MOST_CHARACTERS:
            raise Refused(f"more than {MOST_NODES} values, or {MOST_CHARACTERS} characters")
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return value if abs(value) < _LARGEST_INTEGER else {"object": ["builtins.int", None, None]}
        if isinstance(value, str):
            self._characters += len(value)
            return value
        if isinstance(value, bytes | bytearray):
            return {"bytes": len(value)}
        if isinstance(value, list | tuple):
            return {"list": [self.encode(item, depth + 1) for item in value]}
        if isinstance(value, Pairs):
            return {"dict": [[self.encode(key, depth + 1), self.encode(item, depth + 1)] for key, item in value.items]}
        if isinstance(value, TensorRecord):
            return {"tensor": self._tensor(value)}
        if isinstance(value, Storage):
            return {"object": ["torch.Storage", None, None]}
        if not isinstance(value, Inert):
            raise Refused(f"{type(value).__name__} is none of the values that a checkpoint holds")
        self._characters += len(value.name)
        parts = [None if part is None else self.encode(part, depth + 1) for part in (value.arguments, value.state)]
        return {"object": [value.name, *parts]}

    def _tensor(self, record: TensorRecord) -> list[Any]:
        numbers = (record.storage.count, record.offset, *record.shape, *record.strides)
        if any(abs(number) >= _LARGEST_INTEGER for number in numbers) or len(record.shape) > DEEPEST:
            raise Refused("a tensor has a shape that no memory holds")
        first, size, crc = self._place(record.storage.key)
        return [record.storage.dtype, first, size, crc, record.offset, list(record.shape), list(record.strides)]
