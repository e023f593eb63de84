"""Timing on a GPU, with one that only takes down what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_timing import Samples, quartiles, sets_needed, take_sample

CUDA = torch.device("cuda")


class Recorder:
    """A CUDA module whose events lie 30 ms apart; `asleep` is whether it still sleeps when the host is done."""

    def __init__(self, asleep: bool) -> None:
        self.told: list[str] = []
        self.slept = 0

        recorder = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                recorder.told.append("event")

            def query(self) -> bool:
                return not asleep

            def elapsed_time(self, end: Any) -> float:
                return 30.0

        self.Event = Event

    def synchronize(self, device: torch.device) -> None:
        self.told.append("wait")

    def _sleep(self, cycles: int) -> None:
        self.told.append("sleep")
        self.slept = cycles

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=50 * 2**20)


@pytest.mark.parametrize("asleep", [True, False])
def test_the_device_sleeps_until_all_calls_are_issued(asleep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(asleep)
    monkeypatch.setattr(torch, "cuda", cuda)
    samples = Samples()
    take_sample([lambda: cuda.told.append("call")] * 3, samples, CUDA)
    assert cuda.told == ["wait", "sleep", "event", "call", "call", "call", "event", "wait"]
    assert samples.device_s == [pytest.approx(0.010)]  # 30 ms, three calls
    assert samples.late == (not asleep)
    first = cuda.slept
    samples.host_s = [0.5]
    take_sample([lambda: None], samples, CUDA)
    assert cuda.slept > first and cuda.slept >= 0.5 * 2e9  # the host's last times say how long


def test_sets_of_inputs_exceed_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Recorder(True))
    assert [sets_needed(mib * 2**20, CUDA) for mib in (1, 20, 50, 1000, 3200)] == [16, 5, 2, 2, 1]


def test_quartiles_are_those_of_the_sorted_values() -> None:
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
