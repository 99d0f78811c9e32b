"""The command line: ``dynamo-jax demo | train | analyze | quantize | eval | bench | generate | serve | export |
inspect | plan-devices | lm-eval``.

Each command is a module of its own; here they are wired. Bad input is one line on standard error and exit code 2;
results go to standard output, progress to standard error. Heavy imports happen inside the commands, so that --help
is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from dynamo_jax import __version__
from dynamo_jax.commands import (
    analyze,
    bench,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    lm_eval,
    plan_devices,
    quantize,
    serve,
    train,
)
from dynamo_jax.commands.compiled import keep_compiled
from dynamo_jax.commands.stopping import STOPPED, Commands, run


def show_version(asked: bool) -> None:
    if asked:
        print(f"dynamo-jax {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
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
app.command()(bench.bench)
app.command()(generate.generate)
app.command(context_settings=serve.ANY)(serve.serve)
app.command()(export.export)
app.command()(inspect.inspect)
app.command()(plan_devices.plan_devices)
app.command(name="lm-eval", context_settings=lm_eval.ANY)(lm_eval.lm_eval)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    run(app)


def script() -> None:
    """``main`` as a process of its own, which ends at once where it was stopped, or is one of several and has failed.

    Python's own end would have XLA take down what it was compiling, which crashes (seen with jax 0.10.2), and JAX wait
    for the other processes, which wait for this one.
    """
    keep_compiled()
    try:
        main()
    except SystemExit as end:
        if end.code == STOPPED or (end.code and _one_of_several()):
            _end(end.code)
        raise
    except Exception:
        if _one_of_several():
            traceback.print_exc()
            _end(1)
        raise


def _one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _end(code: Any) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
