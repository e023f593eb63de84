"""The values of a `config.json`, each checked when it is read: the file may be anyone's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.errors import ConfigError

LARGEST = 2**31 - 1


class Fields:
    """The values of a `config.json`, each checked when it is read. Methods raise ConfigError naming file and key."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values = {**(defaults or {}), **values}
        self.where = where

    def wrong(self, key: str, reason: str) -> ConfigError:
        """Return the error for a value."""
        return ConfigError(f"{self.where}: {key}={repr(self.values.get(key))[:60]} {reason}")

    def count(self, key: str, least: int = 1, most: int = LARGEST) -> int:
        """Return a whole number."""
        value: Any = self.values.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"is no whole number from {least} to {most}")
        return value

    def number(self, key: str, least: float = 0.0, most: float = 1e12) -> float:
        """Return a finite number."""
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.wrong(key, f"is no number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value: Any = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "is neither true nor false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], what: str) -> str:
        """Return what a text stands for."""
        value: Any = self.values.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"is {what} that megalm lacks; it has {', '.join(choices)}")
        return choices[value]

    def section(self, key: str) -> dict[str, Any]:
        """Return an object, empty where there is none."""
        value: Any = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "is no object")
        return value or {}

    def has(self, key: str) -> bool:
        """Return whether there is a value that is not null."""
        return self.values.get(key) is not None
