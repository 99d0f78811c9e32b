"""``dynamo-jax train``: a small decoder from several kinds of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[str, typer.Option(help="A preset, such as tiny_moe, or a TOML file like it.")],
    corpus: Annotated[Path, typer.Option(help="Folder with KIND.train.txt for each kind that the preset names.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an existing run continues at its newest checkpoint.")],
    start: Annotated[
        Path | None, typer.Option(help="Checkpoint folder whose weights and tokenizer a new run begins with.")
    ] = None,
) -> None:
    """Train a small mixture-of-experts decoder and write it as a Hugging Face folder, OUT/model.

    For example: dynamo-jax train --config tiny_moe --corpus corpus --out run (docs/training.md has the corpus)
    """
    from dynamo_jax.settings import find_preset, load_toml
    from dynamo_jax.training import TrainConfig
    from dynamo_jax.training import train as run

    settings = load_toml(TrainConfig, find_preset(config, "train"))
    print(f"model       {run(settings, corpus, out, log=lambda line: print(line, flush=True), start=start)}")
