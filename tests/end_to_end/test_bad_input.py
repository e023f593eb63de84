"""Bad input to the real command line: one line with the remedy, status 2, nothing written, no group formed."""

from __future__ import annotations

import os
import re
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch.distributed as dist

from megalm.cli import main
from megalm.config.load import load_recipe
from megalm.data.datasets import open_prepared
from megalm.launch import checks, local
from megalm.train.run_directory import open_run
from tests.end_to_end.workplace import LAUNCHER_VARIABLES, make_data, make_workplace, megalm

pytestmark = pytest.mark.timeout(120)  # a pipe that is waited for must not take the whole session's patience

TRAIN = ("train", "recipe.yaml")
FREEZE_FIRST_STAGE = "optim.rules=[{match: 'blocks.0.*', freeze: true}, {match: '[ep]*', freeze: true}]"


class GroupFormed(Exception):
    """Something was started that no bad input may come to."""


def form_group(*arguments: object, **options: object) -> None:
    raise GroupFormed(arguments)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a workplace that all tests copy."""
    return make_workplace(tmp_path_factory.mktemp("bad-input") / "workplace")


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a workplace as the working directory, where neither workers nor a process group can be started."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a command sets is taken back as well
        monkeypatch.delenv(name)
    monkeypatch.setattr(local, "run_workers", form_group)
    monkeypatch.setattr(dist, "init_process_group", form_group)
    copy = tmp_path / "workplace"
    shutil.copytree(template, copy)
    monkeypatch.chdir(copy)
    return copy


def files_below(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of all that lies in a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(directory))] = (about.st_size, about.st_mtime_ns)
    return found


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines of a refusal."""
    before = files_below(Path())
    status = main(list(arguments))
    said = capfd.readouterr()
    assert (status, said.out) == (2, ""), said.err
    assert files_below(Path()) == before
    lines = said.err.splitlines()
    assert lines[0].startswith("error: ")
    return lines


