"""A resharded checkpoint is what the ranks of its layout would have written: the same pieces, the same bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalm.checkpoint.commands import diff, inspect, verify
from megalm.checkpoint.manager import CheckpointManager
from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.cli import main
from megalm.distributed.layout import RankLayout
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.sharding import Fragment, ShardSpec
from megalm.dry_run.reshard import describe_layout, reshard
from megalm.errors import CheckpointError
from megalm.models.imported import SOURCE_FILE, write_run
from megalm.train.run_directory import check_place
from tests.parity.harness import VOCAB, build_trainer
from tests.worker_pool import WorkerPool
from tests.zero.runs import Cell

LAYOUTS: dict[str, tuple[RankLayout, Cell, dict[str, Any]]] = {
    "tensor and data": (RankLayout(1, 2, 2), Cell("zero0", "fp32"), {"model.hidden": 128}),
    "stages, tied, and data": (RankLayout(2, 2, 1), Cell("zero1", "fp32"), {}),
    "ZeRO 3 and frozen weights": (
        RankLayout(1, 2, 2),
        Cell("zero3", "fp32"),
        {"optim.rules": [{"match": "*.mlp.*", "freeze": True}]},
    ),
    "experts": (
        RankLayout(1, 4, 1, expert=2),
        Cell("zero2", "fp32"),
        {"model.experts": 4, "model.experts_per_token": 2, "parallel.expert": 2, "model.router_bias_rate": 0.01},
    ),
    "adafactor": (RankLayout(1, 2, 2), Cell("zero1", "fp32", "adafactor"), {}),
}


def train_and_save(mesh: ParallelMesh, run: str, cell: Cell, overrides: dict[str, Any]) -> None:
    """Make a step in this layout and save as a run would."""
    config = cell.config(mesh, **overrides)
    trainer = build_trainer(mesh, config)
    trainer.train_step()
    state = {
        "config": config.model_dump(mode="json"),
        "data_fingerprint": "d" * 64,
        "tokenizer_fingerprint": "t" * 64,
        "progress": vars(trainer.state).copy(),
    }
    layout = describe_layout(config, mesh.layout)
    CheckpointManager(Path(run), 1, dist.group.WORLD, layout).save(1, trainer.engine.state(), state)


def pieces(run: Path) -> list[tuple[str, str, str]]:
    """Return all pieces of a checkpoint: which file has which of which tensor."""
    rows = Manifest.load(run / "checkpoints" / "step-00000001").tensors
    return sorted((kind, name, str(sorted(row.items()))) for (kind, name), some in rows.items() for row in some)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_each_rank_gets_the_pieces_that_it_would_have_written(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    layout, cell, overrides = LAYOUTS[name]
    written, one, back = (tmp_path / which for which in ("written", "one", "back"))
    pool.run(train_and_save, str(written), cell, overrides, layout=layout)
    reset = [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "expert")]
    reshard(written, one, [*reset, "zero.stage=0", "zero.config=null"], 1)
    assert len(list((one / "checkpoints" / "step-00000001").glob("rank-*"))) == 2
    axes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert}
    overrides_back = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    stage = cell.zero.removeprefix("zero")
    done = reshard(one, back, [*overrides_back, f"zero.stage={stage}", f"zero.config={cell.zero}"], layout.world_size)
    if name != "adafactor":  # whose means stay in the pieces that they are in
        assert pieces(back) == pieces(written)
    if stage == "3":
        counts = Counter(found[:2] for found in pieces(written))
        assert set(counts.values()) == {1, layout.tensor}, "a row for each part of a tensor, whatever the data ranks"
    for run in (one, back):
        found = diff(written, run)
        assert found["equal"] and found["state"] == {}, found
        assert found["tensors"]["weight"] == {"equal": inspect(run)["tensors"]}
        verify(run)
        assert check_place(run) is not None, "a run goes on in it"
    assert done["layout"] == inspect(written)["layout"] == inspect(back)["layout"]
    assert diff(written, back)["config"].keys() <= {"run.dir", "zero.config"}


def test_weights_without_a_run_of_their_own_and_a_run_whose_first_weights_are_gone(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported weights stay such, and what a run began from is not asked for; without either nothing is copied."""
    run, imported, out = (tmp_path / name for name in ("run", "imported", "out"))
    gone = {"train.init_from": str(tmp_path / "gone")}
    pool.run(train_and_save, str(run), Cell("zero0", "fp32"), gone, layout=RankLayout(1, 1, 1))
    reshard(run, out, ["parallel.tensor=2"], None)
    identity = check_place(out)
    assert identity is not None and identity["init_from"] == {"path": gone["train.init_from"], "fingerprint": "unknown"}
    assert diff(run, out)["equal"] and identity["saved"]

    reader = CheckpointReader(run / "checkpoints" / "step-00000001")
    rows = [(name, reader.manifest.entries("weight", name)[0].piece.shard) for name in reader.names("weight")]
    tensors = [(name, reader.read_local(ShardSpec.whole(name, shard.global_shape), "weight")) for name, shard in rows]
    beside = {"companions/token_ids.json": b"{}", "companions/chat_template.jinja": b"{{ messages }}"}
    write_run(imported, reader.state["config"]["model"], tensors, None, {"family": "llama"}, beside=beside)
    reshard(imported, tmp_path / "again", ["parallel.tensor=2"], None)
    assert diff(imported, tmp_path / "again")["equal"]
    files = [{path.name for path in place.iterdir()} for place in (imported, tmp_path / "again")]
    assert files[0] == files[1]
    assert {name: (tmp_path / "again" / name).read_bytes() for name in beside} == beside
    assert (tmp_path / "again" / SOURCE_FILE).read_bytes() == (imported / SOURCE_FILE).read_bytes()

    parts = [Fragment(ShardSpec.whole(name, tuple(part.shape)), "weight", 0, part.view(-1)) for name, part in tensors]
    CheckpointManager(tmp_path / "bare", 1).save(1, parts, {"config": reader.state["config"]})
    monkeypatch.setattr("megalm.dry_run.reshard._copy", None)
    with pytest.raises(CheckpointError, match=r"neither what data .* nor where it was imported from; give"):
        reshard(tmp_path / "bare", tmp_path / "none", [], None)
    assert not (tmp_path / "none").exists()


