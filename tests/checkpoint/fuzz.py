"""Random bit flips and truncations in every region of every file of a run, and files that are not where they belong.

    python -m tests.checkpoint.fuzz --flips 10000 --cuts 1000 --seed 1

damages the newer of a run's two checkpoints, loads it in every way that megalm has (resume, verify, reads in whole and
in part, evaluation), and prints by region what was caught. A load must end in an error that names the file, or give
what was saved to the bit; resume and verify must notice everything. Ends with 1, and the trial, where that is not so.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megalm.checkpoint.manifest import VERSION
from megalm.checkpoint.names import CHECKPOINTS, MANIFEST, find_checkpoints, hidden
from megalm.config.trained import trained_config
from megalm.data.tokenizer import Tokenizer
from megalm.distributed.mesh import ParallelMesh
from megalm.distributed.world import joined_mesh
from megalm.errors import MegalmError
from megalm.train.metrics_file import METRICS_FILE, MetricsFile
from megalm.train.run_directory import check_run
from megalm.train.run_identity import read_identity
from tests.checkpoint.forge import reseal
from tests.checkpoint.regions import Region, regions_of
from tests.checkpoint.subject import CAUGHT, NAMELESS, SILENT, TRUE, Subject, listening, make_run

WAYS = ("resume", "verify", "whole", "part", "evaluate")
MUST_NOTICE = {"resume", "verify"}
RUN_FILES = ("run.json", "config.yaml", "tokenizer.json", METRICS_FILE)
UNCOVERED = {METRICS_FILE}
"""Figures of past steps have no checksum: a line that is no JSON is dropped aloud, another digit is not seen."""


@dataclass
class Result:
    """Outcomes by region and way, and what went wrong."""

    counts: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    trials: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, region: str, outcomes: dict[str, str], what: str) -> None:
        """Take in a trial; what may not be is noted with `what`."""
        self.trials[region] += 1
        self.counts.setdefault(region, Counter()).update(outcomes.items())
        for way, outcome in outcomes.items():
            if outcome in (SILENT, NAMELESS) or (outcome == TRUE and way in MUST_NOTICE):
                self.wrong.append(f"{what}: {way}: {outcome}")


@contextmanager
def changed(paths: list[Path], data: bytes) -> Iterator[None]:
    """Give files other bytes, inside."""
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(data)
    try:
        yield
    finally:
        for path, kept in zip(paths, before, strict=True):
            path.write_bytes(kept)


def flipped(data: bytes, bit: int) -> bytes:
    """Return the bytes with one bit turned."""
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def fuzz(subject: Subject, mesh: ParallelMesh, flips: int, cuts: int, seed: int, result: Result) -> None:
    """Flip bits and cut files; a place is a region drawn first, then a file that has it, then a byte in it."""
    choose = random.Random(seed)
    files = [*subject.places()[0].iterdir(), *(subject.run / name for name in RUN_FILES)]
    by_region: dict[str, list[tuple[Path, Region]]] = {}
    for path in sorted(files):
        for region in regions_of(path):
            by_region.setdefault(region.name, []).append((path, region))
    kinds = ["flip"] * flips + ["cut"] * cuts
    choose.shuffle(kinds)
    for trial, kind in enumerate(kinds):
        path, region = choose.choice(by_region[choose.choice(sorted(by_region))])
        at = choose.choice([choose.randrange(region.start, region.stop), region.start, region.stop - 1])
        bit = 8 * at + choose.randrange(8)
        data = path.read_bytes()
        damaged = flipped(data, bit) if kind == "flip" else data[:at]
        what = f"seed {seed}, trial {trial}: {kind} at {at}, bit {bit % 8}, of {path.name} ({region.name})"
        if path.parent == subject.run:
            outcome = _of_run_file(subject, mesh, path, damaged)
            uncovered = path.name in UNCOVERED
            way = "resume" if path.name in ("run.json", METRICS_FILE) else "evaluate"
            result.trials[region.name] += 1
            result.counts.setdefault(region.name, Counter())[way, outcome] += 1
            result.wrong += [f"{what}: {outcome}"] * (outcome in (SILENT, NAMELESS) and not uncovered)
            continue
        with changed([place / path.name for place in subject.places()], damaged), _aside(subject, trial % 8 == 7):
            result.add(region.name, subject.outcomes((path.name,), mesh, choose), what)


@contextmanager
def _aside(subject: Subject, wanted: bool) -> Iterator[None]:
    """Have the newer checkpoint set aside for one that never came, inside: it stands for its step."""
    if not wanted:
        yield
        return
    places, name = subject.places(), subject.newest
    subject.newest = hidden(places[0], "replaced").name
    for place in places:
        place.rename(place.with_name(subject.newest))
    try:
        yield
    finally:
        for place in places:
            place.with_name(subject.newest).rename(place)
        subject.newest = name


def _of_run_file(subject: Subject, mesh: ParallelMesh, path: Path, damaged: bytes) -> str:
    """Load what reads a damaged file of the run itself."""
    truth, wanted = path.read_bytes(), subject.trained
    identity = read_identity(subject.run)
    assert identity is not None
    fingerprints = (identity["data_fingerprint"], identity["tokenizer_fingerprint"])
    with changed([path, subject.alone / path.name], damaged), listening() as listener:
        try:
            if path.name == "run.json":  # it is compared and written anew; nothing else of it is used
                good = check_run(subject.config, *fingerprints) is not None
            elif path.name == "config.yaml":
                config = trained_config(subject.alone, [])
                good = config == wanted or subject.evaluates(config, mesh)
            elif path.name == "tokenizer.json":  # evaluation refuses another one than the data's
                good = Tokenizer.load(subject.run).fingerprint == fingerprints[1]
                listener.said += [] if good else [f"{path.name} differs from the data's"]
            else:
                MetricsFile(subject.run, 4).close()
                good = path.read_bytes() == truth
        except MegalmError as error:
            listener.said.append(str(error))
            good = False
    said = [line for line in listener.said if "\n" not in line and (path.name in line or str(subject.run) in line)]
    if said:
        return CAUGHT
    return TRUE if good else NAMELESS if listener.said else SILENT


Act = tuple[str, tuple[str, ...], Callable[[Path], object]]
"""A kind of misplacement, the names of which an error must say one, and what is done to the checkpoint's directory."""


