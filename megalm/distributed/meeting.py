"""What all ranks tell each other from a thread beside the main one: small JSON values through the world's store.

The main thread's process groups are not used, so nothing of what it does may come in between, and no second mesh of
connections is formed: each rank has one more connection to the store of rank 0, as each watcher has one to the hub.
A rank asks for what it waits for, less and less often, so that ten thousand of them ask a few thousand times a second;
and a wait can be given up, where one inside a collective could not.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megalm import errors
from megalm.distributed.collectives import describe
from megalm.errors import DistributedError

_FIRST_POLL_S = 0.002
_LONGEST_POLL_S = 1.0


class Meeting:
    """All ranks of the world, for one thread of each; they must call the same methods in the same order."""

    def __init__(self, store: dist.Store, rank: int, size: int, name: str) -> None:
        """Use a connection of its own to `store`; the ranks give the same `name`, and no other meeting has it."""
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._size, self._name = rank, size, name
        self._count = 0
        self._given: dict[int, list[str]] = {}
        self._given_up = threading.Event()

    @classmethod
    def of_world(cls, name: str) -> Meeting:
        """Return the meeting of all ranks of the default group."""
        return cls(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), name)

    def rank(self) -> int:
        """Return this process's rank."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def give_up(self) -> None:
        """Have the call in which the other thread waits, and each later one, raise DistributedError."""
        self._given_up.set()

    def acts(self, more: int) -> int:
        """Add to the pieces of work done by all ranks and return their number. Any thread may call, at any time."""
        with _store_errors():
            return int(self._store.add(f"{self._name}/acts", more))

    def agree(self, error: BaseException | None) -> None:
        """Raise on all ranks what the lowest rank with an error has, see `collectives.agree`."""
        self._meet(error, {})

    def gather(self, value: Any) -> list[Any]:
        """Return the values (JSON) of all ranks, in their order, on rank 0, and an empty list on the others."""
        place = self._meet(None, {str(self._rank): value})
        return self._values(place, [str(rank) for rank in range(self._size)]) if self._rank == 0 else []

    def gather_distinct(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return, on rank 0, what any rank has in `values` (JSON), each key once, and {} on the others.

        A key's values must be equal wherever it is there: the first rank to come brings it for all.
        """
        keys = sorted({key for some in self.gather(sorted(values)) for key in some})
        first = {}
        with _store_errors():
            for key, value in values.items():
                claim = f"{self._name}/{self._count}/first/{key}"
                if self._store.add(claim, 1) == 1:
                    self._given.setdefault(self._count, []).append(claim)
                    first[key] = value
        place = self._meet(None, first)
        return dict(zip(keys, self._values(place, keys), strict=True)) if self._rank == 0 else {}

    def _values(self, place: str, keys: list[str]) -> list[Any]:
        """Return values that the ranks brought to a meeting."""
        with _store_errors():
            found = self._store.multi_get([f"{place}/value/{key}" for key in keys]) if keys else []
        return [json.loads(text) for text in found]

    def _meet(self, error: BaseException | None, values: Mapping[str, Any]) -> str:
        """Bring values or an error, wait until all have brought theirs, and raise if any has an error."""
        self._count += 1
        place = f"{self._name}/{self._count}"
        with _store_errors():
            self._forget()
            for key, value in values.items():
                self._give(f"{place}/value/{key}", json.dumps(value, separators=(",", ":")))
            if error is not None:
                self._complain(place, error)
            if self._store.add(f"{place}/came", 1) == self._size:
                first = f"{place}/error"
                verdict = self._store.get(first).decode() if self._store.check([first]) else "null"
                self._store.set(f"{place}/all", verdict)
            failed = json.loads(self._wait_for(f"{place}/all"))
        if failed is not None:
            rank, name, message = failed
            raise getattr(errors, name)(f"rank {rank}: {message}" if self._size > 1 else message) from error
        return place

    def _complain(self, place: str, error: BaseException) -> None:
        """Note this rank's error as the first one, unless that of a lower rank is there."""
        mine, known = json.dumps([self._rank, *describe(error)]), ""
        while True:
            found = self._store.compare_set(f"{place}/error", known, mine).decode()
            if found == mine or (found != known and json.loads(found)[0] < self._rank):
                return
            known = found

    def _wait_for(self, key: str) -> bytes:
        pause_s = _FIRST_POLL_S
        while not self._store.check([key]):
            if self._given_up.wait(pause_s):
                raise DistributedError(f"rank {self._rank}: the wait for the other ranks was given up")
            pause_s = min(_LONGEST_POLL_S, 1.5 * pause_s)
        return bytes(self._store.get(key))

    def _give(self, key: str, text: str) -> None:
        self._store.set(key, text)
        self._given.setdefault(self._count, []).append(key)

    def _forget(self) -> None:
        """Delete what all have read: who came to the last meeting was done with the one before that."""
        done = self._count - 2
        for key in self._given.pop(done, ()):
            self._store.delete_key(key)
        if self._rank == 0 and done > 0:
            for part in ("came", "error", "all"):
                self._store.delete_key(f"{self._name}/{done}/{part}")


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn what torch raises when rank 0's store is gone into a DistributedError."""
    try:
        yield
    except RuntimeError as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DistributedError(f"lost the store of rank 0 ({line[:200]}); look at the log of rank 0") from error