def refused_in_one_line(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    lines = refused(capfd, *arguments)
    assert len(lines) == 1, lines
    return lines[0]


def hold_run(*overrides: str) -> Path:
    """Make the directory of a run that has not trained yet, and return it."""
    config, data = load_recipe("recipe.yaml", overrides), open_prepared("data")
    run = open_run(config, data.fingerprint, data.tokenizer_fingerprint, 1, model_parameters=1000)
    run.claim()
    data.tokenizer().save(run.path)
    run.close()
    return run.path


@pytest.mark.parametrize("overrides", [[], ["parallel.tensor=2"]])
def test_good_input_comes_to_a_group(place: Path, capfd: pytest.CaptureFixture[str], overrides: list[str]) -> None:
    for fresh in ([], ["--fresh"]):
        assert main([*TRAIN, *overrides, *fresh]) == 1
        assert "GroupFormed" in capfd.readouterr().err
        hold_run("model.layers=1")  # which the second time --fresh may remove
    assert main([*TRAIN, *overrides, "model.layers=1"]) == 1  # and which may go on
    assert "GroupFormed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=4"], "model.heads=2 is not divisible by parallel.tensor=4; use 1 or 2"),
        (["model.heads=3"], "model.hidden=16 is not divisible by model.heads=3; use 1, 2, 4, 8 or 16"),
        (["model.heads=4", "model.kv_heads=3"], "model.heads=4 is not divisible by model.kv_heads=3; use 1, 2 or 4"),
        (["model.heads=4", "model.kv_heads=2", "parallel.tensor=4"], "model.kv_heads=2 is not divisible by parallel.t"),
        (["train.micro_batch=3"], "train.global_batch=4 is not divisible by train.micro_batch=3; use 1, 2 or 4"),
        (["--nproc=3"], "use 6 for train.global_batch, or 1 or 2 ranks"),
        (["parallel.pipeline=3"], "parallel.pipeline=3 is more than model.layers=2; use at most 2"),
        (["parallel.pipeline=2", "parallel.partition=[1,2]"], "adds up to 3 layers, but model.layers=2; make the 2"),
        (["model.layrs=2"], "model.layrs: unknown key; did you mean model.layers?"),
        (["modell.layers=2"], "modell.layers: unknown key; did you mean model.layers?"),
        (["model.norm=rmsnrom"], "model.norm=rmsnrom: unknown norm; did you mean rmsnorm?"),
        (["model.activation=gleu"], "unknown activation; did you mean gelu?"),
        (["model.position=rotari"], "unknown position; did you mean rotary?"),
        (["parallel.schedule=1f1"], "unknown schedule; did you mean 1f1b?"),
        (["optim.kind=adamv"], "did you mean adam?"),
        (["lr_schedule.kind=cosin"], "did you mean cosine?"),
        (["optim.rules=[{match: a, freeze: true, lr: 0.5}]"], "'a' has freeze=true, where lr, weight_"),
        (["optim.rules=[{match: zz, lr: 0.5}]"], "optim.rules: no parameter is called 'zz'; names are those of a che"),
        (["optim.rules=[{match: '*', freeze: true}]", "parallel.tensor=2"], "freeze every parameter, so there is noth"),
        ([FREEZE_FIRST_STAGE, "parallel.pipeline=2", "zero.stage=1"], "freeze every parameter of a pipeline stage, wh"),
        (["optim.ema_decay=1.0"], "optim.ema_decay=1.0"),
        (["optim.kind=muon", "optim.muon_adjust_lr_fn=original"], "original needs optim.adamw_lr"),
        (["optim.kind=muon", "model.mup_base=8"], "move by the root of the width; use original"),
        (["model.mup_base=8", "optim.kind=sgd"], "optim.kind=sgd does not; use adamw, fused_adamw"),
        (["precision=fp64", "train.reduce_dtype=bf16"], "would round what precision=fp64 checks; leave it out"),
        (["loss_scale.initial=2"], "loss_scale.initial=2.0 has no effect without precision=fp16; leave it out"),
        (["precision=fp16", "loss_scale.initial=2", "loss_scale.minimum=4"], "is below loss_scale.minimum=4; use 4"),
        (["precision=bf61"], "did you mean bf16?"),
        (["zero.config=zero-1"], "did you mean zero1?"),
        (["zero.stage=3", "parallel.pipeline=2"], "use zero.stage 0, 1 or 2, or parallel.pipeline=1"),
        (["parallel.schedule=zb-v", "parallel.pipeline=2"], "parallel.pipeline=2 x 2 chunks a stage (parallel"),
        (["parallel.schedule=interleaved"], "needs parallel.virtual_stages of 2 or more"),
        (["parallel.virtual_stages=2"], "parallel.virtual_stages=2 has no effect without parallel.schedule="),
        (["zero.stage=3", "parallel.schedule=zb-h1"], "zero.stage=3 excludes parallel.schedule=zb-h1: DeepSpeed"),
        (["train.compile=true", "parallel.schedule=zb-h1"], "use train.compile=false, or parallel.schedule=in"),
        (["zero.stage=4"], "zero.stage=4"),
        (["zero.stage=1", "zero.config=zero2"], "zero2.json:zero_optimization.stage=2 contradicts"),
        (["parallel.tensor=2", "--nproc=1"], "needs 2 ranks, but 1 is started; start 2 or a multiple of it"),
        (["parallel.tensor=2", "--nproc=3"], "3 ranks are not divisible by"),
        (["model.vocab=100"], "smaller than the 280 tokens of the tokenizer in data; use 280 or more"),
        (["model.sequence=100000"], "use a smaller model.sequence or more text"),
        (["run.device=cuda"], "run.device=cuda, but torch sees no GPU here; megalm doctor says why"),
        (["train.fp8=rowwise", "precision=bf16"], "fp8=rowwise needs a GPU with products in fp8 and this run comp"),
        (["train.offload_activations=true"], "to the host's memory, where this run on cpu has them already; use train"),
        (["train.fp8=rowise"], "train.fp8=rowise: unknown fp8; did you mean rowwise?"),
        (["model.layers=1000000"], "model.layers=1000000"),
        (["log.sinks=[tensorbord]"], "log.sinks=[tensorbord]: unknown sink; did you mean tensorboard?"),
        (["profile.start=39"], "profile.start=39 with profile.steps=3 reaches to step 41, but the run ends at"),
        (["profile.memory_at=41"], "profile.memory_at=41 is a step behind the last one, 40; use at most 40"),
        (["profile.ranks=[1]"], "profile.ranks=[1] has no effect without profile.start or profile.memory_at; leave it"),
        (["profile.start=3", "profile.ranks=[0,2]", "parallel.tensor=2"], "no rank 2 is started; use 0 to 1"),
        (["train.epochs=1e12", "train.steps=null"], "tokens, more than a run can have; use at most 2."),
        (["run.dir=/dev/null"], "/dev/null/run.json: cannot be read (Not a directory); choose another run.dir"),
        (["data.path=recipe.yaml"], "recipe.yaml holds no prepared data: cannot read recipe.yaml/data.json: Not a d"),
        (["data.path=gone"], "there is no prepared data at gone; make it with megalm data prepare"),
        (["data.rows=document"], "did you mean documents?"),
        (["data.rows=documents", "model.document_mask=true", "model.attention_dropout=0"], "has no effect without"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be(
    place: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert said in refused_in_one_line(capfd, *TRAIN, *overrides)


def test_kernels_without_a_device(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "model.kernels=fused needs a CUDA device" in refused_in_one_line(capfd, *TRAIN, "model.kernels=fused")


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None, origin=None)], ids=["nothing", "a folder"])
def test_a_sink_without_its_package(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, found: ModuleSpec | None
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: found)
    line = refused_in_one_line(capfd, *TRAIN, "log.sinks=[wandb]", "parallel.tensor=2")
    assert "log.sinks=[wandb] needs the package wandb, which is not installed here; pip install wandb" in line


