"""Damage of every kind in every file of a run: `make fuzz-checkpoints` in short."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from megalm.checkpoint import reader
from megalm.checkpoint.blocks import BlockCache, FileRecord
from megalm.checkpoint.commands import verify
from megalm.checkpoint.names import CHECKPOINTS
from megalm.checkpoint.tensor_file import TensorFile
from megalm.cli import main
from megalm.distributed.progress import progress
from megalm.distributed.world import joined_mesh
from megalm.errors import CheckpointError, ConfigError, DamagedCheckpoint
from megalm.train.pretrain import train
from tests.checkpoint.forge import reseal
from tests.checkpoint.fuzz import damage, prepare, table
from tests.checkpoint.subject import Subject, read_all


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Path]:
    return prepare(tmp_path_factory.mktemp("fuzz"))


def test_no_damage_loads_in_silence(runs: tuple[Subject, Path]) -> None:
    result = damage(*runs, flips=270, cuts=30, seed=1)
    print(table(result))
    assert result.wrong == []
    regions = {region.split(":")[0] for region in result.trials}
    assert regions >= {
        "weights",
        "optimizer",
        "manifest.json",
        "state.json",
        "run.json",
        "config.yaml",
        "metrics.jsonl",
    }
    assert {"weights: payload", "optimizer: header padding", "manifest.json: checksum"} <= result.trials.keys()
    assert {"deleted", "swapped", "doubled over another", "of another run", "future version"} <= result.trials.keys()


def test_a_reader_that_skips_checksums_is_found_out(
    runs: tuple[Subject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(path: Path, record: FileRecord, cache: BlockCache) -> TensorFile:
        return TensorFile(path, replace(record, blocks=None), cache)

    monkeypatch.setattr(reader, "hash_file", lambda *_: None)
    monkeypatch.setattr(reader, "TensorFile", unchecked)
    found = damage(*runs, flips=10, cuts=0, seed=2).wrong
    assert any("of another run" in line and "SILENT" in line for line in found), found


def resume_with(subject: Subject, source: Path) -> str:
    """Return the error of a run that finds a copy of `source` in the place of its newest checkpoint."""
    place = subject.places()[0]
    kept = place.rename(place.with_name("kept"))
    try:
        shutil.copytree(source, place)
        with pytest.raises(CheckpointError) as caught, redirect_stdout(StringIO()):
            train(subject.config)
    finally:
        shutil.rmtree(place)
        kept.rename(place)
    return str(caught.value)


def test_a_checkpoint_of_another_run_is_refused_with_both_values(runs: tuple[Subject, Path]) -> None:
    said = resume_with(*runs)
    assert "step-00000004 is of another run: seed=1 in the checkpoint, 0 here; " in said


def test_a_state_that_is_not_a_runs_is_refused_by_its_name(runs: tuple[Subject, Path], tmp_path: Path) -> None:
    forged = shutil.copytree(runs[0].places()[0], tmp_path / "step-00000004")
    for state in ({**runs[0].state, "progress": {"steps": 4}}, {"progress": None}):
        (forged / "state.json").write_text(json.dumps(state))
        reseal(forged)
        assert "step-00000004/state.json: holds no progress of a run" in resume_with(runs[0], forged)


def test_a_later_format_is_refused_and_not_passed_over(runs: tuple[Subject, Path]) -> None:
    """Or the run would go on from an older checkpoint, and write its own over that of the newer program."""
    place = runs[0].places()[0]
    kept = shutil.copytree(place, place.with_name("kept"))
    try:
        reseal(place, {"version": 99})
        with pytest.raises(CheckpointError, match=r"format version 99.*newer") as caught, redirect_stdout(StringIO()):
            train(runs[0].config)
        assert not isinstance(caught.value, DamagedCheckpoint)
    finally:
        shutil.rmtree(place)
        kept.rename(place)


def test_damage_is_told_before_settings_that_do_not_fit(runs: tuple[Subject, Path], tmp_path: Path) -> None:
    """A length that the newest checkpoint is beyond is no error where that one is damaged: an older one is loaded."""
    run = shutil.copytree(runs[0].run, tmp_path / "run")
    section = runs[0].config.run.model_copy(update={"dir": str(run)})
    shorter = runs[0].config.train.model_copy(update={"steps": 3})
    config = runs[0].config.model_copy(update={"run": section, "train": shorter})
    with pytest.raises(ConfigError, match="less than the 4 steps"), redirect_stdout(StringIO()):
        train(config)
    file = next((run / CHECKPOINTS / runs[0].newest).glob("rank-*-weight*"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with redirect_stdout(StringIO()) as said:
        train(config)
    assert "DAMAGED CHECKPOINT PASSED OVER" in said.getvalue()


def test_a_file_that_may_not_be_read_is_no_damage(runs: tuple[Subject, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends, and the checkpoint stays the newest, where only the way to it is lost."""

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", refuse)
        lost = {errno.EIO, errno.EUCLEAN}
        for code in (*lost, errno.ESTALE, errno.ENOMEM, errno.ENODEV, errno.ESHUTDOWN, errno.EHOSTDOWN):
            with pytest.raises(CheckpointError, match=os.strerror(code)) as caught, redirect_stdout(StringIO()):
                train(runs[0].config)
            assert ("none of its 2 checkpoints is valid" in str(caught.value)) == (code in lost)


def test_an_older_checkpoint_is_evaluated_and_continued_by_its_step(
    runs: tuple[Subject, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, losses = str(runs[0].run), {}
    for step in (2, 4):
        assert main(["evaluate", run, f"--step={step}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["step"] == step
        losses[step] = found["loss"]
        assert main(["generate", run, "--prompt=north", "--tokens=2", f"--step={step}"]) == 0
        capsys.readouterr()
    assert main(["evaluate", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == losses[4] != losses[2]
    for command in (["evaluate"], ["generate", "--prompt=a"]):
        assert main([*command, run, "--step=3"]) == 2
        assert "no checkpoint of step 3; the newest are of 2, 4" in capsys.readouterr().err
    file = next((runs[0].run / CHECKPOINTS / "step-00000002").glob("rank-*-weight*"))
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert main(["evaluate", run, "--step=2"]) == 2 and file.name in capsys.readouterr().err
    finally:
        file.write_bytes(data)


def test_reading_is_progress(runs: tuple[Subject, Path]) -> None:
    """Or a run that goes back on a slow disk were taken for one that hangs."""
    place = runs[0].places()[0]
    for read in (lambda: read_all(place), lambda: verify(place)):
        before = progress.acts
        read()
        assert progress.acts >= before + len(list(place.glob("rank-*")))


def test_every_byte_is_read_once_and_by_evaluation_no_optimizer(
    runs: tuple[Subject, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, _ = runs
    place, count, preadv = subject.places()[0], 0, os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal count
        count += (done := preadv(descriptor, buffers, offset))
        return done

    state = (place / "state.json").stat().st_size
    monkeypatch.setattr("os.preadv", counted)
    with redirect_stdout(StringIO()):
        train(subject.config)
    assert count == state + sum(file.stat().st_size for file in place.glob("rank-*"))
    count = 0
    with joined_mesh(subject.config) as mesh:
        assert subject.reads_weights(mesh)
    assert count == state + sum(file.stat().st_size for file in place.glob("rank-*-weight*"))
    for file in list(subject.places()[1].glob("rank-*-optimizer*")):
        file.rename(file.with_name("away"))
        with joined_mesh(subject.config) as mesh:
            assert subject.reads_weights(mesh), "what is not read may be missing"
        file.with_name("away").rename(file)
