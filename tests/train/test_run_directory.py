"""Whose a run directory is: resumes that are let in, other runs that are not, and one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalm.errors import ConfigError, StorageError
from megalm.train import run_directory
from megalm.train.run_directory import RunDirectory, open_run
from megalm.train.run_identity import differing_settings
from tests.train.recipes import small_recipe

DATA, TOKENIZER = "d" * 64, "t" * 64


def open_once(
    directory: Path, fresh: bool = False, fingerprint: str = DATA, restarted: bool = False, **sections: Any
) -> RunDirectory:
    config = small_recipe(**{"run": {"dir": str(directory)}, **sections})
    run = open_run(config, fingerprint, TOKENIZER, 1, model_parameters=1000, fresh=fresh, restarted=restarted)
    run.claim()
    run.close()
    return run


def test_a_new_run_leaves_its_recipe_and_its_identity(tmp_path: Path) -> None:
    run = open_once(tmp_path / "a" / "b")
    assert run.resumed is False
    assert yaml.safe_load((run.path / "config.yaml").read_text())["model"]["hidden"] == 8
    identity = json.loads((run.path / "run.json").read_text())
    assert (identity["data_fingerprint"], identity["tokenizer_fingerprint"]) == (DATA, TOKENIZER)
    assert identity["model_parameters"] == 1000 and identity["megalm"]


def test_how_a_run_is_computed_may_change_when_it_is_resumed(tmp_path: Path) -> None:
    open_once(tmp_path)
    run = open_once(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2, "schedule": "gpipe"},
        zero={"stage": 1},
        train={"stop_at": 5, "micro_batch": 1, "recompute": "full"},
        log={"every": 7},
        checkpoint={"every": 3},
        evaluate={"every": 2},
        data={"path": "moved/elsewhere"},
    )
    assert run.resumed is True
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["parallel"]["tensor"] == 2


def test_what_people_change_in_the_course_of_a_run_may_change(tmp_path: Path) -> None:
    """What it was is in the checkpoints, and each start tells it (`continuing.changes`)."""
    open_once(tmp_path)
    run = open_once(
        tmp_path,
        train={"steps": 300, "global_batch": 8, "clip_grad_norm": 0.5, "clip_grad_value": 1.0},
        batch_ramp={"start": 4, "every": 10},
        optim={"lr": 1e-4, "weight_decay": 0.05},
        lr_schedule={"kind": "linear", "warmup_steps": 3, "cooldown_steps": 5},
        checkpoint={"asynchronous": False, "failures": 0, "keep_every": 2000},
    )
    assert run.resumed is True
    assert open_once(tmp_path).resumed is True, "and back"


def test_a_key_that_was_fixed_when_the_run_began_may_change_by_now(tmp_path: Path) -> None:
    open_once(tmp_path)
    identity = json.loads((tmp_path / "run.json").read_text())
    identity["fixed"] |= {"optim.lr": 0.5, "train.steps": 7, "lr_schedule.kind": "linear"}
    (tmp_path / "run.json").write_text(json.dumps(identity))
    assert open_once(tmp_path).resumed is True


def test_a_run_from_before_a_key_had_its_default(tmp_path: Path) -> None:
    open_once(tmp_path)
    identity = json.loads((tmp_path / "run.json").read_text())
    for key in ("loss.z_loss", "model.norm_place", "optim.rules", "optim.eps"):
        del identity["fixed"][key]
    (tmp_path / "run.json").write_text(json.dumps(identity))
    assert open_once(tmp_path).resumed is True
    (tmp_path / "run.json").write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match=r"loss\.z_loss=0\.0 there, 0\.1 here"):
        open_once(tmp_path, loss={"z_loss": 0.1})


def test_a_rule_from_before_a_key_had_its_default(tmp_path: Path) -> None:
    optim = {"rules": [{"match": "*.bias", "lr": 0.5}]}
    open_once(tmp_path, optim=optim)
    identity = json.loads((tmp_path / "run.json").read_text())
    del identity["fixed"]["optim.rules"][0]["muon"], identity["fixed"]["optim.rules"][0]["freeze"]
    (tmp_path / "run.json").write_text(json.dumps(identity))
    assert open_once(tmp_path, optim=optim).resumed is True
    with pytest.raises(ConfigError, match=r"optim\.rules=.* there, .* here"):
        open_once(tmp_path, optim={"rules": [{"match": "*.bias", "lr": 0.25}]})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"seed": 9}, "seed=1234 there, 9 here"),
        ({"precision": "bf16"}, 'precision="fp32" there, "bf16" here'),
        ({"model": {"layers": 3}}, "model.layers=2 there, 3 here"),
        ({"optim": {"kind": "sgd"}}, 'optim.kind="adamw" there, "sgd" here'),
        ({"optim": {"betas": [0.9, 0.99]}}, "optim.betas=[0.9, 0.95] there, [0.9, 0.99] here"),
        ({"optim": {"rules": [{"match": "*.bias", "lr": 0.5}]}}, "optim.rules=[] there, "),
        ({"sequence_warmup": {"start": 8, "every": 2}}, "sequence_warmup.every=null there, 2 here"),
        ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing=0.0 there, 0.1 here"),
        ({"data": {"seed": 4}}, "data.seed=null there, 4 here"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    open_once(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_once(tmp_path, **sections)
    message = str(caught.value)
    assert said in message and "another run.dir" in message and "--fresh" in message and "\n" not in message
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_master_weights_in_another_format_are_another_run(tmp_path: Path) -> None:
    low: dict[str, Any] = {"precision": "bf16", "zero": {"stage": 1, "config": "low-memory-bf16"}}
    open_once(tmp_path, **low)
    assert open_once(tmp_path, **low, parallel={"tensor": 2}).resumed is True
    with pytest.raises(ConfigError, match=r'holds another run: master weights="bf16" there, null here'):
        open_once(tmp_path, precision="bf16")


def test_other_data_under_the_same_path_is_refused(tmp_path: Path) -> None:
    open_once(tmp_path)
    with pytest.raises(ConfigError, match=r"data fingerprint dddddddddddd there .*eeeeeeeeeeee here"):
        open_once(tmp_path, fingerprint="e" * 64)


def test_fresh_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    open_once(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "thesis.txt").write_text("mine")
    run = open_once(tmp_path, fresh=True, seed=9)
    assert run.resumed is False
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 9


def test_a_removal_that_was_killed_half_way_is_ended_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is started again leaves --fresh out, and must not go on with the run that was to go."""
    open_once(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)

    def killed(path: Path) -> None:
        (path / "step-00000002").rmdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run_directory.shutil, "rmtree", killed)
        open_once(tmp_path, fresh=True, seed=9)
    with pytest.raises(ConfigError, match="seed=9 there, 1234 here"):
        open_once(tmp_path)
    assert (tmp_path / "checkpoints").exists(), "who is refused changes nothing"
    assert open_once(tmp_path, seed=9).resumed is True
    assert not (tmp_path / "checkpoints").exists() and "removing" not in (tmp_path / "run.json").read_text()