def test_every_mistake_has_a_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = refused(capfd, *TRAIN, "model.layrs=2", "model.norm=rmsnrom", "parallel.pipeline=3", "train.micro_batch=3")
    assert lines[0] == "error: command line: 4 mistakes"
    assert len(lines) == 5
    for said in ("did you mean model.layers?", "did you mean rmsnorm?", "use at most 2", "use 1, 2 or 4"):
        assert sum(said in line for line in lines) == 1, lines


WORLD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("variables", "overrides", "said"),
    [
        (WORLD, ["parallel.tensor=2", "parallel.pipeline=2"], "needs 4 ranks, but 2 are started; start 4"),
        (WORLD, ["parallel.tensor=2", "--nproc=4"], "--nproc=4 contradicts the 2 ranks of environment; leave"),
        ({**WORLD, "WORLD_SIZE": "3"}, ["parallel.tensor=2"], "3 ranks are not divisible by"),
        ({**WORLD, "RANK": "2"}, ["parallel.tensor=2"], "rank 2 of 2, local rank 0 of None cannot be"),
        ({**WORLD, "RANK": "two"}, ["parallel.tensor=2"], "RANK=two is not a number; set it to a whole number"),
        ({"RANK": "0"}, [], "RANK set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing; set all of"),
        ({"WORLD_SIZE": "2"}, [], "or unset them to start on this machine alone"),
        ({"MASTER_ADDR": "localhost"}, [], "MASTER_ADDR set, but RANK, WORLD_SIZE"),
    ],
)  # fmt: skip
def test_a_world_that_cannot_be(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    overrides: list[str],
    said: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert said in refused_in_one_line(capfd, *TRAIN, *overrides)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "missing": (Path.unlink, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:100]), "is truncated"),
    "cut in its tokens": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is too long"),
    "text": (lambda path: path.write_text("the sea and the wind " * 40), "is not a token file"),
    "bytes": (lambda path: path.write_bytes(bytes(range(256)) * 4), "is not a token file"),
    "a directory": (as_directory, "Is a directory"),
    "a pipe": (as_pipe, "not a regular file"),
}


