"""``dynamo-jax analyze``: which experts matter on which dataset."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from dynamo_jax.commands.options import (
    HostsOption,
    JsonOption,
    KnownOption,
    ModelOption,
    ReportOption,
    WindowOption,
    check_json,
    float_folder,
    given_command,
    read_datasets,
)
from dynamo_jax.commands.several import one_job


def analyze(
    known: KnownOption,
    model: ModelOption = "tiny-moe",
    json: JsonOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each dataset to stream.")] = 32,
    window: WindowOption = 256,
    quantizer: Annotated[
        str,
        typer.Option(help="How experts are measured: rtn, by rounding; gptq, as quantize does, which takes longer."),
    ] = "rtn",
    report: ReportOption = None,
    hosts: HostsOption = "",
) -> None:
    """Show which experts matter on which dataset: routing, divergence, predicted loss at each width.

    For example: dynamo-jax analyze --model FOLDER --known wiki=WIKI.txt --known code=CODE.txt --report report.html

    quantize --analysis FILE writes the same of the planes that it makes, in its own pass.
    """
    from dynamo_jax.calibration.config import UNSEEN, QuantizeConfig
    from dynamo_jax.calibration.pipeline import analyze_folder
    from dynamo_jax.calibration.summary import analyses_json, summary
    from dynamo_jax.files import write_json
    from dynamo_jax.models.huggingface import load_config
    from dynamo_jax.progress import Clock
    from dynamo_jax.report.page import write_report
    from dynamo_jax.report.results import report_content
    from dynamo_jax.report.run import Run

    with one_job(hosts) as (processes, progress):
        texts, folder = read_datasets(known, [])["known"], float_folder(model)
        drawn = None if UNSEEN in texts else 0  # text is drawn for a plan, and none follows
        settings = QuantizeConfig(
            window=window, calibration_windows=windows, favour=1.0, quantizer=quantizer, unseen_windows=drawn
        )
        check_json(json if processes.first else None)
        check_json(report if processes.first else None, "--report")
        clock = Clock(progress)
        analyses = analyze_folder(folder, texts, settings, clock, hosts=processes)
        result = analyses_json(analyses, window)
    if not processes.first:
        return
    for line in summary(result):
        print(line)
    if json:
        write_json(json, result)
    if report:
        config = load_config(folder)
        grid = settings.channel_block, settings.group(config.hidden_size)
        of_model = f"--model {shlex.quote(model)}"
        after = {"A quantized model": f"dynamo-jax quantize {of_model} --known a=A.txt --bits 3.0 --out quantized"}
        run = Run(given_command(), clock.stages, next_steps=after)
        write_report(report, report_content(model, config, run, analyses=analyses, grid=grid))
