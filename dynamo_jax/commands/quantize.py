"""``dynamo-jax quantize``: calibrate, allocate under a budget, write the quantized model."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamo_jax.commands.console import print_facts, say
from dynamo_jax.commands.options import (
    HostsOption,
    KnownOption,
    ModelOption,
    OverwriteOption,
    ReportOption,
    WindowOption,
    check_json,
    float_folder,
    given_command,
    read_datasets,
    read_weights,
)
from dynamo_jax.commands.several import one_job

if TYPE_CHECKING:
    from dynamo_jax.calibration.estimate import Estimate


def quantize(
    known: KnownOption,
    out: Annotated[Path, typer.Option(help="Folder to write the quantized model to.")],
    model: ModelOption = "tiny-moe",
    bits: Annotated[
        float | None,
        typer.Option(
            help="Budget: bits a weight that the device holds for the experts when it serves, scales and spare slots "
            "included; 3.0 by default."
        ),
    ] = None,
    budget_bytes: Annotated[
        int | None, typer.Option("--bytes", help="Budget: bytes that the device holds for the experts.")
    ] = None,
    fits_gib: Annotated[
        float | None, typer.Option(help="Budget: GiB of the device for the whole model, the reserve included.")
    ] = None,
    reserve_gib: Annotated[
        float | None,
        typer.Option(
            help="GiB of --fits-gib for the key/value cache, activations and measuring text; a tenth of it by default."
        ),
    ] = None,
    spare: Annotated[
        float,
        typer.Option(
            help="Slots for precision that moves to novel text while other requests need the baseline, as a share of "
            "its pages; the budget counts them. Where no request does, its own slots serve."
        ),
    ] = 0.05,
    max_width: Annotated[
        int, typer.Option(help="2, 3, 4 or 8: planes of more bits are left out, on disk and in host memory.")
    ] = 8,
    weight: Annotated[
        list[str],
        typer.Option(metavar="NAME=NUMBER", help="What a known dataset counts for in the sum; 1 if not given."),
    ] = [],  # noqa: B006
    objective: Annotated[
        str, typer.Option(help="sum: the loss over all known datasets; worst: that of the one which loses most.")
    ] = "sum",
    novelty_weight: Annotated[
        float,
        typer.Option(
            help="The share of the text to come, 0 to 1, that may be like none of the known datasets: the plan gives "
            "experts that they hardly use more bits for it. 0: the known datasets alone decide."
        ),
    ] = 0.25,
    unseen_windows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Calibration windows of text that stands for that share: the model draws it, unless --known "
            "unseen=FILE gives some. By default as many as of the known datasets together, and none of a model of more "
            "than 4 GiB, which memory need not hold. 0: none.",
        ),
    ] = None,
    per_projection: Annotated[
        bool,
        typer.Option(
            "--per-projection/--per-expert", help="Two widths for each expert, of gate and up and of down; or one."
        ),
    ] = True,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; by default the largest of 128, 64, .. that fits.")
    ] = None,
    channel_block: Annotated[
        int,
        typer.Option(
            help="Channels that share a width. The kernels of TPUs and Hopper GPUs need 128, and a group size of "
            "128 or a multiple; where either does not divide the model's sizes, experts are filled up."
        ),
    ] = 16,
    rest: Annotated[
        int,
        typer.Option(
            help="16, 8 or 4: bits of attention, shared experts, dense layers, embeddings and head, all of which every "
            "token reads; 16: they keep their dtype."
        ),
    ] = 16,
    quantizer: Annotated[
        str, typer.Option(help="gptq: error feedback from calibration inputs; rtn: rounding, ten times faster.")
    ] = "gptq",
    analysis: Annotated[
        Path | None, typer.Option(help="Also write to this file what analyze --json would: which experts matter where.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows a dataset.")] = 32,
    distil: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            min=0,
            help="Train codes and scales on so many tokens, half of the known datasets and half of text that "
            "the model draws itself (none of it with --novelty-weight 0), until the quantized model predicts what the "
            "unquantized one does; 0: not. The whole model must fit memory.",
        ),
    ] = 0,
    window: WindowOption = 256,
    report: ReportOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, in bytes and time, and do nothing.")
    ] = False,
    overwrite: OverwriteOption = False,
    hosts: HostsOption = "",
) -> None:
    """Calibrate on the known datasets, choose the experts' widths under the budget, and write the model.

    For example: dynamo-jax quantize --model FOLDER --known wiki=WIKI.txt --known code=CODE.txt --bits 3.0 --out OUT

    One layer's weights are in memory at a time. A run that was stopped goes on when it is called again, with as many
    processes as you like.
    """
    from dynamo_jax.calibration.analyses import Analysis
    from dynamo_jax.calibration.config import QuantizeConfig
    from dynamo_jax.calibration.estimate import estimate
    from dynamo_jax.calibration.pipeline import quantize_folder
    from dynamo_jax.calibration.summary import analyses_json
    from dynamo_jax.files import write_json
    from dynamo_jax.progress import Clock
    from dynamo_jax.report.page import write_report
    from dynamo_jax.report.results import next_steps, report_content
    from dynamo_jax.report.run import Run
    from dynamo_jax.storage import checkpoint, facts

    settings = QuantizeConfig(
        bits=bits,
        budget_bytes=budget_bytes,
        fits_gib=fits_gib,
        reserve_gib=reserve_gib,
        spare=spare,
        max_width=max_width,
        objective=objective,
        weights=read_weights(weight) or None,
        novelty_weight=novelty_weight,
        unseen_windows=unseen_windows,
        per_projection=per_projection,
        group_size=group_size,
        channel_block=channel_block,
        rest=rest,
        quantizer=quantizer,
        window=window,
        calibration_windows=windows,
        distil=distil,
    )
    if dry_run:
        texts, folder = read_datasets(known, [])["known"], float_folder(model)
        print_facts(expected(estimate(folder, texts, settings), out, distil))
        return
    begin = time.monotonic()
    with one_job(hosts) as (processes, progress):
        texts, folder = read_datasets(known, [])["known"], float_folder(model)
        check_json(analysis if processes.first else None, "--analysis")
        check_json(report if processes.first else None, "--report")
        clock, analyses = Clock(progress), dict[str, Analysis]()

        def found(of: dict[str, Analysis]) -> None:
            if report:
                analyses.update(of)
            if analysis:
                write_json(analysis, analyses_json({name: of[name] for name in texts}, window))

        quantize_folder(folder, out, texts, settings, clock, overwrite=overwrite, log=say, found=found, hosts=processes)
    if not processes.first:
        return
    if report:
        description = checkpoint.read_description(out)
        content = report_content(
            model,
            description.config,
            Run(given_command(), clock.stages, facts.memory(out), next_steps(out)),
            plan=description.plan,
            knowledge=checkpoint.knowledge_of(description),
            spare=description.meta.spare,
            analyses=analyses,
        )
        write_report(report, content)
    if analysis and not analysis.exists():
        say(f"--analysis {analysis}: {out} was done already; dynamo-jax analyze measures without making it anew")
    print_facts(facts.summary(out))
    print_facts({"time": f"{time.monotonic() - begin:,.0f} seconds", "checkpoint": str(out)})
    print(f"next: dynamo-jax generate --model {shlex.quote(str(out))} --prompt TEXT, or eval with the texts given here")


def expected(found: Estimate, out: Path, distil: int = 0) -> dict[str, str]:
    """What it would take, in words."""
    from dynamo_jax.calibration.estimate import ENOUGH_ROWS
    from dynamo_jax.storage.facts import bytes_words

    few = f", fewer than the {ENOUGH_ROWS} that its own inputs need; more --windows reach more"
    free = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.is_dir())).free
    more = [f"{what} {n:,}" for what, n in (("drawing", found.drawn), ("training on", distil)) if n]
    hours, minutes = divmod(round(found.seconds / 60), 60)
    return {
        "size": f"{bytes_words(found.before)} before; {bytes_words(found.device)} for the experts and "
        f"{bytes_words(found.others)} for all else on the device",
        "host": f"{bytes_words(found.host)} in host memory when it serves",
        "disk": f"{bytes_words(found.result)} for the result, up to {bytes_words(found.work)} in {out} while it works; "
        f"{bytes_words(free)} are free" + (": too few" if free < found.work else ""),
        "calibration": f"{found.tokens:,} tokens, {found.rows:,.0f} for an expert on the mean"
        + (few if found.rows < ENOUGH_ROWS else ""),
        "time": (
            f"about {f'{hours} h ' if hours else ''}{minutes} min on this machine"
            if found.seconds >= 90
            else f"about {found.seconds:.0f} s on this machine"
        )
        + "".join(f", and as long as {words} tokens takes" for words in more),
    }
