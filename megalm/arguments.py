"""The pieces that the command line is built of: a parser that says what was meant, types of arguments, commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from megalm.errors import UserError
from megalm.registry import nearest

LARGEST_WORLD = 1 << 20
"""Of a dry run, whose one process lists the ranks of each axis."""


class UsageError(UserError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations that raises UsageError, with the nearest name, instead of exiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[\w-]+", choice.group(3))
            raise UsageError(f"{self.prog}: {_unknown(choice.group(2), choice.group(1), known)}")
        flag = re.fullmatch(r"argument (\S+): ignored explicit argument '(.*)'", message)
        if flag:
            message = f"{flag.group(1)}={flag.group(2)}: the option takes no value; leave it out"
        lacking = re.fullmatch(r"argument (\S+): expected one argument", message)
        if lacking:
            message = f"{lacking.group(1)} has no value behind it, or one that begins with '-'; give one that does not"
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise UsageError(f"{self.prog}: {_unknown(str(value), 'command', list(action.choices))}")
        super()._check_value(action, value)

    def option_names(self) -> list[str]:
        """Return the options of this parser and of all commands below it."""
        names = []
        for action in self._actions:
            names += [name for name in action.option_strings if name.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    names += parser.option_names()
        return sorted(set(names))


def _unknown(word: str, what: str, known: Sequence[str]) -> str:
    guess = nearest(word, known)
    hint = f"did you mean {guess}? " if guess else ""
    return f"unknown {what} {word!r}; {hint}known: {', '.join(known)}"


def number(least: int) -> Any:
    """Return an argument type for whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
            most = " of at most 18 digits" if text.isdecimal() and len(text) > 18 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on{most}")
        return int(text)

    return parse


def numbers(text: str) -> list[int]:
    """Return whole numbers from 1 on, written with commas between."""
    return [number(1)(word) for word in text.split(",")]


def place(text: str) -> tuple[int, int]:
    """Return the rank and the ranks of "RANK/WORLD"."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not RANK/WORLD, such as 0/64: the first of 64 ranks")
    rank, world = map(int, found.groups())
    if world > LARGEST_WORLD:
        raise argparse.ArgumentTypeError(f"a world of {world:,} ranks is too large; give at most {LARGEST_WORLD:,}")
    if rank >= world:
        ranks = "no rank" if world == 0 else f"ranks 0 to {world - 1}"
        raise argparse.ArgumentTypeError(f"there is no rank {rank} in a world of {world}, which has {ranks}")
    return rank, world


def fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error


class Commands:
    """Adds commands, each with the options that all share and the name of its function.

    The function is one of `megalm.commands`, or its name has the module in front: `launch.commands.launch_slurm`.
    """

    def __init__(self, parser: Parser, shared: Parser, title: str) -> None:
        self.parser, self.shared, self.title = parser, shared, title
        self.actions = parser.add_subparsers(title=title, metavar="COMMAND", required=False)

    def add(self, name: str, function: str | None, text: str) -> Parser:
        parser: Parser = self.actions.add_parser(name, parents=[self.shared], help=text, description=text)
        parser.set_defaults(function=function, parser=parser)
        return parser

    def group(self, name: str, text: str) -> Commands:
        return Commands(self.add(name, None, text), self.shared, "commands")
