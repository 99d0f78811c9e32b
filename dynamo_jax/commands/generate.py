"""``dynamo-jax generate``: continue texts, with switching where it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamo_jax.commands.console import describe_event
from dynamo_jax.commands.options import BatchOption, HostsOption, ModelOption, ReadsOption
from dynamo_jax.commands.several import one_writes
from dynamo_jax.commands.stopping import stops_soon
from dynamo_jax.commands.talking import Speed, show, talk

if TYPE_CHECKING:
    from dynamo_jax.runtime.generate import GenerateConfig


def generate(
    prompt: Annotated[
        list[str], typer.Option(help="A text to continue, or a question to a chat model. Repeatable.")
    ] = [],  # noqa: B006 (typer copies it)
    prompt_file: Annotated[
        list[Path], typer.Option(help="A UTF-8 file whose text is a prompt; - for standard input. Repeatable.")
    ] = [],  # noqa: B006
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
    batch: BatchOption = 1,
    reads: ReadsOption = 1.0,
    mesh: Annotated[
        str, typer.Option(metavar="DATAxMODEL", help="Split a quantized model over all devices (docs/scale.md).")
    ] = "",
    hosts: HostsOption = "",
) -> None:
    """Continue a text; standard output gets the continuation alone, as it is made.

    Without a prompt: in a terminal a talk, line by line, which an empty line ends; else standard input is the prompt.
    For example: dynamo-jax generate --model quantized --prompt "Once upon a time". Standard error says how fast it was.

    Of several prompts, which run as one batch, the continuations come one after the other, a line between.

    With --adapt prompts run one after the other, as one client's; at the end standard error says what the monitor saw
    and what was switched. It takes 256 tokens, of prompts and continuations together, before it says anything.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype}: known are bfloat16, float32")
    prompts = read_prompts(prompt, prompt_file)
    if hosts and not mesh:
        raise ValueError("--hosts needs --mesh")
    from dynamo_jax.runtime.generate import GenerateConfig

    settings = GenerateConfig(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with stops_soon():
        with one_writes(hosts):
            _continue(prompts, model, settings, dtype, raw, adapt, batch, reads, mesh)


def read_prompts(texts: list[str], files: list[Path]) -> list[str]:
    """All prompts; none where there is to be a talk. ValueError: an empty one, or a file that cannot be read."""
    from dynamo_jax.texts.reading import read_file

    named = [("--prompt", text) for text in texts]
    if not texts and not files and not sys.stdin.isatty():
        files = [Path("-")]
    for path in files:
        named.append((f"--prompt-file {path}", sys.stdin.read() if str(path) == "-" else read_file(path)))
    if empty := [name for name, text in named if not text.strip("\n")]:
        raise ValueError(f"{empty[0]} is empty")
    return [text for _, text in named]


def _continue(
    prompts: list[str],
    model: str,
    settings: GenerateConfig,
    dtype: str,
    raw: bool,
    adapt: bool,
    batch: int,
    reads: float,
    mesh: str,
) -> None:
    import jax.numpy as jnp

    from dynamo_jax.generation import load_text_model, prompts_tokens, stream
    from dynamo_jax.models.hub import model_folder
    from dynamo_jax.runtime.hosts import first
    from dynamo_jax.runtime.mesh import mesh_of

    devices = mesh_of(mesh) if mesh else None
    loaded = load_text_model(model_folder(model), jnp.dtype(dtype), adapt, batch, reads, devices)
    if loaded.follower and (why := loaded.follower.model.knowledge.blind()):
        print(why, file=sys.stderr)
    speed = Speed()
    if not prompts:
        talk(loaded, settings, raw, speed)
    elif loaded.follower:  # one client's texts, one after the other
        prompts_tokens(loaded, prompts, not raw)
        for index, one in enumerate(prompts):
            print("\n" if index else "", end="")
            show(speed.timed(stream(loaded, [one], settings, not raw)))
        print()
    elif len(prompts) == 1:
        show(speed.timed(stream(loaded, prompts, settings, not raw)))
        print()
    else:
        texts = [""] * len(prompts)
        for pieces in speed.timed(stream(loaded, prompts, settings, not raw)):
            texts = [text + piece for text, piece in zip(texts, pieces)]
        print("\n".join(texts))
    for event in loaded.follower.events if loaded.follower and first() else ():
        print(describe_event(event), file=sys.stderr)
    if first() and speed.steps:
        print(speed.words(max(1, len(prompts)) if not loaded.follower else 1), file=sys.stderr)
