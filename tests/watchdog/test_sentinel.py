"""The watchers' connections: what was said before a peer went is heard, and a rank that was told to wait is ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from megalm.errors import HUNG
from megalm.watchdog.pulse import Pulse
from megalm.watchdog.sentinel import Hub, Lines
from tests.watchdog.test_watchdog import ENDURING


@pytest.fixture
def ends() -> Iterator[tuple[Lines, Lines]]:
    left, right = socket.socketpair()
    with left, right:
        yield Lines(left), Lines(right)


def test_the_last_words_of_a_peer_are_heard_and_then_that_it_is_gone(ends: tuple[Lines, Lines]) -> None:
    peer, here = ends
    peer.send({"command": "stacks"})
    peer.send({"command": "end"})
    peer.socket.close()
    assert [message["command"] for message in here.receive()] == ["stacks", "end"]
    with pytest.raises(ConnectionResetError):
        here.receive()


def test_half_a_message_waits_for_its_rest_and_one_without_end_is_refused(ends: tuple[Lines, Lines]) -> None:
    peer, here = ends
    peer.socket.sendall(b'{"command": ')
    assert here.receive() == []
    peer.socket.sendall(b'"end"}\n')
    assert here.receive() == [{"command": "end"}]
    with pytest.raises(ConnectionResetError, match="without end"):
        for _ in range(100):
            peer.socket.send(b"x" * 65536)
            here.receive()


@pytest.mark.parametrize("last_word", [[], ["end"]])
def test_a_rank_that_stands_still_by_order_ends_when_the_hub_is_gone(last_word: list[str]) -> None:
    """The hub's host may die between its two orders, and its last one may come with the end of the connection."""
    pulse, hub = Pulse(), Hub()
    pulse.write({"progress": [1, 1], "waits_for": None, "collectives": {}, "place": ""})
    pulse.mark(1, 0)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", ENDURING], **pipes) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == b"ready\n"
        program = [sys.executable, "-m", "megalm.watchdog.sentinel", str(rank.pid), str(pulse.descriptor)]
        with subprocess.Popen(program, stdin=subprocess.PIPE, pass_fds=[pulse.descriptor]) as watcher:
            assert watcher.stdin is not None
            join = {"rank": 1, "timeout_s": 600, "token": hub.token, "host": "127.0.0.1", "port": hub.port}
            watcher.stdin.write(json.dumps({"command": "join", **join}).encode() + b"\n")
            watcher.stdin.flush()
            deadline = time.monotonic() + 30
            while not hub._seen and time.monotonic() < deadline:
                hub.hear(0.1)
            for command in ["stacks", *last_word]:
                hub.tell(command)
            for lines in list(hub._members):
                hub._drop(lines)
            assert rank.communicate(timeout=30) and rank.returncode == HUNG
            watcher.communicate(timeout=30)
    os.close(pulse.descriptor)
