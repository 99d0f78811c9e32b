"""``dynamo-jax lm-eval``: the command line of lm-evaluation-harness, with our models in it."""

from __future__ import annotations

import sys
from typing import Any

import typer

INSTALL = (
    "lm-evaluation-harness is not installed: pip install '.[eval]' in a checkout of dynamo_jax, or pip install lm-eval"
)
ANY = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm_eval, of lm-evaluation-harness, with the model dynamo_jax: all arguments are its own.

    For example: dynamo-jax lm-eval --model dynamo_jax --model_args model=FOLDER,variant=auto --tasks arc_easy
    """
    try:
        import lm_eval as _  # noqa: F401
    except ImportError:
        if {"--help", "-h"} & set(context.args):
            print(f"{context.get_help()}\n\n{INSTALL}, and --help then shows its own options.")
            return
        raise ValueError(INSTALL) from None
    from lm_eval import __main__ as harness

    import dynamo_jax.harness  # noqa: F401 (registers the model)

    arguments: list[Any] = ["lm_eval", *context.args]
    before, sys.argv = sys.argv, arguments
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before
