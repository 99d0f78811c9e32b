"""``dynamo-jax analyze``: which experts matter on which dataset."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_jax.commands.options import (
    JsonOption,
    KnownOption,
    ModelOption,
    WindowOption,
    check_json,
    float_folder,
    read_datasets,
)
from dynamo_jax.commands.steps import progress_bar


def analyze(
    known: KnownOption,
    model: ModelOption = "tiny-moe",
    json: JsonOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each dataset to stream.")] = 32,
    window: WindowOption = 256,
) -> None:
    """Show which experts matter on which dataset: routing, divergence, predicted loss at each width."""
    from dynamo_jax.calibration.config import QuantizeConfig
    from dynamo_jax.calibration.pipeline import analyze_folder
    from dynamo_jax.calibration.summary import analyses_json, summary
    from dynamo_jax.files import write_json

    texts = read_datasets(known, [])
    check_json(json)
    folder = float_folder(model)
    settings = QuantizeConfig(window=window, calibration_windows=windows, favour=1.0)  # no plan is made
    with progress_bar() as progress:
        result = analyses_json(analyze_folder(folder, texts["known"], settings, progress), window)
    for line in summary(result):
        print(line)
    if json:
        write_json(json, result)
