"""What `megalm checkpoint diff` finds between two checkpoints, whatever their layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.checkpoint.commands import diff
from megalm.cli import main
from tests.checkpoint.simulated import Logical, small_model, write_ranks, zero_fragments

STATE: dict[str, Any] = {"config": {"seed": 1, "parallel": {"tensor": 1}}, "progress": {"step": 3, "best": math.inf}}


def write(root: Path, model: dict[str, Logical], state: dict[str, Any] = STATE, tensor: int = 1, data: int = 1) -> Path:
    kinds = [zero_fragments(model, kind, tensor, data) for kind in ("weight", "exp_avg")]
    return write_ranks(root, 3, [[*one, *two] for one, two in zip(*kinds, strict=True)], state)


def changed(model: dict[str, Logical], name: str, values: Tensor) -> dict[str, Logical]:
    return {**model, name: Logical(values, model[name].dim)}


def test_layouts_do_not_count(tmp_path: Path) -> None:
    model = small_model()
    one, other = write(tmp_path / "a", model), write(tmp_path / "b", model, tensor=3, data=2)
    found = diff(one, other)
    assert found["equal"] and found["config"] == found["state"] == {}
    assert found["tensors"] == {kind: {"equal": 4} for kind in ("exp_avg", "weight")}


def test_the_largest_differences_are_named_with_their_tensors(tmp_path: Path) -> None:
    model = small_model()
    embedding, norm = (model[name].values.clone() for name in ("embedding.weight", "final_norm.weight"))
    embedding[3, 4], embedding[0, 0] = embedding[3, 4] + 0.5, embedding[0, 0] * (1 + 2**-20)
    norm[2] = -norm[2]
    other = changed(changed(model, "embedding.weight", embedding), "final_norm.weight", norm)
    found = diff(write(tmp_path / "a", model), write(tmp_path / "b", other, tensor=2))
    weights = found["tensors"]["weight"]
    assert not found["equal"] and weights["equal"] == 2
    assert weights["different"] == ["embedding.weight", "final_norm.weight"]
    absolute = max((embedding - model["embedding.weight"].values).abs().max(), 2 * norm[2].abs())
    assert weights["largest absolute"]["value"] == pytest.approx(float(absolute))
    assert weights["largest relative"] == {"value": 2.0, "tensor": "final_norm.weight"}


@pytest.mark.parametrize(("value", "absolute"), [(math.nan, "inf"), (math.inf, "inf"), (-0.0, None)])
def test_what_no_number_is_counts_too(tmp_path: Path, value: float, absolute: str | None) -> None:
    zeros = {"x": Logical(torch.zeros(5))}
    values = torch.zeros(5)
    values[1] = value
    found = diff(write(tmp_path / "a", zeros), write(tmp_path / "b", changed(zeros, "x", values)))
    weights = found["tensors"]["weight"]
    assert weights["different"] == ["x"], "bits are compared"
    assert weights.get("largest absolute", {}).get("value") == absolute
    same = diff(write(tmp_path / "c", changed(zeros, "x", values)), tmp_path / "b" / "step-00000003")
    assert same["equal"]


def test_tensors_of_one_alone_and_of_other_shapes_are_listed(tmp_path: Path) -> None:
    model = small_model()
    norm = model["final_norm.weight"]
    other = {**model, "extra": Logical(torch.ones(2)), "embedding.weight": Logical(torch.ones(38, 8), 0)}
    other["final_norm.weight"] = Logical(norm.values.double())
    del other["blocks.0.mlp.up.weight"]
    weights = diff(write(tmp_path / "a", model), write(tmp_path / "b", other))["tensors"]["weight"]
    assert weights == {
        "equal": 1,
        "only in the first": ["blocks.0.mlp.up.weight"],
        "only in the second": ["extra"],
        "other shape or dtype": {
            "embedding.weight": ["F32 [37, 8]", "F32 [38, 8]"],
            "final_norm.weight": ["F32 [8]", "F64 [8]"],
        },
    }


def test_the_state_counts_and_its_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    one = write(tmp_path / "a", model)
    config = {"seed": 1, "parallel": {"tensor": 2}, "new": 5}
    other = write(tmp_path / "b", model, {**STATE, "config": config})
    assert main(["checkpoint", "diff", str(one), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"parallel.tensor": [1, 2], "new": ["(absent)", 5]}
    other = write(tmp_path / "c", model, {**STATE, "progress": {"step": 4, "best": math.inf}})
    assert main(["checkpoint", "diff", str(one), str(other)]) == 1
    assert "state.progress.step" in capsys.readouterr().out


def test_of_many_tensors_the_first_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many, others = ({f"x{i}": Logical(torch.full((2,), value)) for i in range(20)} for value in (0.0, 1.0))
    losses = {"config": {}, "progress": {"losses": [0.5] * 30}}
    one, other = write(tmp_path / "a", many), write(tmp_path / "b", others, losses)
    assert main(["checkpoint", "diff", str(one), str(other)]) == 1
    found = capsys.readouterr().out
    assert '"x15" and 12 more (--json has all)\n' in found and '"x16"' not in found
    assert "[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5 and 22 more (--json has all)]" in found
    assert main(["checkpoint", "diff", str(one), str(other), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["tensors"]["weight"]["different"]) == 20


def test_a_damaged_or_missing_one_is_an_error_and_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a", small_model()), write(tmp_path / "b", small_model())
    file = other / "rank-00000-optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    for wrong in (other, tmp_path / "none"):
        assert main(["checkpoint", "diff", str(one), str(wrong)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and str(wrong) in captured.err
