"""The command line: ``dynamo-jax demo | train | analyze | quantize | eval | generate | export | inspect |
plan-devices``.

Each command is a module of its own; here they are wired. Bad input is one line on standard error and exit code 2;
results go to standard output, progress to standard error. Heavy imports happen inside the commands, so that --help
is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dynamo_jax import __version__
from dynamo_jax.commands import analyze, demo, evaluate, export, generate, inspect, plan_devices, quantize, train
from dynamo_jax.commands.stopping import STOPPED, Commands, run


def show_version(asked: bool) -> None:
    if asked:
        print(f"dynamo-jax {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Dynamic mixed precision for mixture-of-experts language models. Start with: dynamo-jax demo",
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Options of all commands."""


app.command()(demo.demo)
app.command()(train.train)
app.command()(analyze.analyze)
app.command()(quantize.quantize)
app.command(name="eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(export.export)
app.command()(inspect.inspect)
app.command()(plan_devices.plan_devices)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    run(app)


def script() -> None:
    """``main`` as a process of its own, which Ctrl-C ends at once, and so does another process that is gone.

    Python's own end would have XLA take down what it was compiling, which crashes (seen with jax 0.10.2), or wait for
    the process that is gone until its heartbeat is missed, and then abort.
    """
    try:
        main()
    except SystemExit as end:
        gone = isinstance(end.__context__, ConnectionError)
        if end.code == STOPPED or gone:
            sys.stderr.flush()
            os._exit(STOPPED if end.code == STOPPED else 2)
        raise
