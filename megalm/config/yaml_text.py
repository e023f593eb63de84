"""Reads YAML as recipes use it, and writes it: plain values only, no key twice, `1e-4` a number.

It leaves what the keys mean to `load`. Every failure is a ConfigError that names the file and, where it has
one, the line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megalm.errors import ConfigError
from megalm.files import require_regular

LARGEST_FILE_BYTES = 1 << 20
FLOAT_TAG = "tag:yaml.org,2002:float"
# YAML 1.1, which PyYAML reads, takes 1e-4 for text because it has no point; YAML 1.2 takes it for a number.
EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_SEAL = "# SHA-256 of the lines below: "


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first_lines:
                problem = f"key {key.value} is given twice, first in line {first_lines[name]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first_lines[name] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes text which `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list_in_one_line(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(list, _list_in_one_line)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(FLOAT_TAG, EXPONENT_FLOAT, list("-+0123456789"))


def parse(text: str, source: str) -> Any:
    """Return the value that `text` holds; `source` names it in errors. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: {_plain_words(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML text ({_first_line(error)}); give a recipe") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply; a recipe has sections of plain values") from error
    except ValueError as error:
        reason = f"a value cannot be read ({_first_line(error)})"
        raise ConfigError(f"{source}: {reason}; put it in quotes") from error


def read(path: Path) -> dict[Any, Any]:
    """Return the mapping that the file holds. Raises ConfigError where there is none, or a seal that does not fit."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give a shipped recipe's name or a file's path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    if len(content) > LARGEST_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {LARGEST_FILE_BYTES} bytes, so no recipe; give a YAML file")
    if content.startswith(_SEAL.encode()) and content != _with_seal(content.partition(b"\n")[2]):
        raise ConfigError(
            f"{path}: is not as it was written, the SHA-256 in its first line is of another text; "
            "restore it from a copy, or take that line out if you changed the file yourself"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); give a YAML recipe") from error
    value = parse(text, str(path))
    if value is None:
        raise ConfigError(f"{path}: empty; a recipe needs the sections model, train and optim")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {_kind_of(value)}, not sections; write keys such as `model:`")
    return value


def dump(mapping: dict[str, Any]) -> str:
    """Return `mapping` as YAML that `parse` reads back to the same values."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)


def sealed(text: str) -> str:
    """Return YAML text with its checksum in front, in a comment: a program wrote it, and `read` sees any damage.

    In front, because a file that lost its end would lose a checksum that stands there, and still be YAML.
    """
    return _with_seal(text.encode()).decode()


def _with_seal(text: bytes) -> bytes:
    return f"{_SEAL}{hashlib.sha256(text).hexdigest()}\n".encode() + text


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {str(value)[:40]!r}"


def _plain_words(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join((error.problem or error.context or "unreadable").split())
    tag = re.search(r"constructor for the tag '(?:tag:yaml\.org,2002:)?([^']*)'", problem)
    if tag:
        return f"the tag !!{tag.group(1).lstrip('!')} is refused; a recipe holds plain values only"
    if "given twice" in problem:
        return problem
    return f"not valid YAML: {problem}; check indentation, colons and quotes"


def section_lines(text: str) -> list[tuple[str, str]]:
    """Return a resolved recipe as one (section, "key=value key=value") a section; unset keys are left out."""
    rows: list[tuple[str, str]] = []
    for name, section in yaml.safe_load(text).items():
        if isinstance(section, dict):
            line = " ".join(f"{key}={_plain(value)}" for key, value in section.items() if value is not None)
        else:
            line = _plain(section)
        rows.append((name, line))
    return rows


def _plain(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list | bool) else str(value)
