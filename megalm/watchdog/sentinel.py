"""The watcher process of one rank: reads its pulse, tells the watcher of rank 0, and ends the rank when that says so.

Started by `watch`, which writes commands to its standard input, a JSON object a line; when that closes the rank is done
or dead, and the watcher ends. A process of its own is needed because the rank may be stopped, or hold its interpreter's
lock. It imports neither torch nor pydantic: it takes some 10 MB and no time.

The watcher of rank 0 is the hub. Every watcher keeps one connection to it and sends a line a second. When a rank that
has begun a step has not gone on for the time-out, the hub has every rank write its Python stacks to its standard error
and stand still, names who stopped first, and has every rank end with status HUNG. A watcher that has lost its hub does
so for its own.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.errors import FROZEN, HUNG
from megalm.watchdog.diagnosis import Report, find_culprits
from megalm.watchdog.pulse import Pulse

_POLL_S = 0.2
_REPORT_S = 1.0
_STACKS_S = 2.0  # for the stacks to be written
_END_S = 3.0  # between asking a rank to end and SIGKILL
_LONGEST_LINE = 1 << 17


class Lines:
    """A connection that carries JSON objects, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.setblocking(False)
        self._read, self._unsent = b"", b""

    def send(self, message: dict[str, Any]) -> None:
        """Send, or keep what the peer does not take now. Raises OSError when it is gone."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is left."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            if len(self._unsent) > 16 * _LONGEST_LINE:
                raise ConnectionResetError("the peer takes nothing") from None

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that are there. Raises OSError when the peer is gone and has left none."""
        lines: list[bytes] = []
        try:
            while data := self.socket.recv(1 << 16):
                *complete, self._read = (self._read + data).split(b"\n")
                lines += complete
                if len(self._read) > _LONGEST_LINE:
                    raise ConnectionResetError("a line without end")
            if not lines:
                raise ConnectionResetError("closed")
        except BlockingIOError:
            pass
        return [json.loads(line) for line in lines]


@dataclass
class Seen:
    """What the hub knows of a rank."""

    report: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    went_on: float = field(default_factory=time.monotonic)


class Hub:
    """Hears all watchers, finds out when a rank stands still."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a rank
        self._listener = socket.create_server(("", 0), backlog=4096)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._seen: dict[int, Seen] = {}
        self._members: dict[Lines, int | None] = {}

    def hear(self, wait_s: float) -> None:
        """Take in what the watchers say within `wait_s`."""
        for key, _ in self._selector.select(wait_s):
            if key.fileobj is self._listener:
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # gone again, or no file is left: who could not come is on its own
                    continue
                lines = Lines(connection)
                self._members[lines] = None
                self._selector.register(connection, selectors.EVENT_READ, lines)
                continue
            try:
                for message in key.data.receive():
                    self._note(key.data, message)
            except (OSError, ValueError):
                self._drop(key.data)

    def _note(self, lines: Lines, message: dict[str, Any]) -> None:
        if self._members[lines] is None:
            if not secrets.compare_digest(str(message.get("token")), self.token):
                raise ValueError("a stranger")
            self._members[lines] = int(message["rank"])
        now, seen = time.monotonic(), self._seen.setdefault(int(message["rank"]), Seen())
        if message["progress"] != seen.report.get("progress"):
            seen.went_on = now
        seen.report, seen.heard = message, now

    def _drop(self, lines: Lines) -> None:
        self._selector.unregister(lines.socket)
        lines.socket.close()
        rank = self._members.pop(lines)
        if rank is not None and self._seen[rank].report.get("leaving"):
            del self._seen[rank]

    def standstill_s(self) -> float:
        """Return how long the rank that has stood still longest has, of those that have begun a step."""
        now = time.monotonic()
        return max((now - seen.went_on for seen in self._seen.values() if seen.report["step"] > 0), default=0.0)

    def verdict(self) -> list[str]:
        """Return who stopped first, a line each."""
        now = time.monotonic()
        reports = {
            rank: Report(
                rank=rank,
                host=str(seen.report["host"]),
                silent_s=max(0.0, now - seen.heard - _REPORT_S),
                stale_s=float(seen.report["stale_s"]),
                stopped=bool(seen.report["stopped"]),
                step=int(seen.report["step"]),
                phase=int(seen.report["phase"]),
                place=str(seen.report["place"]),
                waits_for=seen.report["waits_for"],
                collectives=seen.report["collectives"],
            )
            for rank, seen in self._seen.items()
        }
        return [f"rank {c.rank} on {reports[c.rank].host} {c.reason}" for c in find_culprits(reports)]

    def tell(self, command: str) -> None:
        """Send a command to all watchers, the hub's own included."""
        for lines in list(self._members):
            try:
                lines.send({"command": command})
            except OSError:
                self._drop(lines)


