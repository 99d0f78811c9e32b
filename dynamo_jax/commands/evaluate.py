"""``dynamo-jax eval``: perplexity, bits and bytes, for each dataset and variant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_jax.commands.console import describe_verdict, print_divergences, print_rows
from dynamo_jax.commands.options import (
    BatchOption,
    JsonOption,
    KnownOption,
    ModelOption,
    NovelOption,
    ReadsOption,
    WindowOption,
    check_json,
    check_variants,
    check_window,
    load_float,
    read_datasets,
)
from dynamo_jax.commands.steps import progress_bar


def evaluate(
    model: ModelOption,
    known: KnownOption = [],  # noqa: B006 (typer copies it)
    novel: NovelOption = [],  # noqa: B006
    variant: Annotated[
        list[str], typer.Option(help="baseline, auto; of an unquantized model bf16, rtn4, rtn3, rtn2. Repeatable.")
    ] = [],  # noqa: B006
    against: Annotated[
        str | None,
        typer.Option(help="The unquantized model: show it beside the quantized one, and how far they differ."),
    ] = None,
    json: JsonOption = None,
    window: WindowOption = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of each dataset at most.")] = None,
    batch: BatchOption = 1,
    reads: ReadsOption = 1.0,
) -> None:
    """Perplexity, bits a weight on the device and bytes read a token, for each dataset and variant.

    The first windows of a dataset are what the monitor and adaptation see; rows count the rest.
    """
    from dynamo_jax.evaluation.divergence import divergence
    from dynamo_jax.evaluation.evaluate import evaluate as run
    from dynamo_jax.evaluation.perplexity import EvalConfig
    from dynamo_jax.evaluation.switched import VARIANTS
    from dynamo_jax.evaluation.uniform import UNIFORM
    from dynamo_jax.files import write_json
    from dynamo_jax.storage import checkpoint

    texts = read_datasets(known, novel)
    check_json(json)
    if not (known or novel):
        raise ValueError("nothing to evaluate: give --known NAME=FILE or --novel NAME=FILE")
    loaded: Any
    if checkpoint.is_checkpoint(Path(model)):
        loaded, tokenizer = checkpoint.load(Path(model)), None
        names = check_variants(variant, VARIANTS, "a quantized model")
        original: Any = load_float(against)[0] if against else None
    elif against:
        raise ValueError(f"--against {against}: {model} is not quantized")
    else:
        original = None
        loaded, tokenizer = load_float(model)
        names = check_variants(variant, UNIFORM, "an unquantized model")
    check_window(window, loaded.config.max_position_embeddings)
    settings = EvalConfig(window=window, limit=limit, batch=batch, reads=reads)
    with progress_bar() as progress:
        rows, adaptations = run(
            loaded, **texts, config=settings, variants=names, tokenizer=tokenizer, against=original, progress=progress
        )
        if against:
            apart = divergence(original, loaded, texts["known"] | texts["novel"], settings, progress)
    print_rows(rows)
    if adaptations and (why := loaded.knowledge.blind()):
        print(why)
    for name, found in adaptations.items():
        print(f"{name}: {describe_verdict(found)}")
    results = {"results": [row.to_dict() for row in rows]}
    if against:
        print_divergences(apart)
        results["divergence"] = [row.to_dict() for row in apart]
    if json:
        write_json(json, results)
