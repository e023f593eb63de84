"""Says in plain words what is wrong with a value, and which key a misspelt one was meant to be."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalm.registry import nearest

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

TEXT_LIMIT = 60
LIMITS = {
    "greater_than_equal": ("too small; use at least", "ge"),
    "greater_than": ("too small; use more than", "gt"),
    "less_than_equal": ("too large; use at most", "le"),
    "less_than": ("too large; use less than", "lt"),
}
"""Words for pydantic's errors of that name, and where it has the limit."""


def show_value(value: Any) -> str:
    """Return `value` as the user would write it in YAML, at most TEXT_LIMIT characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        # Lists in a list are not looked into: YAML aliases make them as deep and as many as a file likes.
        items = ["[...]" if isinstance(item, (list, dict)) else show_value(item) for item in value[:8]]
        text = f"[{', '.join(items)}{', ...' if len(value) > 8 else ''}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(str(key) for key in list(value)[:4])}, ...}}"
    elif isinstance(value, int) and value.bit_length() > 128:
        text = f"an integer of {value.bit_length()} bits"
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 3] + "..."


def describe(error: ErrorDetails, key: str, value: Any, field: FieldInfo) -> str:
    """Return `key=value` with what is wrong and what to write instead, for one of pydantic's errors.

    `field` is the key's declaration; where it allows null, that is said as well.
    """
    inside = error["loc"][-2:]
    if len(inside) == 2 and isinstance(inside[0], int):  # a key of one of several sections
        return _describe_inner(error, f"{key}[{inside[0]}].{inside[1]}")
    if error["type"] == "missing" and not isinstance(value, (list, tuple)):
        return f"{key}: missing, and it has no default; set it"
    if error["type"] in LIMITS and isinstance(error["loc"][-1], int):  # of one of a list's values
        return _wrong_value(error, f"{key}[{error['loc'][-1]}]={show_value(error['input'])}", error["input"], None)
    null = ""
    if type(None) in typing.get_args(field.annotation):
        null = ", or null, the default" if field.default is None else ", or null"
    return f"{_wrong_value(error, f'{key}={show_value(value)}', value, field)}{null}"


def _describe_inner(error: ErrorDetails, key: str) -> str:
    """Return what `describe` does for a key within one of several sections."""
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; see `megalm config show RECIPE` and the README for those of a rule"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default; set it"
    return _wrong_value(error, f"{key}={show_value(error['input'])}", error["input"], None)


def _wrong_value(error: ErrorDetails, shown: str, value: Any, field: FieldInfo | None) -> str:
    """Return what is wrong with the value `shown`, and the remedy; `field` None: it is none of a recipe's own."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in LIMITS:
        words, name = LIMITS[kind]
        limit = context[name]
        return f"{shown} is {words} {limit:g}" if isinstance(limit, float) else f"{shown} is {words} {limit}"
    if kind == "unknown_choice":
        return f"{shown}: unknown {context['kind']}; {context['hint']}"
    if field is not None and kind in ("too_short", "too_long", "missing"):
        count = "1 value" if len(value) == 1 else f"{len(value)} values"
        return f"{shown} has {count}; write {len(typing.get_args(field.annotation))}"
    if field is not None and kind == "model_type":
        return f"{shown} has one that is not made of keys; write a list such as {_example(value, field)}"
    if field is not None and kind in ("tuple_type", "list_type"):
        return f"{shown} is not a list; write one such as {_example(value, field)}"
    return f"{shown} {_wrong_type(kind, error['input'])}"


def _example(value: Any, field: FieldInfo) -> str:
    """Return a list that a key may have: its default, what its sections need, a name in brackets, or numbers."""
    if field.default:
        return show_value(field.default)
    for part in typing.get_args(field.annotation):
        if hasattr(part, "model_fields"):
            needed = [key for key, inner in part.model_fields.items() if inner.is_required()]
            return f"[{{{', '.join(f'{key}: ...' for key in needed)}}}]"
    if takes_text(field.annotation):
        return f"[{value}]" if isinstance(value, str) else "[]"
    return "[1, 2]"


def takes_text(declared: Any) -> bool:
    """Return whether a declared type is text, or one with text in it, such as text or null."""
    return declared is str or any(takes_text(part) for part in typing.get_args(declared))


def _wrong_type(kind: str, value: Any) -> str:
    """Return what is wrong with a value of the wrong type, and the remedy."""
    if kind in ("int_type", "int_from_float", "int_parsing"):
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e18:
            return f"is not a whole number; write {int(value)}"
        if isinstance(value, str) and value.strip().isdigit():
            return f"is text, not a whole number; write {value.strip()} without quotes"
        return "is not a whole number; write one such as 4"
    if kind in ("float_type", "float_parsing", "finite_number"):
        return "is not a finite number; write one such as 0.1 or 1e-4, without quotes"
    if kind in ("bool_type", "bool_parsing"):
        return "is neither true nor false; write true or false, without quotes"
    if kind == "string_type":
        return "is not text; write a name" if value is None else "is not text; put it in quotes"
    if kind == "string_too_short":
        return "is empty text; write a name"
    if kind == "string_pattern_mismatch":
        return "has other letters than S and L; write one for each layer, such as SSL"
    return f"is not allowed ({kind})"


_NO_KEYS = {"parallel.data": "the data ranks are those that the other axes leave of the world; give more processes"}


def unknown_key(section: str, key: str, keys: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what to say of `key` in `section` ("" for the top), and the dotted key that it probably meant.

    `keys` holds every dotted key of a recipe.
    """
    prefix = f"{section}." if section else ""
    path = prefix + key
    if path in _NO_KEYS:
        return f"{path}: unknown key; {_NO_KEYS[path]}", None
    if not section and key in keys:
        return f"{path}: unknown key; write it as {key.split('.', 1)[1]} under `{key.split('.', 1)[0]}:`", key
    inside = [name.removeprefix(prefix) for name in keys if name.startswith(prefix)]
    if not section:
        inside = sorted({name.split(".")[0] for name in inside} | {"base"})
    guess = nearest(key, inside)
    if guess:
        return f"{path}: unknown key; did you mean {guess}?", prefix + guess
    elsewhere = [name for name in keys if name.split(".")[-1] == key]
    if elsewhere:
        return f"{path}: unknown key; did you mean {elsewhere[0]}?", elsewhere[0]
    return f"{path}: unknown key; known here: {', '.join(inside)}", None


def unknown_override(path: str, keys: Mapping[str, Any]) -> str:
    """Return what to say of an override whose dotted key is not known."""
    if path == "base":
        return "base stands in a recipe's file alone; give that recipe in place of this one"
    if path in _NO_KEYS:
        return f"{path}: unknown key; {_NO_KEYS[path]}"
    leaf = path.split(".")[-1]
    same_leaf = [name for name in keys if name.split(".")[-1] == leaf]
    guess = same_leaf[0] if same_leaf else nearest(path, keys)
    if guess is None:
        by_leaf = {name.split(".")[-1]: name for name in keys}
        close = nearest(leaf, by_leaf)
        guess = by_leaf[close] if close else None
    hint = f"did you mean {guess}?" if guess else "`megalm config show RECIPE` lists the keys"
    return f"{path}: unknown key; {hint}"
