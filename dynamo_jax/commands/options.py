"""Options that several commands take, and what their values mean: model folders, NAME=FILE, NAME=NUMBER.

A mistake is a ``ValueError`` that names the option. Heavy imports happen inside the functions.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dynamo_jax.texts.tasks import Document

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="tiny-moe (bundled), a Hugging Face folder or name (org/name), or a folder that quantize wrote.",
    ),
]
KnownOption = Annotated[
    list[str],
    typer.Option(
        "--known",
        metavar="NAME=FILE",
        help="A dataset of calibration: UTF-8 text, .jsonl or .json (field text), or "
        "datasets:NAME[,CONFIG[,SPLIT]][:FIELD] of the datasets library, or demo:KIND of the demo's texts. "
        "Repeatable.",
    ),
]
NovelOption = Annotated[
    list[str], typer.Option("--novel", metavar="NAME=FILE", help="A dataset that calibration has not seen. Repeatable.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")]
BatchOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Requests that a step serves together; an adapted plan keeps to the baseline's bytes a step of these.",
    ),
]
ReadsOption = Annotated[float, typer.Option(help="How many times the baseline's bytes a step may read once adapted.")]
ReportOption = Annotated[
    Path | None, typer.Option("--report", help="Also write the results to this file as one HTML page.")
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an earlier result in --out, or give up an unfinished one. Other files stay."
    ),
]
HostsOption = Annotated[
    str,
    typer.Option(
        metavar="auto|ADDRESS:PORT,COUNT,NUMBER",
        help="This is one of several processes, which run the same command; the first writes (docs/scale.md).",
    ),
]
WindowOption = Annotated[int, typer.Option(min=8, help="Tokens a window.")]


def float_folder(model: str) -> Path:
    """The folder of a model that is not quantized."""
    from dynamo_jax.models.hub import model_folder
    from dynamo_jax.storage import checkpoint

    if checkpoint.is_checkpoint(Path(model)):
        raise ValueError(f"{model}: is quantized already; this command takes a Hugging Face folder or tiny-moe")
    return model_folder(model)


def load_float(model: str) -> Any:
    from dynamo_jax.models.huggingface import load_decoder
    from dynamo_jax.models.tokenizer import load_tokenizer

    folder = float_folder(model)
    decoder = load_decoder(folder)
    return decoder, load_tokenizer(folder)


def read_datasets(known: list[str], novel: list[str]) -> dict[str, dict[str, str]]:
    """The texts of all NAME=FILE arguments, read before any long work."""
    from dynamo_jax.texts.sources import read_source

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
            texts[kind][name] = read_source(path)
    return texts


def read_tasks(given: list[str], limit: int | None) -> dict[str, list[Document]]:
    """The documents of all NAME=FILE arguments and names of sets, read before any long work."""
    from dynamo_jax.texts.tasks import read_tasks as read

    return read(given, limit, where="--task ")


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


def check_json(path: Path | None, option: str = "--json") -> None:
    if path and path.is_dir():
        raise ValueError(f"{option} {path}: a folder; expected the name of a file to write")
    if path and path.exists() and not path.is_file():
        raise ValueError(f"{option} {path}: exists and is no regular file")
    if path and not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: no such folder {path.absolute().parent}")


def given_command() -> str:
    """The command line, as one would type it again."""
    return shlex.join(["dynamo-jax", *sys.argv[1:]])


def check_variants(names: list[str], known: Iterable[str], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"--variant {name}: {what} has {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def check_window(window: int, positions: int) -> None:
    if window > positions:
        raise ValueError(f"--window {window} is past the model's {positions} positions")
