"""``dynamo-jax inspect``: what a model folder holds, from headers alone."""

from __future__ import annotations

from pathlib import Path

from dynamo_jax.commands.console import print_facts
from dynamo_jax.commands.options import ModelOption, model_folder


def inspect(model: ModelOption) -> None:
    """Show what a model folder holds, from headers alone: family, sizes, bytes, what is or would be quantized."""
    from dynamo_jax.models import huggingface
    from dynamo_jax.storage import checkpoint

    folder = Path(model)
    print_facts(
        checkpoint.describe(folder) if checkpoint.is_checkpoint(folder) else huggingface.describe(model_folder(model))
    )
