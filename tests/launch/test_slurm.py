"""What is asked of Slurm: the argument lists, the record beside them, and names that mean harm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.cli import main
from megalm.errors import LaunchError, UserError
from megalm.launch import records, slurm
from megalm.launch.records import read_record, script_folder
from megalm.launch.slurm import JobRequest, sbatch_arguments, seconds_of, with_defaults
from tests.end_to_end.workplace import make_workplace
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.hostile_names import CANARY, HOSTILE

SIZE = ("--nodes=2", "--gpus-per-node=1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("slurm") / "prepared")


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a directory with data and recipe, which is the current one."""
    shutil.copytree(prepared, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm.on_path(tmp_path / "fake", monkeypatch)


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_request_becomes_an_argument_list() -> None:
    request = JobRequest(2, 4, 8, "90", "gpu,long", "lab", "high", None, "node[3,7]", notice_s=60)
    directory = Path("/runs/my run/jobs/0003")
    command = [directory / "pretrain.sbatch", directory / "recipe.yaml"]
    assert sbatch_arguments(request, "my run", directory, command, after="17") == [
        *("sbatch", "--parsable", "--export=ALL", "--job-name=megalm-my_run", "--nodes=2", "--ntasks-per-node=4"),
        *("--gpus-per-node=4", "--cpus-per-task=8", "--time=90", "--signal=USR1@60", "--partition=gpu,long"),
        *("--account=lab", "--qos=high", "--exclude=node[3,7]", "--dependency=afterany:17"),
        *(f"--output={directory}/job-%j.log", f"{directory}/pretrain.sbatch", f"{directory}/recipe.yaml"),
    ]


def test_what_is_not_asked_for_comes_from_the_script() -> None:
    script = script_folder() / "pretrain.sbatch"
    assert with_defaults(JobRequest(), script) == JobRequest(nodes=2, gpus_per_node=8)
    assert with_defaults(JobRequest(1, 4, time="4:00:00"), script).notice_s is None
    assert with_defaults(JobRequest(1, 4, time="10"), script).notice_s == 120  # of 600 s
    assert with_defaults(JobRequest(1, 4, time="0"), script).notice_s is None  # no limit, so no notice
    scaling = script_folder() / "scaling.sbatch"  # whose number of nodes is always asked for
    assert with_defaults(JobRequest(nodes=4), scaling) == JobRequest(nodes=4, gpus_per_node=8)
    with pytest.raises(LaunchError, match="no line #SBATCH --nodes=N"):
        with_defaults(JobRequest(gpus_per_node=4), scaling)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:01", 3601), ("2-0", 172800), ("1-2:03", 93780), ("1-0:0:5", 86405)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *(("time", text) for text in ("soon", "-5", "1:2:3:4", "٣", "")),
        *(("partition", "a,,b"), ("account", ""), ("qos", "-x"), ("container", "-v"), ("container", "a\nb")),
        *(("exclude", "node[3"), ("exclude", "a b"), ("exclude", "")),
    ],
)
def test_what_slurm_could_misunderstand_is_refused(field: str, text: str) -> None:
    with pytest.raises(LaunchError, match=r"is no name|is no time|is no image|malformed|neither a host name"):
        JobRequest(**{field: text}).check()  # type: ignore[arg-type]


