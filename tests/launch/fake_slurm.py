"""Stand-ins for Slurm's programs that note how they were called, for tests of what is asked of Slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

_PROGRAM = """\
#!{python}
import json, os, sys
from pathlib import Path
here = Path({folder!r})
name = Path(sys.argv[0]).name
with open(here / "calls", "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answer = here / f"{{name}}.answer"
code, _, text = answer.read_text().partition("\\n") if answer.exists() else ("0", "", "")
if name == "sbatch" and not answer.exists():
    count = (here / "calls").read_text().count('["sbatch"')
    text = f"{{100 + count}}\\n"
    (here / "environment").write_text(json.dumps(dict(os.environ)))
(sys.stderr if code != "0" else sys.stdout).write(text)
sys.exit(int(code))
"""
PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel", "sacct")


class FakeSlurm:
    """Programs in `folder/bin`. sbatch answers 101, 102, ...; the others nothing, until told by `answers`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in PROGRAMS:
            path = self.bin / name
            path.write_text(_PROGRAM.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)

    @classmethod
    def on_path(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
        """Return programs that are found before the machine's own."""
        programs = cls(folder)
        monkeypatch.setenv("PATH", f"{programs.bin}:{os.environ['PATH']}")
        return programs

    def answers(self, program: str, text: str, code: int = 0) -> None:
        """Have a program write `text` and end with `code` from now on."""
        (self.folder / f"{program}.answer").write_text(f"{code}\n{text}")

    def calls(self, program: str | None = None) -> list[list[str]]:
        """Return the argument lists of the calls so far, in order."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if program in (None, call[0])]

    def environment(self) -> dict[str, str]:
        """Return the environment of the last sbatch."""
        found: dict[str, str] = json.loads((self.folder / "environment").read_text())
        return found
