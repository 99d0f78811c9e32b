"""``dynamo-jax export``: a quantized model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_jax.commands.console import say
from dynamo_jax.commands.options import OverwriteOption
from dynamo_jax.commands.steps import progress_bar


def export(
    model: Annotated[Path, typer.Option(help="A folder that quantize wrote.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write; missing or empty.")],
    source: Annotated[
        Path | None,
        typer.Option(
            help="The Hugging Face folder that was quantized: tensors that were not read, such as those of a vision "
            "tower or of layers that predict further tokens, are copied from it."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a quantized model as a Hugging Face folder with dequantized bfloat16 experts.

    For example: dynamo-jax export --model quantized --out hf-folder
    """
    from dynamo_jax.storage.export import export as run

    with progress_bar() as progress:
        run(model, out, progress, source=source, overwrite=overwrite, log=say)
    print(f"checkpoint  {out}")