def misplace(subject: Subject, mesh: ParallelMesh, other: Path, result: Result) -> None:
    """Delete, empty, swap, double and rename files, take them from another step and another run (`other`)."""
    older = find_checkpoints(subject.run / CHECKPOINTS)[1]
    for kind, names, action in _acts(subject.places()[0], older, other):
        kept = [shutil.move(place, place.with_name("kept")) for place in subject.places()]
        try:
            for place, copy in zip(subject.places(), kept, strict=True):
                shutil.copytree(copy, place)
                action(place)
            outcomes = subject.outcomes(names, mesh, random.Random(0))
            if kind == "one too many":  # nobody looks at it, so it is enough that all else is true
                outcomes = {way: outcome for way, outcome in outcomes.items() if way not in MUST_NOTICE}
            result.add(kind, outcomes, f"{kind} {names[0]}")
        finally:
            for place, copy in zip(subject.places(), kept, strict=True):
                shutil.rmtree(place, ignore_errors=True)
                shutil.move(copy, place)


def _acts(checkpoint: Path, older: Path, other: Path) -> Iterator[Act]:
    names = sorted(path.name for path in checkpoint.iterdir())
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        yield from _acts_on(name, following, names, older, other)
    spare = "rank-00077-weight.safetensors"
    yield "one too many", (spare,), lambda place: shutil.copy(place / names[-1], place / spare)
    yield "future version", (MANIFEST,), lambda place: reseal(place, {"version": VERSION + 1})
    yield "step of another", ("step-",), lambda place: _replace(place, older)


def _acts_on(name: str, following: str, names: list[str], older: Path, other: Path) -> Iterator[Act]:
    everything = tuple(names) if name == MANIFEST else (name,)  # that all have other sums shows at the first file
    yield "deleted", (name,), lambda place: (place / name).unlink()
    yield "emptied", (name,), lambda place: (place / name).write_bytes(b"")
    yield "a byte too many", (name,), lambda place: (place / name).write_bytes((place / name).read_bytes() + b"\n")
    yield "swapped", (name, following), lambda place: _swap(place / name, place / following)
    yield "doubled over another", (following,), lambda place: shutil.copy(place / name, place / following)
    yield "renamed", (name,), lambda place: (place / name).rename(place / "rank-00077-weight.safetensors")
    yield "of another step", everything, lambda place: shutil.copy(older / name, place / name)
    yield "of another run", everything, lambda place: shutil.copy(other / name, place / name)


def _swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def _replace(place: Path, source: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(source, place)


def table(result: Result) -> str:
    """Return a line a region: trials, then for each way how often it was caught, and how often true."""
    width = max(map(len, result.trials))
    lines = [f"{'region':<{width}}  trials  " + "  ".join(f"{way:>12}" for way in WAYS)]
    for region, trials in sorted(result.trials.items()):
        cells = []
        for way in WAYS:
            found = {outcome: result.counts[region][way, outcome] for outcome in (CAUGHT, TRUE, SILENT, NAMELESS)}
            words = [str(found[CAUGHT])] if any(found.values()) else []
            words += [f"{count} {word}" for word, count in list(found.items())[1:] if count]
            cells.append(f"{' + '.join(words):>12}")
        lines.append(f"{region:<{width}}  {trials:6}  " + "  ".join(cells))
    return "\n".join(lines)


def prepare(directory: Path) -> tuple[Subject, Path]:
    """Make the run to be damaged, and another one whose newest checkpoint is given."""
    subject = Subject.make(directory / "one")
    make_run(directory / "other", seed=1)
    return subject, find_checkpoints(directory / "other" / "run" / CHECKPOINTS)[0]


def damage(subject: Subject, other: Path, flips: int, cuts: int, seed: int) -> Result:
    """Do all of the above to the run, which is whole again on return."""
    result = Result()
    with joined_mesh(subject.config) as mesh:
        misplace(subject, mesh, other, result)
        fuzz(subject, mesh, flips, cuts, seed, result)
        outcomes = subject.outcomes(("",), mesh, random.Random(0))
        assert result.wrong or set(outcomes.values()) == {TRUE}, f"the harness itself left damage: {outcomes}"
    return result


def main(arguments: list[str] | None = None) -> int:
    """Damage, load, print the table; 0 if every load kept the promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoint.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--cuts", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parsed = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        subject, other = prepare(Path(directory))
        result = damage(subject, other, parsed.flips, parsed.cuts, parsed.seed)
    print(table(result))
    print(f"{result.trials.total()} trials, {len(result.wrong)} broken promises; {time.monotonic() - begin:.0f} s")
    print(*result.wrong[:20], sep="\n", end="\n" * bool(result.wrong))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