def test_a_job_that_died_before_it_removed_a_run_removes_it_when_it_is_started_again(tmp_path: Path) -> None:
    open_once(tmp_path)
    config = small_recipe(run={"dir": str(tmp_path)})

    def opened(**how: bool) -> RunDirectory:
        run = open_run(config, DATA, TOKENIZER, 1, 1000, **how)
        run.close()
        return run

    opened(fresh=True)  # and dies while it loads its first weights
    assert opened().resumed is True, "whoever does not ask for it removes nothing"
    again = opened(fresh=True, restarted=True)
    assert again.fresh is True and again.resumed is False
    again.claim()
    once_more = opened(fresh=True, restarted=True)
    assert once_more.fresh is False and once_more.resumed is True


def full(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_once(tmp_path)
    assert open_once(tmp_path).resumed is True, "it has saved nothing yet"
    with monkeypatch.context() as patched:
        patched.setattr(run_directory, "write_durably", full)
        run.note_saved()
    run.note_saved()  # which a disk that was full meanwhile does not keep from it
    with pytest.raises(ConfigError, match=r"saved checkpoints, and .*checkpoints holds none; mount or restore it, or"):
        open_once(tmp_path)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="holds none"):
        open_once(tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert open_once(tmp_path).resumed is True and json.loads((tmp_path / "run.json").read_text())["saved"] is True
    open_once(tmp_path, fresh=True)
    assert json.loads((tmp_path / "run.json").read_text())["saved"] is False


def test_a_run_goes_on_where_the_disk_has_no_room_and_nothing_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_once(tmp_path)
    monkeypatch.setattr(run_directory, "write_durably", full)
    assert open_once(tmp_path).resumed is True
    with pytest.raises(StorageError, match=rf"{tmp_path}: cannot be written: No space left on device; free space"):
        open_once(tmp_path, log={"every": 7})


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "config.yaml", "tokenizer.json"])
def test_files_of_an_unknown_run_are_neither_used_nor_removed(tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"holds {name} but no"):
        open_once(tmp_path, fresh=fresh)
    assert (tmp_path / name).is_dir()


def test_fresh_does_not_follow_a_link_to_checkpoints(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_once(run)
    (tmp_path / "scratch").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(ConfigError, match="symbolic link"):
        open_once(run, fresh=True)
    assert (tmp_path / "scratch").is_dir() and (run / "run.json").exists()


def test_a_foreign_identity_is_refused(tmp_path: Path) -> None:
    for text in ("not json", "[]", '{"format": "another"}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ConfigError, match="choose another"):
            open_once(tmp_path, fresh=True)


def test_a_directory_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_once(tmp_path / "file" / "run")


HOLD = """
import sys
from pathlib import Path
from tests.train.recipes import small_recipe
from megalm.train.run_directory import open_run
config = small_recipe(run={"dir": sys.argv[1]})
run = open_run(config, "d" * 64, "t" * 64, 1, model_parameters=1000)
run.claim()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"process {holder.pid} on .* trains in it at this moment"):
            open_once(tmp_path)
        death = threading.Timer(1.0, holder.kill)
        death.start()
        assert open_once(tmp_path, restarted=True).resumed is True  # a restart waits for a lock that outlives its owner


def test_what_a_killed_writer_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.partial").write_text("half")
    (tmp_path / ".exported.partial").mkdir()  # where an export is being made, or was
    open_once(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        ".exported.partial",
        "config.yaml",
        "run.json",
        "run.lock",
    ]


def test_a_recipe_differs_in_what_is_fixed_and_not_in_what_is_free() -> None:
    config = small_recipe(seed=1, train={"micro_batch": 1})
    before = small_recipe(train={"steps": 90}, loss={"z_loss": 0.1}).model_dump(mode="json")
    assert differing_settings(before, config) == [
        "loss.z_loss=0.1 in the checkpoint, 0.0 here",
        "seed=1234 in the checkpoint, 1 here",
    ]
    del before["model"]["rotary_base"]  # as a version wrote it that had no such key
    assert len(differing_settings(before, config)) == 2
    assert differing_settings({}, config) == differing_settings(config.model_dump(mode="json"), config) == []
