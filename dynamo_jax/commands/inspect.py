"""``dynamo-jax inspect``: what a model folder holds, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_jax.commands.console import print_facts
from dynamo_jax.commands.options import ModelOption


def inspect(
    model: ModelOption,
    check: Annotated[
        bool, typer.Option("--check", help="Read every file of a quantized model and compare it with its digest.")
    ] = False,
) -> None:
    """Show what a model folder holds, from headers alone: family, sizes, bytes, what is or would be quantized.

    For example: dynamo-jax inspect --model quantized --check
    """
    from dynamo_jax.models import huggingface
    from dynamo_jax.models.hub import model_folder
    from dynamo_jax.storage import checkpoint, facts

    folder = Path(model)
    if not checkpoint.is_checkpoint(folder):
        if check:
            raise ValueError(f"--check: {model} is not a quantized model, so it has no digests")
        print_facts(huggingface.describe(model_folder(model)))
        return
    described = facts.describe(folder)
    if check:
        described["checked"] = f"{checkpoint.check(folder):,} bytes are what was written"
    print_facts(described)
