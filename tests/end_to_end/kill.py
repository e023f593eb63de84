"""A training run killed with SIGKILL at random moments, started again each time, beside the same run unbroken.

    python -m tests.end_to_end.kill --kills 100 --layout t2 --layout d2z1 --layout t1 --seed 1

prints where each kill fell and ends with 1 if the two runs differ in a bit of a weight or of optimizer state, in a
batch that a rank was given, or in a figure of metrics.jsonl other than times. t2p2d1z1 is tensor 2 x pipeline 2 x
data 1 with ZeRO 1; what is left out is 1, and z is 0. Each layout has a run of its own, and the first ones more of
the kills. Processes are forks of this one (`forked.py`); --exec starts the real command line each time, without ledger.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.names import CHECKPOINTS, HIDDEN_NAME, find_checkpoints
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.run import CheckpointSection
from megalm.distributed.sharding import ShardSpec
from megalm.train.metrics_file import METRICS_FILE, read_metrics
from tests.end_to_end.forked import LEDGER, Forked, import_everything, read_ledger
from tests.end_to_end.workplace import PROGRAM, environment, make_workplace

STARTING, STEPPING, SAVING = "before its first step", "among its steps", "inside a save"
WHERE = (STARTING, STEPPING, SAVING)
TIMEOUT_S = 300.0
FORKED = ("run.hang_timeout_s=0", "run.preflight=false")
"""Of a forked start: no watcher, which is a program of its own, and no preflight, which takes longer than a step."""
_POLL_S = 0.005
_POLL_SAVE_S = 0.0005  # a save of a tiny model takes some ten milliseconds
_OF_THE_CLOCK = ("time/", "perf/", "memory/", "checkpoint/")
# A start may save in the background, where the recipe has a key for that.
_BACKGROUND = [f"checkpoint.{name}" for name in CheckpointSection.model_fields if "async" in name]


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and the ZeRO stage."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 0

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout that a text such as t2p2z1 means."""
        if not re.fullmatch(r"([tpdz]\d)+", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no layout such as t2p2d1z1")
        names = {"t": "tensor", "p": "pipeline", "d": "data", "z": "zero"}
        return cls(**{names[letter]: int(size) for letter, size in re.findall(r"([tpdz])(\d)", text)})

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def arguments(self) -> list[str]:
        """Return what `megalm train` is told."""
        axes = [f"parallel.tensor={self.tensor}", f"parallel.pipeline={self.pipeline}", f"zero.stage={self.zero}"]
        return [f"--nproc={self.world}", *axes]


@dataclass(frozen=True)
class Kill:
    """A kill that was made: of whom, where it fell, and how far the run was then."""

    target: str
    where: str
    seconds: float
    steps: int
    """Steps of this start."""
    checkpoint: int
    """Step of the newest checkpoint that the kill left; 0: none."""


@dataclass
class Outcome:
    """The kills, and every difference between the two runs (none: they are the same to the bit)."""

    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    tensors: int = 0
    """Tensors that were compared, weights and optimizer state."""
    batches: int = 0
    """Batches of all ranks that were compared."""
    first_step_s: float = 0.0
    """What the unbroken run took until its first step was logged."""

    def count(self, where: str) -> int:
        """Return how many kills fell there."""
        return sum(kill.where == where for kill in self.kills)


class Start:
    """One start of the training, a launcher and its workers, and what it has done so far."""

    def __init__(
        self, workplace: Path, run: str, layout: Layout, options: Sequence[str] = (), forked: bool = False
    ) -> None:
        self.directory = workplace / run
        self.log = workplace / f"{run}.log"
        self.begin = time.monotonic()
        self.resumes_at = newest_step(self.directory)
        self._old_lines = set(self._lines())
        self._old_rests = self._rests()
        command = [*PROGRAM, "train", "recipe.yaml", f"run.dir={run}", *layout.arguments(), *options]
        start: Any = Forked if forked else subprocess.Popen
        env = {**environment(), LEDGER: str(workplace / f"{run}.ledger")}
        with self.log.open("wb") as log:
            self.process = start(command, cwd=workplace, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def steps(self) -> list[int]:
        """Return the steps that this start has logged."""
        new = [line for line in self._lines() if line not in self._old_lines]
        return [int(match[1]) for line in new if (match := re.match(r'\{"step": (\d+), "tokens"', line))]

    def has_stepped(self) -> bool:
        """Say whether this start has logged a step."""
        return bool(self.steps())

    def saving(self) -> bool:
        """Say whether a save of this start is on its way, or was when it ended."""
        return bool(self._rests() - self._old_rests)

    def workers(self) -> dict[int, int]:
        """Return the process id of each rank that has been started, by rank."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, rest = stat.read_text().rsplit(")", 1)
                if int(rest.split()[1]) != self.process.pid:
                    continue
                # A fork says its rank by its name, a program by the environment that it was started with.
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (stat.parent / "environ").read_bytes())
                rank = re.search(r"\(rank-(\d+)$", name) or rank  # type: ignore[assignment]
            except OSError:
                continue  # it has just ended
            if rank:
                found[int(rank[1])] = int(stat.parent.name)
        return found

    def wait_for(self, condition: Callable[[], bool], poll_s: float = _POLL_S) -> bool:
        """Return True once the condition holds, False if the run has ended before."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline, f"no end after {TIMEOUT_S} s; {self.said()}"
            time.sleep(poll_s)
        return False

    def kill(self, target: str) -> Kill | None:
        """Kill "all" processes, the "launcher" or "rank N"; None if the run had ended by itself.

        Returns when all are dead: without the launcher the workers must not live on, nor without one worker the
        others.
        """
        workers = self.workers()
        number = int(target.split()[1]) if target.startswith("rank") else -1
        was_saving, seconds = self.saving(), time.monotonic() - self.begin
        if self.process.poll() is not None:
            return None
        if number in workers:
            _kill(workers[number])
        else:
            target = target if target == "all" else "launcher"
            _kill(self.process.pid)
            for pid in workers.values() if target == "all" else ():
                _kill(pid)
        status = self.process.wait(60)
        deadline = time.monotonic() + 60
        while any(_alive(pid) for pid in workers.values()):
            assert time.monotonic() < deadline, f"workers outlive the kill of {target}: {workers}"
            time.sleep(_POLL_S)
        if status == 0:  # the killed worker was done already
            return None
        assert status == (1 if number in workers else -signal.SIGKILL), f"status {status}; {self.said()}"
        # After one worker's death the others clear up, so what counts then is what was there just before.
        saving = was_saving if number in workers else self.saving()
        steps = self.steps()
        where = SAVING if saving else STEPPING if steps else STARTING
        return Kill(target, where, seconds, len(steps), newest_step(self.directory))

    def lost_its_port(self) -> bool:
        """Say whether it ended because another program took the port that the launcher had found free."""
        return "Address already in use" in self.log.read_text(errors="replace")

    def said(self) -> str:
        """Return the end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def _lines(self) -> list[str]:
        path = self.directory / METRICS_FILE
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def _rests(self) -> set[tuple[str, int]]:
        """Return what saves on their way have in the directory: name and inode."""
        found = set()
        with _gone_is_nothing(), os.scandir(self.directory / CHECKPOINTS) as entries:
            found = {(entry.name, entry.inode()) for entry in entries if HIDDEN_NAME.fullmatch(entry.name)}
        return found


@contextmanager
def _gone_is_nothing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint, 0 where there is none."""
    found = find_checkpoints(run / CHECKPOINTS)
    return int(re.sub(r"\D", "", found[0].name)) if found else 0


def kill_and_compare(workplace: Path, layout: Layout, kills: int, seed: int, forked: bool = True) -> Outcome:
    """Train once unbroken and once with `kills` kills; `seed` decides whom they hit and when."""
    make_workplace(workplace)
    outcome, choose = Outcome(), random.Random(seed)
    options = [f"train.steps={12 + 2 * kills}", *FORKED * forked]

    def begin(run: str, more: Sequence[str] = ()) -> Start:
        return Start(workplace, run, layout, [*options, *more], forked)

    unbroken = begin("unbroken")
    while not unbroken.wait_for(unbroken.has_stepped):
        assert unbroken.lost_its_port(), unbroken.said()
        unbroken = begin("unbroken")
    outcome.first_step_s = time.monotonic() - unbroken.begin
    finish(unbroken)
    # Kills that were meant for a save may miss it by a little, so more of them are meant for one.
    aims = [(SAVING, STEPPING, SAVING, STARTING, SAVING)[number % 5] for number in range(kills)]
    choose.shuffle(aims)
    while len(outcome.kills) < kills:
        background = [f"{key}={choose.choice(['true', 'false'])}" for key in _BACKGROUND]
        start = begin("broken", background)
        _wait_for_moment(start, aims[len(outcome.kills)], choose, outcome.first_step_s)
        kill = start.kill(choose.choice(["all", "launcher", f"rank {choose.randrange(layout.world)}"]))
        if kill is None and start.lost_its_port():
            continue
        assert kill is not None, f"the run ended after {len(outcome.kills)} kills, make it longer; {start.said()}"
        outcome.kills.append(kill)
        print(line(len(outcome.kills), kill), flush=True)
        outcome.differences += _broken_promises(start, kill)
    last = begin("broken")
    while last.process.wait(TIMEOUT_S) and last.lost_its_port():
        last = begin("broken")
    finish(last)
    outcome.differences += _wrong_resume(last)
    compare(workplace / "unbroken", workplace / "broken", outcome)
    if forked:
        compare_ledgers(workplace, layout.world, outcome)
    return outcome


def _wait_for_moment(start: Start, aim: str, choose: random.Random, first_step_s: float) -> None:
    """Return at a random moment of the kind that `aim` asks for, or when the run has ended."""
    if aim == STARTING:
        until = start.begin + choose.uniform(0.02, 0.9) * first_step_s
        start.wait_for(lambda: time.monotonic() >= until)
        return
    wanted = choose.choice([1, 1, 2, 3])
    start.wait_for(lambda: len(start.steps()) >= wanted)
    if aim == SAVING:
        start.wait_for(start.saving, _POLL_SAVE_S)
        time.sleep(choose.choice([0.0, choose.uniform(0.0, 0.01)]))
    else:
        time.sleep(choose.uniform(0.0, 0.05))


def finish(start: Start) -> None:
    """Wait until a start has ended by itself, with status 0."""
    status = start.process.wait(TIMEOUT_S)
    assert status == 0, f"status {status}; {start.said()}"


def _broken_promises(start: Start, kill: Kill) -> list[str]:
    """Return what a kill may not do: lose the newest checkpoint, or leave one that is passed over."""
    wrong = _wrong_resume(start)
    if kill.checkpoint < start.resumes_at:
        wrong.append(f"step {start.resumes_at} was saved, then {kill.checkpoint} was the newest")
    return wrong


def _wrong_resume(start: Start) -> list[str]:
    """Return a line if the start's first step was not the one after the newest checkpoint."""
    steps = start.steps()
    if not steps or steps[0] == start.resumes_at + 1:
        return []
    return [f"after the checkpoint of step {start.resumes_at} came step {steps[0]}"]


def compare(unbroken: Path, broken: Path, outcome: Outcome) -> None:
    """Add to the outcome every difference between two runs: last checkpoint, logged steps, evaluations."""
    paths = [find_checkpoints(run / CHECKPOINTS)[0] for run in (unbroken, broken)]
    with closing(CheckpointReader(paths[0])) as one, closing(CheckpointReader(paths[1])) as other:
        if (one.step, one.state["progress"]) != (other.step, other.state["progress"]):
            outcome.differences.append(f"progress {one.state['progress']} and {other.state['progress']}")
        names = sorted({*one.manifest.tensors, *other.manifest.tensors})
        outcome.tensors = len(names)
        outcome.differences += [f"{name} ({kind})" for kind, name in names if not _same(one, other, kind, name)]
    logged = [[_figures(record) for record in read_metrics(run / METRICS_FILE)] for run in (unbroken, broken)]
    if logged[0] != logged[1]:
        pairs = zip(*logged, strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), f"{len(logged[0])} and {len(logged[1])} lines")
        outcome.differences.append(f"{METRICS_FILE}: {first}")


def _figures(record: dict[str, float]) -> dict[str, str]:
    """Return what a line of metrics says but times and memory; a NaN equals itself."""
    return {key: repr(value) for key, value in record.items() if not key.startswith(_OF_THE_CLOCK)}


def compare_ledgers(workplace: Path, world: int, outcome: Outcome) -> None:
    """Add every rank's batches that differ between the runs, or from one start of the broken run to the next."""
    for rank in range(world):
        whole, broken = (read_ledger(workplace / f"{run}.ledger", rank) for run in ("unbroken", "broken"))
        outcome.batches += len(whole)
        outcome.differences += [
            f"rank {rank}, samples from {first}: {whole.get(first)} and {broken.get(first)}"
            for first in sorted({*whole, *broken})
            if whole.get(first) != broken.get(first) or len(whole[first]) != 1
        ]


def _same(one: CheckpointReader, other: CheckpointReader, kind: str, name: str) -> bool:
    """Say whether a tensor is the same in both, to the bit: 0 and -0 differ, a NaN equals itself."""
    found = []
    for reader in (one, other):
        if (kind, name) not in reader.manifest.tensors:
            return False
        shape = reader.manifest.entries(kind, name)[0].piece.shard.global_shape
        found.append(reader.read_local(ShardSpec.whole(name, shape), kind))
    bits = [tensor.flatten().view(torch.uint8) for tensor in found]
    return found[0].shape == found[1].shape and found[0].dtype == found[1].dtype and torch.equal(*bits)


HEADING = "kill  of          after    where it fell          steps  newest checkpoint"


def line(number: int, kill: Kill) -> str:
    """Return a kill's line below the heading."""
    place = f"{kill.where:<21} {kill.steps:6} {kill.checkpoint:18}"
    return f"{number:4}  {kill.target:<9} {kill.seconds:6.2f} s  {place}"


def shares(kills: int, runs: int) -> list[int]:
    """Return how many of the kills each of the runs gets: the first ones more."""
    weights = [runs + 2 - place for place in range(runs)]
    parts = [kills * weight // sum(weights) for weight in weights]
    return [parts[0] + kills - sum(parts), *parts[1:]]


def main(arguments: list[str] | None = None) -> int:
    """Kill, print the tables and what differs; 0 if nothing does."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--layout", type=Layout.parse, action="append", metavar="t2p2d1z1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--exec", action="store_true", help="start the real command line instead of forks")
    parsed = parser.parse_args(arguments)
    layouts = parsed.layout or [Layout(tensor=2), Layout(data=2, zero=1), Layout()]
    if not parsed.exec:
        import_everything()
    begin, differences = time.monotonic(), 0
    found = dict.fromkeys(WHERE, 0)
    for number, (layout, kills) in enumerate(zip(layouts, shares(parsed.kills, len(layouts)), strict=True)):
        print(layout, HEADING, sep="\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="kill-") as directory:
            outcome = kill_and_compare(Path(directory), layout, kills, parsed.seed + number, not parsed.exec)
        for where in WHERE:
            found[where] += outcome.count(where)
        print(f"{outcome.tensors} tensors and {outcome.batches} batches compared bit for bit, ", end="")
        print(f"{len(outcome.differences)} differences (seed {parsed.seed + number})", flush=True)
        print(*outcome.differences[:20], sep="\n", end="\n" * bool(outcome.differences))
        differences += len(outcome.differences)
    counts = ", ".join(f"{count} {where}" for where, count in found.items())
    print(f"{parsed.kills} kills: {counts}; {differences} differences; {time.monotonic() - begin:.0f} s")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
