"""How commands end before their work is done: one short line, and the exit code that says which kind of end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import typer

from dynamo_jax.commands import stopping


def ends(capsys, work):
    """Exit code and standard error of a command line whose command is ``work``."""
    app = typer.Typer(cls=stopping.Commands, pretty_exceptions_enable=False)
    app.command()(work)
    app.callback()(lambda: None)
    before, sys.argv = sys.argv, ["dynamo-jax", "work"]
    try:
        stopping.run(app)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    return code, capsys.readouterr().err


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a\nb"), "a b"),
        (FileNotFoundError(2, "no such file", "x"), "[Errno 2] no such file: 'x'"),
        (MemoryError(), "not enough memory"),
        (RecursionError("maximum"), "something is nested too deeply: maximum"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "not enough memory: RESOURCE_EXHAUSTED: Out of memory"),
        (ValueError("\x1b[2J\ud800"), "\ufffd[2J\ufffd"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "'utf-8' codec can't decode byte 0xff in position 0: bad"),
    ],
)
def test_a_mistake_is_one_line(capsys, error, words):
    assert ends(capsys, raising(error)) == (2, f"dynamo-jax: error: {words}\n")


def test_a_line_is_cut(capsys):
    code, said = ends(capsys, raising(ValueError("x y" * 10**6)))
    assert code == 2 and len(said) < 2100 and said.count("\n") == 1


def test_an_interrupt_says_what_is_kept(capsys):
    assert ends(capsys, raising(KeyboardInterrupt())) == (130, "dynamo-jax: stopped\n")
    noted = KeyboardInterrupt()
    noted.add_note("layers 0 to 2 are kept in out/unfinished; the same command goes on")
    assert ends(capsys, raising(noted))[1].startswith("dynamo-jax: stopped; layers 0 to 2 are kept")


def test_our_own_faults_keep_their_traceback(capsys):
    for error in (AssertionError("ours"), RuntimeError("ours"), KeyError("ours")):
        with pytest.raises(type(error)):
            ends(capsys, raising(error))


def command(*arguments):
    return [sys.executable, "-m", "dynamo_jax", *map(str, arguments)]


def test_a_reader_that_has_read_enough_is_no_error():
    piped = subprocess.Popen(command("inspect", "--model", "tiny-moe"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.close()
    assert piped.wait(120) == 1 and piped.stderr.read() == b""


WAITING = """
import signal, time
from dynamo_jax.commands import stopping
signal.signal(signal.SIGINT, {handler})
with stopping.stops_soon():
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("handler", "at_once"), [("signal.default_int_handler", True), ("lambda *_: None", False)])
def test_generate_stops_soon_though_python_cannot_look(handler, at_once):
    """C code that Ctrl-C does not interrupt is one that sleeps on: a handler that does nothing stands for it."""
    one = [sys.executable, "-c", WAITING.format(handler=handler)]
    started = subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout.readline() == b"begun\n"
    os.kill(started.pid, signal.SIGINT)
    said = started.communicate(timeout=30)[1]
    assert b"KeyboardInterrupt" in said if at_once else (started.returncode, said) == (130, b"dynamo-jax: stopped\n")


def test_what_was_there_before_is_there_again_after():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with stopping.stops_soon():
        pass
    assert signal.set_wakeup_fd(before) == before
