"""What a run writes down while it trains: `metrics.jsonl` and the console.

Owns the two faces of the console (a terminal, a log); the file is `metrics_file`'s. The figures come from the trainer
and from `monitor`. Only rank 0 tracks: the other ranks hold a `Tracker` that does nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from megalm.config.yaml_text import section_lines
from megalm.train.metrics_file import Event, MetricsFile
from megalm.train.sinks import Record, Sinks

logger = logging.getLogger(__name__)


def format_time(seconds: float) -> str:
    """Return "12s", "3m05s", "2h07m" or "4d03h"."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{small_unit}"
    return f"{whole}s"


def format_bytes(count: float) -> str:
    """Return a size with a binary unit: "512 MiB", "1.50 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_count(count: float) -> str:
    """Return a count with three figures: "987", "12.3k", "1.24B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def describe_step(record: Record) -> str:
    """Return the part of a step's record that a person reads along: loss, rate, norm, speed, memory."""
    rate = float(record["perf/tflops"])
    speed = f"{rate:.1f} TFLOP/s" if rate >= 1 else f"{rate * 1e3:.2f} GFLOP/s"
    return (
        f"loss {record['train/loss']:.4f}  lr {record['optim/lr']:.2e}  |g| {record['optim/grad_norm']:.3f}  "
        f"{format_count(record['perf/tokens_per_s'])} tok/s  {speed}  MFU {record['perf/mfu']:.1%}  "
        f"{format_bytes(record['memory/peak_bytes'])}"
    )


def describe_evaluation(record: Record) -> str:
    """Return the part of an evaluation's record that a person reads along."""
    averaged = f"  averaged weights {record['evaluate/ema_loss']:.4f}" if "evaluate/ema_loss" in record else ""
    return (
        f"held-out loss {record['evaluate/loss']:.4f}  perplexity {record['evaluate/perplexity']:.2f}  "
        f"bits per byte {record['evaluate/bits_per_byte']:.4f}{averaged}"
    )


class _Bar(Progress):
    """The progress bar under one line of figures, so that neither is cut off at 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is drawn at the foot of the terminal."""
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")
        yield self.make_tasks_table(self.tasks)


class Console:
    """The run on the screen: a progress bar on a terminal, one plain line a logged step anywhere else.

    `terminal` None asks the stream. Off a terminal no ANSI code is written.
    """

    def __init__(self, first_step: int, last_step: int, stream: TextIO | None = None, terminal: bool | None = None):
        self._stream = stream if stream is not None else sys.stdout
        if terminal is None:  # rich also knows FORCE_COLOR, by which a launcher says that a pipe ends on a terminal
            terminal = RichConsole(file=self._stream).is_terminal
        self._terminal = terminal
        self._last_step = last_step
        self._rich = RichConsole(
            file=self._stream,
            force_terminal=self._terminal,
            no_color=None if self._terminal else True,
            highlight=False,
        )
        self._bar: _Bar | None = None
        if self._terminal:
            self._bar = _Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                console=self._rich,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=last_step, completed=first_step)

    def header(self, config_yaml: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show the resolved recipe, a line a section, and under it the facts of the run."""
        sections = section_lines(config_yaml)
        width = max(len(name) for name, _ in (*sections, *facts))
        if not self._terminal:
            for name, text in (*sections, *facts):
                self.note(f"{name:<{width}}  {text}")
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, text in sections:
            table.add_row(f"[cyan]{name}[/cyan]", _escape(text))
        for name, text in facts:
            table.add_row(f"[bold]{name}[/bold]", _escape(text))
        self._rich.print(table)
        if self._bar is not None:
            self._bar.start()

    def step(self, record: Record, time_left_s: float) -> None:
        """Show a logged step; `record` is the line of metrics."""
        left = f"left {format_time(time_left_s)}"
        if self._bar is not None:
            self._bar.figures = describe_step(record)
            self._bar.update(self._task, completed=int(record["step"]), description=left, refresh=True)
            return
        done = f"{record['step']:>{len(str(self._last_step))}}"
        self.note(f"step {done}/{self._last_step}  {describe_step(record)}  {left}")

    def evaluation(self, record: Record) -> None:
        """Show an evaluation on its own line, above the bar."""
        self.note(f"step {record['step']}  {describe_evaluation(record)}")

    def event(self, record: Event) -> None:
        """Show an event on its own line, in yellow on a terminal."""
        what = {key: value for key, value in record.items() if key not in ("step", "event")}
        facts = "  ".join(
            f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in what.items()
        )
        text = f"step {record['step']}  {str(record['event']).upper()}  {facts}"
        if self._terminal:
            self._rich.print(f"[yellow]{_escape(text)}[/yellow]", soft_wrap=True)
        else:
            self.note(text)

    def rewind(self, step: int) -> None:
        """Show that the run is at an earlier step again."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, refresh=True)

    def note(self, message: str) -> None:
        """Print one line as it stands."""
        if self._terminal:
            self._rich.print(_escape(message), soft_wrap=True)
        else:
            with suppress(OSError):  # a log on a full disk is no reason to end a run
                print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def _escape(text: str) -> str:
    """Return the text such that rich prints it as it stands."""
    return text.replace("[", r"\[")


class Tracker:
    """The metrics file, the sinks and the console of a run as one; `active` False (all ranks but 0) does nothing."""

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        last_step: int,
        active: bool,
        stream: TextIO | None = None,
        sinks: Sinks | None = None,
    ):
        self._metrics = MetricsFile(run_dir, resume_step) if active else None
        self._console = Console(resume_step, last_step, stream) if active else None
        self._sinks = sinks
        self._step = resume_step

    def header(self, config_yaml: str, facts: Sequence[tuple[str, str]]) -> None:
        """Show the resolved recipe and the facts: parameters, layout, where MFU's denominator comes from."""
        if self._console is not None:
            self._console.header(config_yaml, facts)

    def log_step(self, record: Record, time_left_s: float) -> None:
        """Write and show one logged step."""
        if self._console is not None:
            self._write(record)
            self._console.step(record, time_left_s)

    def log_evaluation(self, record: Record) -> None:
        """Write and show one evaluation on held-out text."""
        if self._console is not None:
            self._write(record)
            self._console.evaluation(record)

    def _write(self, record: Record) -> None:
        """Write figures to the metrics file, and to the sinks unless they stand there already."""
        self._step = int(record["step"])
        if self._metrics is not None and self._metrics.write(record) and self._sinks is not None:
            self._sinks.write(record)
            self._tell_failed_sinks()

    def _tell_failed_sinks(self) -> None:
        for name, reason in self._sinks.failed() if self._sinks is not None else ():
            self.event({"step": self._step, "event": "sink failed", "sink": name, "reason": reason})

    def event(self, record: Event) -> None:
        """Write and show something that happened: a skipped step, a slow rank."""
        if self._metrics is not None and self._console is not None:
            self._metrics.write(record)
            self._console.event(record)

    def rewind(self, step: int) -> None:
        """Take back what was written of later steps, which are about to be done again."""
        if self._metrics is not None and self._console is not None:
            self._metrics.rewind(step)
            self._console.rewind(step)
        if self._sinks is not None:
            self._sinks.rewind(step)

    def note(self, message: str) -> None:
        """Show one line: a checkpoint written, a run resumed."""
        if self._console is not None:
            self._console.note(message)

    def close(self) -> None:
        """Close them all; safe to call twice."""
        if self._sinks is not None:
            self._sinks.close()
            self._tell_failed_sinks()
            self._sinks = None
        if self._metrics is not None and self._console is not None:
            self._metrics.close()
            self._console.close()