def test_wrong_layouts_and_places_are_refused_in_one_line(
    pool: WorkerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    pool.run(train_and_save, str(run), Cell("zero0", "fp32"), {}, layout=RankLayout(1, 1, 1))
    (tmp_path / "file").write_text("x")

    def refused(*arguments: str, says: str) -> None:
        assert main(["checkpoint", "reshard", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error

    refused(str(run), f"--out={out}", "parallel.tensor=3", says="parallel.tensor=3")
    refused(str(run), f"--out={out}", "parallel.tensor=2", "--ranks=3", says="3")
    refused(str(run), f"--out={out}", "model.layers=3", says="no key of a layout")
    refused(str(run), f"--out={out}", "parallel.tensors=2", says="parallel.tensors")
    refused(str(run), f"--out={run}", says="is there already")
    refused(str(run), f"--out={tmp_path / 'file'}", says="is there already")
    refused(str(tmp_path / "none"), f"--out={out}", says="no checkpoint")
    refused(str(run), f"--out={tmp_path / 'file' / 'x'}", says="cannot be written")
    refused(str(run), f"--out={out}", "parallel.tensor=2", "--ranks=1000", says="use 500 for train.global_batch")
    file = next((run / "checkpoints" / "step-00000001").glob("*-optimizer*"))
    data = file.read_bytes()
    file.write_bytes(data[:-4000] + bytes([data[-4000] ^ 1]) + data[-3999:])
    refused(str(run), f"--out={out}", "parallel.tensor=2", says=file.name)
    file.write_bytes(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"], "nothing is left of those"
    batch = ["--ranks=2", "train.global_batch=8", "train.micro_batch=1"]
    assert main(["checkpoint", "reshard", str(run), f"--out={tmp_path / 'batch'}", *batch, "--json"]) == 0
    assert '"data": 2' in capsys.readouterr().out
    assert main(["checkpoint", "reshard", str(run), f"--out={out}", "parallel.tensor=2", "--json"]) == 0
    assert '"ranks": 2' in capsys.readouterr().out
    assert (
        Manifest.load(out / "checkpoints" / "step-00000001")
        .entries("weight", "embedding.weight")[0]
        .piece.shard.global_shape[0]
        == VOCAB
    )