class Sentinel:
    """Watches one rank."""

    def __init__(self, pid: int, pulse: Pulse) -> None:
        self._pid, self._pulse = pid, pulse
        self._rank, self._timeout_s = 0, float("inf")
        self._token = ""
        self._lines: Lines | None = None
        self._hub: Hub | None = None
        self._progress: Any = None
        self._last_read: tuple[float, dict[str, Any]] = (0.0, {})
        self._went_on = self._reported = time.monotonic()
        self._told = False
        self._ending_since: float | None = None

    def obey(self, command: dict[str, Any]) -> None:
        """Do what the rank asks for: be the hub, join a hub, leave it."""
        if command["command"] == "serve":
            self._hub = Hub()
            print(json.dumps({"port": self._hub.port, "token": self._hub.token}), flush=True)
        elif command["command"] == "join":
            self._rank, self._timeout_s, self._token = command["rank"], command["timeout_s"], command["token"]
            place = command["host"], command["port"]
            try:
                self._lines = Lines(socket.create_connection(place, timeout=30))
            except OSError as reason:  # or rank 0 has ended already, which has its own reason
                print(f"watchdog: rank {self._rank} is not watched, {place[0]}:{place[1]}: {reason}", file=sys.stderr)
                return
            self._report(leaving=False)
        elif command["command"] == "leave" and self._lines is not None:
            self._report(leaving=True)
            self._timeout_s = float("inf")

    def turn(self) -> None:
        """Look at the rank, tell the hub, do what it says."""
        now = time.monotonic()
        self._report_if_due(now)
        if self._hub is not None:
            self._hub.hear(_POLL_S)
            if self._hub.standstill_s() > self._timeout_s and self._ending_since is None:
                self._end_world()
        else:
            time.sleep(_POLL_S)
        try:
            for message in self._lines.receive() if self._lines is not None else ():
                self._act(message["command"])
            if self._lines is not None:
                self._lines.flush()
        except OSError:  # the hub's host is gone, or its rank: this one is on its own
            self._lines = None
        alone = self._lines is None and self._hub is None
        if alone and self._told:
            self._act("end")
        elif alone and now - self._went_on > self._timeout_s + _REPORT_S:
            print(f"hang: rank {self._rank} has not gone on for {self._timeout_s:.0f} s", file=sys.stderr, flush=True)
            self._act("stacks")
            time.sleep(_STACKS_S)
            self._act("end")
        if self._ending_since is not None and now - self._ending_since > _END_S:
            _send(self._pid, signal.SIGKILL)

    def _read(self) -> tuple[float, dict[str, Any]]:
        """Return what the rank last wrote: what it was stopped in writing is no record."""
        found = self._pulse.read()
        if found[1]:
            self._last_read = found
        return self._last_read

    def _report_if_due(self, now: float) -> None:
        _, record = self._read()
        progress = [record.get(name) for name in ("progress", "step", "phase")]
        if progress != self._progress:
            self._progress, self._went_on = progress, now
        if self._lines is not None and now - self._reported >= _REPORT_S:
            self._report(leaving=False)

    def _report(self, leaving: bool) -> None:
        written, record = self._read()
        if not record:
            return
        self._reported = time.monotonic()
        message = {
            "rank": self._rank,
            "token": self._token,
            "host": socket.gethostname(),
            "stale_s": self._reported - written,
            "stopped": _is_stopped(self._pid),
            "leaving": leaving,
            **record,
            "progress": self._progress,
        }
        try:
            if self._lines is not None:
                self._lines.send(message)
        except OSError:
            self._lines = None

    def _end_world(self) -> None:
        assert self._hub is not None
        verdict = self._hub.verdict()
        for line in verdict:
            print(f"hang: no progress for {self._timeout_s:.0f} s; {line}", file=sys.stderr, flush=True)
        self._hub.tell("stacks")
        deadline = time.monotonic() + _STACKS_S
        while time.monotonic() < deadline:
            for message in self._lines.receive() if self._lines is not None else ():
                self._act(message["command"])
            self._hub.hear(_POLL_S)
        for line in verdict:  # once more, below the stacks
            print(f"error: hang: {line}; every rank's stacks are in its log", file=sys.stderr, flush=True)
        self._hub.tell("end")

    def _act(self, command: str) -> None:
        self._told = True
        if command == "stacks":
            _send(self._pid, FROZEN)  # so that a rank that was stopped does not train on now
            _send(self._pid, signal.SIGCONT)
        elif command == "end" and self._ending_since is None:
            self._ending_since = time.monotonic()
            _send(self._pid, HUNG)
            _send(self._pid, signal.SIGCONT)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except OSError:
        return False


def main() -> None:
    """Watch the process and the pulse that the command line names, until standard input closes."""
    sentinel = Sentinel(int(sys.argv[1]), Pulse(int(sys.argv[2])))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank: a launcher signals its whole group
    os.set_blocking(0, False)
    rest = b""
    while True:
        try:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                sentinel.obey(json.loads(line))
        except BlockingIOError:
            pass
        sentinel.turn()


if __name__ == "__main__":
    main()
