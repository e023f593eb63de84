"""Files that a kill or a full disk does not leave half-written, and files that must not be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalm.files import require_regular, write_durably


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_durably(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_durably(path, b"new")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    require_regular(tmp_path / "file")
    with pytest.raises(OSError, match="not a regular file"):
        require_regular(tmp_path / "pipe")