@pytest.mark.parametrize("name", ["train.tokens", "validation.tokens"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_token_file_that_is_none(place: Path, capfd: pytest.CaptureFixture[str], name: str, damage: str) -> None:
    harm, said = DAMAGES[damage]
    harm(place / "data" / name)
    line = refused_in_one_line(capfd, *TRAIN, "parallel.tensor=2")
    assert said in line and f"data/{name}" in line and "megalm data prepare" in line


@pytest.mark.parametrize("name", ["train.tokens", "validation.tokens", "tokenizer.json", "data.json"])
def test_a_file_of_other_data(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    make_data(place / "other", seed=1, vocabulary=270)
    shutil.copy(place / "other" / name, place / "data" / name)
    line = refused_in_one_line(capfd, *TRAIN)
    assert "data" in line and "; " in line and "megalm data prepare" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "data.json"])
@pytest.mark.parametrize(
    "harm",
    [Path.unlink, as_directory, as_pipe, lambda path: path.write_bytes(b"\xff\xfe{"), lambda path: path.write_text("")],
    ids=["missing", "a directory", "a pipe", "not UTF-8", "empty"],
)
def test_a_description_that_cannot_be_read(
    place: Path, capfd: pytest.CaptureFixture[str], name: str, harm: object
) -> None:
    harm(place / "data" / name)  # type: ignore[operator]
    line = refused_in_one_line(capfd, *TRAIN)
    assert f"data/{name}" in line and "make " in line


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "no such file; give a shipped recipe's name or a file's path"),
        (as_directory, "cannot be read (Is a directory); give a readable file"),
        (as_pipe, "cannot be read (not a regular file); give a readable file"),
        (lambda path: path.write_bytes(b"seed: 1\n\xff"), "not UTF-8 text (byte 8); give a YAML recipe"),
        (lambda path: path.write_bytes(b""), "empty; a recipe needs the sections model, train and optim"),
        (lambda path: path.write_text("run: !!python/object/apply:os.mkdir [pwned]"), "holds plain values only"),
        (lambda path: path.write_text("seed: !!python/name:os.system\n"), "the tag !!python/name:os.system is refused"),
    ],
    ids=["missing", "a directory", "a pipe", "not UTF-8", "empty", "python object", "python name"],
)  # fmt: skip
def test_a_file_that_is_no_recipe(place: Path, capfd: pytest.CaptureFixture[str], harm: object, said: str) -> None:
    harm(place / "recipe.yaml")  # type: ignore[operator]
    assert said in refused_in_one_line(capfd, "train", "./recipe.yaml")


def test_a_python_tag_on_the_command_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused_in_one_line(capfd, *TRAIN, "seed=!!python/object/apply:os.mkdir [pwned]")
    assert "the tag !!python/object/apply:os.mkdir is refused" in line


def test_a_deepspeed_file_that_cannot_be_read(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.json")
    Path("directory.json").mkdir()
    Path("bytes.json").write_bytes(b"\xff")
    for name in ("pipe", "directory", "bytes", "gone"):
        line = refused_in_one_line(capfd, *TRAIN, "zero.stage=1", f"zero.config=./{name}.json")
        assert f"{name}.json" in line and "; give " in line


@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"]])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=8"], "seed=7 there, 8 here"),
        (["model.layers=1"], "model.layers=2 there, 1 here"),
        (["optim.kind=sgd"], 'optim.kind="adamw" there, "sgd" here'),
        (["data.path=other"], "data fingerprint"),
        (["data.rows=documents"], 'data.rows="stream" there, "documents" here'),
    ],
)
def test_a_directory_that_holds_another_run(
    place: Path, capfd: pytest.CaptureFixture[str], layout: list[str], overrides: list[str], said: str
) -> None:
    make_data(place / "other", seed=1)
    hold_run()
    line = refused_in_one_line(capfd, *TRAIN, *layout, *overrides)
    assert said in line and "run.dir=run holds another run" in line
    assert line.endswith("choose another run.dir, or --fresh to remove that run")


