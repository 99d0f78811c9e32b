"""``dynamo-jax eval``: perplexity, bits and bytes, for each dataset and variant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_jax.commands.console import describe_verdict, print_rows, progress_bar
from dynamo_jax.commands.options import (
    JsonOption,
    KnownOption,
    ModelOption,
    NovelOption,
    WindowOption,
    check_json,
    check_variants,
    check_window,
    load_float,
    read_datasets,
)


def evaluate(
    model: ModelOption,
    known: KnownOption = [],  # noqa: B006 (typer copies it)
    novel: NovelOption = [],  # noqa: B006
    variant: Annotated[
        list[str], typer.Option(help="baseline, auto; of an unquantized model bf16, rtn4, rtn3, rtn2. Repeatable.")
    ] = [],  # noqa: B006
    json: JsonOption = None,
    window: WindowOption = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of each dataset at most.")] = None,
) -> None:
    """Perplexity, bits a weight and bytes read a token, for each dataset and variant.

    The first windows of a dataset are what the monitor and adaptation see; rows count the rest.
    """
    from dynamo_jax.evaluation import perplexity as job
    from dynamo_jax.storage import checkpoint
    from dynamo_jax.texts.reading import write_json

    texts = read_datasets(known, novel)
    check_json(json)
    if not (known or novel):
        raise ValueError("nothing to evaluate: give --known NAME=FILE or --novel NAME=FILE")
    settings = job.EvalConfig(window=window, limit=limit)
    kinds = [(name, kind, text) for kind, named in texts.items() for name, text in named.items()]
    if checkpoint.is_checkpoint(Path(model)):
        quantized = checkpoint.load(Path(model))
        names = check_variants(variant or ["baseline", "auto"], ["baseline", "auto"], "a quantized model")
        check_window(window, quantized.config.max_position_embeddings)
        data = [
            job.make_dataset(n, k, t, quantized.tokenizer, settings, job.calibrated_windows(quantized, n, t, settings))
            for n, k, t in kinds
        ]
        with progress_bar() as progress:
            rows, adaptations = job.evaluate_quantized(quantized, data, settings, names, progress=progress)
    else:
        decoder, tokenizer = load_float(model)
        names = check_variants(variant or ["bf16"], list(job.UNIFORM), "an unquantized model")
        check_window(window, decoder.config.max_position_embeddings)
        data = [job.make_dataset(n, k, t, tokenizer, settings) for n, k, t in kinds]
        with progress_bar() as progress:
            rows, _ = job.evaluate_uniform(decoder, data, settings, names=names, progress=progress)
        adaptations = {}
    print_rows(rows)
    for name, found in adaptations.items():
        print(f"{name}: {describe_verdict(found)}")
    if json:
        write_json(json, {"results": [row.to_dict() for row in rows]})
