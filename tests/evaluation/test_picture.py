"""The picture is a PNG that shows what it is given, whatever is given."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megalm.evaluation.picture import draw_losses

image = pytest.importorskip("matplotlib.image")


def test_curves_and_baselines_leave_marks(tmp_path: Path) -> None:
    bare, full = tmp_path / "bare.png", tmp_path / "full.png"
    training = [(1.0, 7.0), (2.0, 6.0), (3.0, 5.0)]
    draw_losses(bare, training, [], {}, "run")
    draw_losses(full, training, [(3.0, 5.5)], {"bigram": 416.0}, "run")
    assert image.imread(bare).shape == image.imread(full).shape == (600, 960, 4)
    assert (image.imread(bare) != image.imread(full)).any()


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    draw_losses(tmp_path / "a.png", [(1.0, 7.0), (2.0, math.nan), (3.0, math.inf)], [(1.0, math.nan)], {}, "run")
    assert image.imread(tmp_path / "a.png").shape == (600, 960, 4)