def test_a_launch_is_recorded_and_submitted(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert main(["launch", "slurm", "recipe.yaml", "parallel.tensor=2", "run.dir=runs/x", *SIZE, "--json"]) == 0
    found = answer(capsys)
    record = place / "runs/x/jobs/0001"
    assert (found["job_id"], found["job_ids"]) == ("101", ["101"])
    assert (found["run_dir"], found["logs"]) == (str(place / "runs/x"), str(record / "logs"))
    assert fake.calls("sbatch") == found["commands"]
    assert found["script"] == str(record / "pretrain.sbatch")
    assert read_record(record).job_ids == ["101"]
    assert "tensor: 2" in (record / "recipe.yaml").read_text()
    assert (record / "pretrain.sbatch").read_bytes() == (script_folder() / "pretrain.sbatch").read_bytes()
    code = json.loads((record / "code.json").read_text())
    assert re.fullmatch("[0-9a-f]{40}", code["revision"] or "0" * 40)
    assert code["packages"]["torch"]
    environment = fake.environment()
    assert not {"RANK", "SLURM_PROCID"} & set(environment)
    assert environment["MEGALM_LOGS"] == str(record / "logs")
    assert main(["launch", "slurm", "recipe.yaml", "run.dir=runs/x", *SIZE, "--chain=2"]) == 0
    assert read_record(place / "runs/x/jobs/0002").job_ids == ["102", "103"]
    assert "--dependency=afterany:102" in fake.calls("sbatch")[-1]


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "sbatch --parsable --export=ALL --job-name=megalm-run --nodes=2" in said
    assert said.endswith((script_folder() / "pretrain.sbatch").read_text() + "\n")
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--dry-run", "--preflight"]) == 0
    said = capsys.readouterr().out
    assert "# ---- preflight.sbatch\n#!/bin/bash" in said and "# ---- pretrain.sbatch\n#!/bin/bash" in said
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--dry-run", "--preflight", "--chain=2", "--json"]) == 0
    preflight, first, second = answer(capsys)["commands"]
    assert "--hold" in preflight and preflight[-2].endswith("preflight.sbatch")
    assert "--dependency=afterany:JOB1" in first and "--dependency=afterany:JOB2" in second
    assert not (place / "run").exists()
    assert main(["launch", "slurm", "recipe.yaml", *SIZE]) == 2
    assert capsys.readouterr().err.startswith("error: sbatch is not installed on this machine; ")
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--nodes=3", "--gpus-per-node=1", "parallel.tensor=2"], "parallel.tensor"),
        ([*SIZE, "model.haeds=3"], "heads"),
        ([*SIZE, "data.path=nowhere"], "nowhere"),
        ([*SIZE, "zero.stage=1", "zero.config=missing.json"], "missing.json"),
        ([*SIZE, "run.dir=a%b"], "%"),
    ],
)
def test_what_cannot_train_is_not_submitted(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["launch", "slurm", "recipe.yaml", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert fake.calls() == []


def test_a_refusal_of_sbatch_leaves_nothing_behind(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers("sbatch", "sbatch: error: invalid partition specified: x\n", code=1)
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--partition=x"]) == 2
    assert capsys.readouterr().err == "error: sbatch refused the job: sbatch: error: invalid partition specified: x\n"
    assert not (place / "run").exists()
    (place / "run").mkdir()
    (place / "run/run.json").touch()
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--partition=x"]) == 2
    assert [path.name for path in (place / "run").iterdir()] == ["run.json"]


def test_a_preflight_is_held_until_all_that_waits_for_it_is_there(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--chain=2", "--preflight", "--json"]) == 0
    assert answer(capsys)["job_ids"] == ["102", "103"]
    preflight, first, second = fake.calls("sbatch")
    assert "--hold" in preflight and preflight[-2].endswith("preflight.sbatch")
    assert "--dependency=afterany:101" in first and "--dependency=afterany:102" in second
    assert fake.calls()[-1] == ["scontrol", "release", "101"]
    record = read_record(place / "run/jobs/0001")
    assert (record.preflight_job, record.job_ids) == ("101", ["102", "103"])


def test_a_preflight_that_cannot_be_released_takes_its_jobs_with_it(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers("scontrol", "Access/permission denied\n", code=1)
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--preflight"]) == 2
    assert "error: scontrol release 101 refused: Access/permission denied; nothing is submitted" in (
        capsys.readouterr().err
    )
    assert fake.calls("scancel") == [["scancel", "102", "101"]]


def test_a_container_sees_data_run_and_program(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = ["recipe.yaml", f"data.path={place / 'data'}", f"run.dir={tmp_path / 'runs/a'}", *SIZE]
    assert main(["launch", "slurm", *recipe, "--container=image"]) == 0
    mounts = fake.environment()["MEGALM_MOUNTS"].split(",")
    for path in (place, place / "data", tmp_path / "runs/a", sys.prefix):
        assert f"{path}:{path}" in mounts
    assert main(["launch", "slurm", "recipe.yaml", "run.dir=a:b", *SIZE, "--container=image"]) == 2
    assert "a:b holds a comma or colon" in capsys.readouterr().err
    assert main(["launch", "slurm", "recipe.yaml", "run.dir=a:b", *SIZE]) == 0
    assert "MEGALM_MOUNTS" not in fake.environment()


def test_a_run_whose_job_is_not_over_is_not_submitted_again(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", "recipe.yaml", *SIZE]) == 0
    fake.answers("squeue", "101|RUNNING|None|1:05|node[1-2]\n")
    capsys.readouterr()
    assert main(["launch", "slurm", "recipe.yaml", *SIZE]) == 2
    assert "job 101 trains it or is to; wait" in capsys.readouterr().err
    assert len(fake.calls("sbatch")) == 1


def test_a_submission_that_was_cut_off_hides_no_other(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", "recipe.yaml", *SIZE]) == 0
    (place / "run/jobs/0002").mkdir()
    (place / "run/jobs/0003").write_text("no directory")
    fake.answers("squeue", "101|RUNNING|None|1:05|node[1-2]\n")
    capsys.readouterr()
    assert main(["launch", "cancel", "run", "--json"]) == 0
    assert answer(capsys)["cancelled"] == ["101"]


def test_status_cancel_and_logs(place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "status", "run"]) == 2
    assert "no submitted jobs" in capsys.readouterr().err
    assert main(["launch", "slurm", "recipe.yaml", *SIZE, "--chain=3"]) == 0
    capsys.readouterr()
    (place / "run/metrics.jsonl").write_text('{"step": 7}\n')
    fake.answers("squeue", "102|RUNNING|None|1:05|node[1-2]\n103|PENDING|Dependency|0:00|\n9|RUNNING|None|0:01|x\n")
    fake.answers("sacct", "TIMEOUT|0:0|01:00:00|node1\n")
    assert main(["launch", "status", "run", "--json"]) == 0
    found = answer(capsys)
    assert found["step"] == 7
    jobs = [(job["job_id"], job["state"]) for job in found["jobs"]]  # type: ignore[attr-defined]
    assert jobs == [("101", "TIMEOUT"), ("102", "RUNNING"), ("103", "PENDING")]
    fake.answers("sacct", "sacct: error: Slurm accounting storage is disabled\n", code=1)
    assert main(["launch", "cancel", "run", "--json"]) == 0
    assert answer(capsys)["cancelled"] == ["103", "102"]
    assert fake.calls("scancel") == [["scancel", "103", "102"]]
    logs = place / "run/jobs/0001/logs"
    (logs / "rank-10.log").write_text("fine\n")
    (logs / "rank-2.log").write_text("ValueError: boom\n")
    assert main(["launch", "logs", "run", "--json"]) == 0
    found = answer(capsys)
    assert found["rank_logs"] == [str(logs / "rank-2.log"), str(logs / "rank-10.log")]
    assert found["first_error"] == f"ValueError: boom ({logs / 'rank-2.log'})"


def test_hostile_names_are_refused_or_passed_literally(
    place: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(HOSTILE) >= 100
    literal = 0
    for name in HOSTILE:
        for field in ("partition", "account", "qos", "exclude", "container", "time"):
            request = JobRequest(1, 1, **{field: name})
            try:
                request.check()
            except UserError:
                continue
            literal += 1
            arguments = sbatch_arguments(request, "run", place, [place / "pretrain.sbatch"])
            environment = slurm.job_environment({}, request, place, place)
            wanted = environment["MEGALM_CONTAINER"] if field == "container" else arguments
            assert name == wanted if field == "container" else f"--{field}={name}" in wanted
            assert field in ("container",) or not re.search(r"[\s;&|$`<>(){}'\"\\]", name), (field, name)
    assert literal > 20
    assert not list(place.rglob(CANARY))


@pytest.mark.slow
def test_hostile_paths_and_recipes_are_never_executed(
    place: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, and the script that it submits, run by bash with stand-ins for srun and Python."""
    monkeypatch.setattr(records, "code_identity", lambda: ({}, b""))  # some seconds of git, a hundred times
    stub = place.parent / "venv/bin"
    stub.mkdir(parents=True)
    (stub / "activate").write_text("")
    for name, body in (("srun", 'exec env SLURM_PROCID=0 "${@:5}"'), ("python", 'printf "%s\\n" "$@" >>"$SEEN"')):
        (stub / name).write_text(f"#!/bin/bash\n{body}\n")
        (stub / name).chmod(0o755)
    submitted = 0
    for number, name in enumerate(HOSTILE):
        before = len(fake.calls("sbatch"))
        try:
            status = main(["launch", "slurm", "recipe.yaml", f"run.dir=runs/{number}{name}", *SIZE])
        except (ValueError, OSError) as error:
            pytest.fail(f"{name!r}: {error!r}")
        assert status in (0, 2), name
        if status == 2:
            assert len(fake.calls("sbatch")) == before, name
            continue
        submitted += 1
        *_, script, recipe = fake.calls("sbatch")[-1]
        seen = place.parent / f"seen-{number}"
        environment = fake.environment() | {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n"}
        environment |= {"SLURM_SUBMIT_DIR": str(place), "MEGALM_VENV": str(stub.parent), "SEEN": str(seen)}
        environment["PATH"] = f"{stub}:{environment['PATH']}"
        done = subprocess.run(["bash", script, recipe], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert seen.read_text().split(f"\n{recipe}\n")[0].endswith("--"), name
        assert f"\ntrain\n{recipe}\n" in seen.read_text(), name
    assert 20 < submitted < len(HOSTILE)
    assert not list(place.parent.rglob(CANARY))
