"""``dynamo-jax eval``: perplexity, bits and bytes for each dataset and variant, accuracy for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_jax.commands.console import describe_event, describe_verdict, print_divergences, print_rows, print_tasks
from dynamo_jax.commands.options import (
    BatchOption,
    JsonOption,
    KnownOption,
    ModelOption,
    NovelOption,
    ReadsOption,
    ReportOption,
    WindowOption,
    check_json,
    check_variants,
    check_window,
    float_folder,
    given_command,
    load_float,
    read_datasets,
    read_tasks,
)
from dynamo_jax.commands.steps import progress_bar


def evaluate(
    model: ModelOption,
    known: KnownOption = [],  # noqa: B006 (typer copies it)
    novel: NovelOption = [],  # noqa: B006
    variant: Annotated[
        list[str], typer.Option(help="baseline, auto; of an unquantized model bf16, rtn4, rtn3, rtn2. Repeatable.")
    ] = [],  # noqa: B006
    reference: Annotated[
        str | None,
        typer.Option(
            help="A model of the same vocabulary, such as the unquantized one: its row comes first, and rows of texts "
            "say how far predictions are from its. For texts it is read a layer at a time, for tasks it must fit "
            "memory."
        ),
    ] = None,
    reference_logits: Annotated[
        Path | None,
        typer.Option(help="File of what the reference predicts: written if it is missing, else read in its place."),
    ] = None,
    task: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE|SET",
            help="A zero-shot task: JSON lines of context, continuations and label, or hellaswag, arc_easy, "
            "arc_challenge, piqa, boolq, sciq, csqa, socialiqa, medmcqa, lambada. Repeatable.",
        ),
    ] = [],  # noqa: B006
    documents: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    json: JsonOption = None,
    window: WindowOption = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of each dataset at most.")] = None,
    batch: BatchOption = 1,
    reads: ReadsOption = 1.0,
    report: ReportOption = None,
) -> None:
    """Perplexity, bits a weight on the device and bytes read a token, for each dataset and variant; accuracy on tasks.

    For example: dynamo-jax eval --model quantized --novel mine=MINE.txt --reference FOLDER --report report.html

    The first windows of a dataset are what the monitor and adaptation see; rows count the rest. A task's documents are
    followed in their order, as one client's text (variant auto).
    """
    from dynamo_jax.evaluation.evaluate import evaluate as run
    from dynamo_jax.evaluation.evaluate import evaluate_tasks
    from dynamo_jax.evaluation.perplexity import EvalConfig
    from dynamo_jax.evaluation.switched import VARIANTS
    from dynamo_jax.evaluation.uniform import UNIFORM
    from dynamo_jax.files import write_json
    from dynamo_jax.models.chat import prefix_token
    from dynamo_jax.models.hub import model_folder
    from dynamo_jax.models.huggingface import Source, side_files
    from dynamo_jax.progress import Clock
    from dynamo_jax.report.page import write_report
    from dynamo_jax.report.results import next_steps, report_content
    from dynamo_jax.report.run import Run
    from dynamo_jax.runtime.quantized import QuantizedModel
    from dynamo_jax.storage import checkpoint, facts

    texts, tasks = read_datasets(known, novel), read_tasks(task, documents)
    check_json(json)
    check_json(report, "--report")
    if not (known or novel or tasks):
        raise ValueError("nothing to evaluate: give --known NAME=FILE, --novel NAME=FILE or --task NAME=FILE")
    loaded: Any
    if checkpoint.is_checkpoint(Path(model)):
        loaded, tokenizer = checkpoint.load(Path(model)), None
        files = loaded.files
        names = check_variants(variant, VARIANTS, "a quantized model")
    else:
        loaded, tokenizer = load_float(model)
        files = side_files(model_folder(model))
        names = check_variants(variant, UNIFORM, "an unquantized model")
    check_window(window, loaded.config.max_position_embeddings)
    if reference_logits and tasks and not (known or novel):
        raise ValueError(f"--reference-logits {reference_logits}: of texts, and no text is evaluated")
    settings = EvalConfig(window=window, limit=limit, batch=batch, reads=reads)
    common: Any = {"config": settings, "variants": names, "tokenizer": tokenizer}
    results: dict[str, Any] = {"results": []}
    told: dict[str, Any] = {}
    with progress_bar() as bars:
        progress = Clock(bars)
        if known or novel:
            source = Source(float_folder(reference)) if reference else None
            beside: Any = {"reference": source, "reference_logits": reference_logits}
            rows, adaptations = run(loaded, texts["known"], texts["novel"], **common, **beside, progress=progress)
        if tasks:
            original: Any = load_float(reference)[0] if reference else None
            common |= {"reference": original, "prefix": prefix_token(files)}
            task_rows, events = evaluate_tasks(loaded, tasks, **common, progress=progress)
    if known or novel:
        print_rows(rows)
        if adaptations and (why := loaded.knowledge.blind()):
            print(why)
        for name, found in adaptations.items():
            print(f"{name}: {describe_verdict(found)}")
        results["results"] = [row.to_dict() for row in rows]
        told |= {"rows": rows, "adaptations": adaptations}
        print_divergences(rows)
    if tasks:
        print_tasks(task_rows)
        words = {name: [describe_event(event) for event in seen] for name, seen in events.items()}
        for name, lines in words.items():
            for line in lines:
                print(f"{name}: {line}")
        results["tasks"] = [row.to_dict() for row in task_rows]
        results["events"] = {name: [event._asdict() for event in seen] for name, seen in events.items()}
        told |= {"tasks": task_rows, "events": words}
    if json:
        write_json(json, results)
    if report:
        memory, after = {}, {}
        if isinstance(loaded, QuantizedModel):
            memory, after = facts.memory(Path(model)), next_steps(Path(model))
            told |= {"plan": loaded.plan, "knowledge": loaded.knowledge, "spare": loaded.spare}
        run_of = Run(given_command(), progress.stages, memory, after)
        write_report(report, report_content(model, loaded.config, run_of, **told))
