"""What a command prints when it is done: text as it stands, or a result as JSON or as lines."""

from __future__ import annotations

import json
from typing import Any

MOST_ITEMS = 8
"""Of a list, that lines show."""


def show(text: str) -> int:
    """Print a text and return 0, the exit status."""
    print(text)
    return 0


def answer(result: dict[str, Any], as_json: bool) -> int:
    """Print a result as JSON, or one `key  value` a line with nested keys dotted; return 0, the exit status."""
    if as_json:
        return show(json.dumps(result, indent=2, ensure_ascii=False))
    rows = list(_rows("", result))
    width = max(len(key) for key, _ in rows)
    return show("\n".join(f"{key:<{width}}  {value}" for key, value in rows))


def counted(count: int, what: str) -> str:
    """Return `1 rank`, `2 ranks`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(items: list[Any]) -> str:
    """Return the items of a list, of a long one the first few."""
    shown = [
        f"[{_listed(i)}]" if isinstance(i, list) else json.dumps(i, ensure_ascii=False) for i in items[:MOST_ITEMS]
    ]
    return ", ".join(shown) + (f" and {len(items) - len(shown)} more (--json has all)" if items[MOST_ITEMS:] else "")


def _rows(prefix: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in result.items():
        if isinstance(value, dict) and value:
            rows += _rows(f"{prefix}{key}.", value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                rows += _rows(f"{prefix}{key}.{index}.", item)
        elif isinstance(value, list):
            rows.append((prefix + key, _listed(value)))
        elif isinstance(value, int) and not isinstance(value, bool):
            rows.append((prefix + key, f"{value:,}"))
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return rows
