"""Things chosen by name in a recipe, and the nearest name for a word that is not known.

It leaves to `megalm.config.choices` the names that a recipe may use before any of these modules is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from megalm.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the member of `known` that `word` most likely means, or None when none is close."""
    names = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return names[matches[0]] if matches else None


def unknown_name(word: str, known: Iterable[str]) -> str:
    """Return what to say of a name that is not known: `did you mean x? known: x, y`."""
    names = sorted(known)
    guess = nearest(word, names)
    hint = f"did you mean {guess}? " if guess else ""
    return f"{hint}known: {', '.join(names)}"


class Registry(Generic[T]):
    """The implementations of one kind of thing (`norm`, `schedule`, ...) by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files a class or function under `name` and hands it back unchanged."""
        assert name not in self._entries, f"{self.kind} {name!r} is registered twice"

        def file(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return file

    def get(self, name: str) -> T:
        """Return the entry called `name`. Raises ConfigError with the nearest name and all known ones."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}; {unknown_name(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the known names in alphabetical order."""
        return sorted(self._entries)
