"""A disk that fails loses no checkpoint, and no save is claimed that is not there. All of `make fault-storage`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import manager
from megalm.checkpoint.names import checkpoint_name
from megalm.errors import StorageError
from tests.checkpoint.fault_storage import Result, in_a_small_tmpfs, of_calls, table


def test_no_refused_call_and_no_lost_directory_costs_a_checkpoint(tmp_path: Path) -> None:
    result = Result()
    of_calls(tmp_path, result)
    print(table(result))
    assert result.wrong == []
    assert result.faults.total() > 200 and result.errors["one call refused"] > 100
    assert result.errors["directory vanished"] > 10 and result.saved["slow disk"] == 2


def test_no_fault_of_the_system_costs_a_checkpoint(tmp_path: Path) -> None:
    result = Result()
    in_a_small_tmpfs(tmp_path, result)
    print(table(result))
    assert result.wrong == []
    if result.skipped:
        pytest.skip("; ".join(result.skipped))
    assert result.errors["libfiu"] > 50 and result.errors["read-only disk"] == 2
    assert result.errors["full disk"] >= 5 and result.saved["full disk"] >= 1


def test_a_save_that_hides_its_failure_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = manager.write_and_count

    def hide(directory: Path, step: int, *args: Any, **more: Any) -> tuple[Path, int]:
        try:
            return write(directory, step, *args, **more)
        except StorageError:
            return directory / checkpoint_name(step), 0

    monkeypatch.setattr(manager, "write_and_count", hide)
    result = Result()
    of_calls(tmp_path, result, steps=(7,), codes=())
    assert any("save 1.0 after a save that returned" in line for line in result.wrong)
