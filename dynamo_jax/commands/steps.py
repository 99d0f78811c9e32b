"""How far long work is, on standard error: bars in a terminal, and lines where a log keeps them.

Times to come are estimated from the finished steps of a stage alone: within the first step nobody knows.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import rich.console
import rich.progress
import rich.text

if TYPE_CHECKING:
    from dynamo_jax.progress import Progress

APART = 3.0  # seconds between two lines of steps that are quick
WITHIN = 60.0  # seconds between two lines within a step that is slow
SKIPPED = 0.1  # of the longest step's time, below which one was done before (a run that resumes)


class Stage:
    """Steps of a stage, and when they were finished."""

    def __init__(self, now: float):
        self.begun, self.done, self.at = now, 0, now
        self.took: list[float] = []

    def update(self, done: float, now: float) -> bool:
        """Whether a step more is finished."""
        whole = math.floor(done + 1e-9)
        if whole <= self.done:
            return False
        self.took += [(now - self.at) / (whole - self.done)] * (whole - self.done)
        self.done, self.at = whole, now
        return True

    def left(self, of: int, now: float) -> float | None:
        """Seconds until ``of`` steps are done, by the mean of those that were; None where none was."""
        real = [t for t in self.took if t >= SKIPPED * max(self.took)]
        if not real or self.done >= of:
            return None
        return max(0.0, (of - self.done) * sum(real) / len(real) - (now - self.at))


def clock_words(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def lines(write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> Progress:
    """A callback that writes a line for each finished step, ``APART`` seconds from the last one, but always for a
    stage's begin and end."""
    stages: dict[str, Stage] = {}
    written: dict[str, float] = {}

    def progress(stage: str, done: float, of: int) -> None:
        now = clock()
        first = stage not in stages
        steps = stages.setdefault(stage, Stage(now))
        ended = steps.done >= of
        stepped = steps.update(done, now)
        last = steps.done >= of and not ended
        waited = now - written.get(stage, now)
        if not (first or last or (stepped and waited >= APART) or waited >= WITHIN):
            return
        written[stage] = now
        left = steps.left(of, now)
        partly = "" if last or done == steps.done else f" and {done - steps.done:.0%} of the next"
        words = f"{stage}: {steps.done} of {of}{partly}, {clock_words(now - steps.begun)}"
        write(words if left is None else f"{words}, about {clock_words(left)} left")

    return progress


class LeftColumn(rich.progress.ProgressColumn):
    """The time that is left, by a stage's finished steps."""

    def __init__(self, stages: dict[rich.progress.TaskID, Stage], clock: Callable[[], float] = time.monotonic):
        self.stages, self.clock = stages, clock
        super().__init__()

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        left = self.stages[task.id].left(int(task.total or 0), self.clock()) if task.id in self.stages else None
        return rich.text.Text("" if task.finished else "-:--:--" if left is None else clock_words(left))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """One bar a stage on standard error, or lines where it is no terminal. (A notebook's FORCE_COLOR makes rich take
    its pipes for terminals.)"""
    console = rich.console.Console(stderr=True)
    if not sys.stderr.isatty():
        yield lines(lambda words: print(words, file=sys.stderr, flush=True))
        return
    steps: dict[rich.progress.TaskID, Stage] = {}
    bars = rich.progress.Progress(
        rich.progress.TextColumn("{task.description:28}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        LeftColumn(steps),
        console=console,
    )
    stages: dict[str, rich.progress.TaskID] = {}

    def progress(stage: str, done: float, of: int) -> None:
        if not stages:  # until there is work, a mistake in the input is one line
            bars.start()
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=of)
            steps[stages[stage]] = Stage(time.monotonic())
        steps[stages[stage]].update(done, time.monotonic())
        bars.update(stages[stage], completed=done)

    try:
        yield progress
    finally:
        if stages:
            bars.stop()