def test_another_run_is_found_by_a_rank_too(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_run()
    for name, value in {**WORLD, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "holds another run" in refused_in_one_line(capfd, *TRAIN, "parallel.tensor=2", "seed=8")


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    "harm",
    [
        as_directory,
        as_pipe,
        Path.unlink,
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text('{"format": "megalm-run-1"}'),
        lambda path: path.write_text('{"format": ["megalm-run-1"], "fixed": 3}'),
    ],
    ids=["a directory", "a pipe", "missing", "not UTF-8", "foreign", "not whole", "odd"],
)
def test_a_directory_of_an_unknown_run(
    place: Path, capfd: pytest.CaptureFixture[str], harm: object, fresh: list[str]
) -> None:
    harm(hold_run() / "run.json")  # type: ignore[operator]
    assert "choose another run.dir" in refused_in_one_line(capfd, *TRAIN, "parallel.tensor=2", *fresh)


@pytest.mark.parametrize("run", ["recipe.yaml", "recipe.yaml/run"])
def test_a_file_where_the_run_should_be(place: Path, capfd: pytest.CaptureFixture[str], run: str) -> None:
    for layout in ("parallel.tensor=1", "parallel.tensor=2"):
        assert "choose another run.dir" in refused_in_one_line(capfd, *TRAIN, f"run.dir={run}", layout)


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt=the sea"]])
@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("gone", "gone: no such run; give the run.dir of a run"),
        ("data", "data: no run directory, config.yaml is missing; give the run.dir of a run"),
        ("recipe.yaml", "recipe.yaml: is a file, not a run; give the run.dir of a run"),
        ("run", "run/checkpoints: no checkpoint yet; train the run until it has saved one"),
    ],
)
def test_a_run_that_gives_no_model(
    place: Path, capfd: pytest.CaptureFixture[str], command: list[str], run: str, said: str
) -> None:
    hold_run()
    line = refused_in_one_line(capfd, command[0], run, *command[1:])
    assert said in line and "; " in line


@pytest.mark.parametrize("command", [["evaluate", "run"], ["generate", "run", "--prompt=the sea"]])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=4"], "model.heads=2 is not divisible by parallel.tensor=4"),
        (["parallel.pipeline=3"], "use at most 2"),
        (["parallel.pipeline=2", "--nproc=1"], "needs 2 ranks, but 1 is started"),
        (["model.layers=1"], "model.layers=1 cannot be set for a trained model"),
        (["paralel.tensor=2"], "did you mean parallel.tensor?"),
        (["run.device=cuda"], "run.device=cuda, but torch sees no GPU here; megalm doctor says why"),
        (["run.device=cuda", "parallel.tensor=2"], "run.device=cuda, but torch sees no GPU here"),
    ],
)
def test_a_layout_that_a_trained_model_cannot_have(
    place: Path, capfd: pytest.CaptureFixture[str], command: list[str], overrides: list[str], said: str
) -> None:
    hold_run()
    assert said in refused_in_one_line(capfd, *command, *overrides)


def test_evaluation_on_data_of_another_tokenizer(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_data(place / "other", seed=1, vocabulary=270)
    hold_run()
    line = refused_in_one_line(capfd, "evaluate", "run", "data.path=other")
    assert "prepare the text with --tokenizer run/tokenizer.json" in line


@pytest.mark.parametrize("option", ["--temperature=-1", "--temperature=nan", "--top-p=2", "--top-k=0", "--tokens=0"])
def test_a_way_of_drawing_that_cannot_be(place: Path, capfd: pytest.CaptureFixture[str], option: str) -> None:
    hold_run()
    refused_in_one_line(capfd, "generate", "run", "--prompt=the sea", option)


@pytest.mark.parametrize("arguments", [["--run-dir=data.txt"], ["recipe.yaml", "run.dir=data.txt"]])
def test_a_file_where_the_doctor_should_look(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    Path("data.txt").touch()
    assert "=data.txt is a file; name a directory" in refused_in_one_line(capfd, "doctor", *arguments)


def test_a_file_is_no_run_that_was_sampled(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is a file, not a run; give the run.dir of a run" in refused_in_one_line(capfd, "inspect", "recipe.yaml")


def test_the_same_in_processes_of_their_own(place: Path) -> None:
    hold_run()
    before = files_below(place)
    for arguments, said in (
        ([*TRAIN, "parallel.tensor=2", "seed=8"], "run.dir=run holds another run: seed=7 there, 8 here"),
        ([*TRAIN, "parallel.tensor=2", "data.path=gone"], "there is no prepared data at gone; make it with"),
        ([*TRAIN, "seed=!!python/name:os.system"], "the tag !!python/name:os.system is refused"),
        # Known to the workers only, which say it alike and are heard once.
        (["evaluate", "run", "parallel.tensor=2"], "no checkpoint yet; train the run until it has saved one"),
    ):
        done = megalm(place, *arguments, timeout_s=100)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert re.match(r"(\[rank 1\] )?error: ", done.stderr) and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
        assert files_below(place) == before
