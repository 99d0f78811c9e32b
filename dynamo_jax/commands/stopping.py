"""How a command ends before its work is done: one line on standard error, and an exit code.

A user's mistake is exit code 2. Ctrl-C is 130, and the line says what the notes of the interrupt say
(``error.add_note``): what is kept, and how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
import typer.core

LONGEST = 2000  # characters of a line
STOPPED = 130  # of a process that Ctrl-C ended
GRACE = 1.0  # seconds that a command has to end by itself
CommandError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")  # typer has no name


class Stopped(Exception):
    """Ctrl-C; its words are what is kept."""


class Commands(typer.core.TyperGroup):
    """Commands whose interrupts keep their notes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped("; ".join(getattr(error, "__notes__", []))) from error


def one_line(words: str) -> str:
    """Words as one line of at most ``LONGEST`` characters, without what a terminal would obey."""
    line = " ".join(words[: 4 * LONGEST].split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]} .."


def fail(words: str) -> NoReturn:
    """End with the line and exit code 2."""
    print(f"dynamo-jax: error: {one_line(words)}", file=sys.stderr)
    raise SystemExit(2) from None


def interrupt_again(lost: Any) -> None:
    """``sys.unraisablehook``: Ctrl-C that came where Python cannot raise it, as in callbacks of JAX, comes again."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def run(app: typer.Typer) -> None:
    """Run the command line, and end the process with its exit code if that is not 0."""
    sys.unraisablehook = interrupt_again
    try:
        code = app(standalone_mode=False, prog_name="dynamo-jax")
        sys.stdout.flush()
    except Stopped as error:
        print(one_line(f"dynamo-jax: stopped; {error}" if str(error) else "dynamo-jax: stopped"), file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except CommandError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            raise SystemExit(2) from None
        command = getattr(error.ctx, "command_path", "dynamo-jax") if hasattr(error, "ctx") else "dynamo-jax"
        fail(f"{error.format_message()} (options: {command} --help)")
    except BrokenPipeError:  # whoever read the results has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does Python's own flush fail at the end
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        fail("; ".join([str(error), *getattr(error, "__notes__", [])]))
    except RecursionError as error:
        fail(f"something is nested too deeply: {error}")
    except MemoryError as error:
        fail(f"not enough memory {error}")
    except RuntimeError as error:  # JAX has no class of its own for this
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(f"not enough memory: {error}")
    if isinstance(code, int) and code:
        raise SystemExit(code)


@contextlib.contextmanager
def stops_soon() -> Iterator[None]:
    """Ctrl-C ends the process after ``GRACE`` seconds, even while XLA compiles and Python cannot look.

    For commands that leave nothing half done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        while received := ours.recv(1):
            if received[0] == signal.SIGINT and not ended.wait(GRACE):
                os.write(2, b"dynamo-jax: stopped\n")
                os._exit(STOPPED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        theirs.close()
        watcher.join()
        ours.close()
