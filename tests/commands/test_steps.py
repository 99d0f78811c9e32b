"""What a log and a terminal are told of long work: finished steps, and no guess before the first."""

from __future__ import annotations

import io
import itertools

import rich.console

from dynamo_jax.commands import steps


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def told(calls):
    """The lines of (seconds since the last call, stage, done, of)."""
    clock, lines = Clock(), []
    progress = steps.lines(lines.append, clock)
    for seconds, stage, done, of in calls:
        clock.now += seconds
        progress(stage, done, of)
    return lines


def test_slow_steps_are_a_line_each_with_the_mean_of_those_before():
    calls = [
        (0, "layers", 0.5, 3),
        (10, "layers", 1, 3),
        (1, "layers", 1.5, 3),
        (9, "layers", 2, 3),
        (20, "layers", 3, 3),
    ]
    assert told(calls) == [
        "layers: 0 of 3 and 50% of the next, 0:00:00",
        "layers: 1 of 3, 0:00:10, about 0:00:20 left",
        "layers: 2 of 3, 0:00:20, about 0:00:10 left",
        "layers: 3 of 3, 0:00:40",
    ]


def test_quick_steps_are_few_lines_but_the_first_and_the_last_are_there():
    lines = told([(0.1, "layers", n, 1000) for n in range(1, 1001)])
    assert lines[0] == "layers: 1 of 1000, 0:00:00, about 0:00:00 left" or lines[0].startswith("layers: 1 of 1000")
    assert lines[-1].startswith("layers: 1000 of 1000") and len(lines) < 40
    assert len(told([(0.1, "layers", 1000, 1000)] * 5)) == 1


def test_within_a_slow_step_there_is_a_line_a_minute_and_no_guess():
    lines = told([(5, "layers", n / 100, 2) for n in range(1, 100)])
    assert 8 <= len(lines) <= 10 and not any("left" in line for line in lines)


def test_each_stage_counts_for_itself():
    lines = told([(0, "a", 1, 1), (7, "b", 0, 1), (7, "b", 1, 1)])
    assert lines == ["a: 1 of 1, 0:00:00", "b: 0 of 1, 0:00:00", "b: 1 of 1, 0:00:07"]


def test_steps_that_were_done_before_do_not_count_in_the_estimate():
    """A run that resumes at step 5 of 8 goes through those before it in no time."""
    stage = steps.Stage(0.0)
    for step, now in enumerate(itertools.accumulate([0.001] * 5 + [10.0]), 1):
        stage.update(step, now)
    assert round(stage.left(8, now)) == 20


def test_a_terminal_gets_no_guess_before_the_first_step():
    stage, clock = steps.Stage(100.0), Clock()
    column = steps.LeftColumn({0: stage}, clock)

    def shown(done):
        stage.update(done, clock.now)
        out = io.StringIO()
        task = steps.rich.progress.Task(0, "layers", 4, done, _get_time=clock)
        rich.console.Console(file=out).print(column.render(task), end="")
        return out.getvalue()

    assert shown(0.9) == "-:--:--"
    clock.now = 110.0
    assert shown(1) == "0:00:30"
    clock.now = 114.0
    assert shown(1.2) == "0:00:26"


def test_standard_error_that_is_no_terminal_gets_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks have it
    with steps.progress_bar() as progress:
        progress("layers", 0, 2)
        assert capsys.readouterr().err == "layers: 0 of 2, 0:00:00\n"
