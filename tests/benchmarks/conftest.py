"""The benchmarks are programs, not a package: their modules are found as they find each other."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# Last, so that no module of another package is hidden by one of theirs.
sys.path.append(str(BENCHMARKS))
