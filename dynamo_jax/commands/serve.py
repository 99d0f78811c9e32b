"""``dynamo-jax serve``: an OpenAI server of an engine that others make, with a quantized model in it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

ENGINES = {"sglang": "sgl_jax", "vllm": "tpu_inference"}  # and the package that each needs
INSTALL = {
    "sglang": (
        "sglang-jax is not installed: pip install '.[sglang]' in a checkout of dynamo_jax, or pip install "
        "sglang-jax==0.1.0rc0; it needs Python 3.12"
    ),
    "vllm": "vLLM's backend for TPUs is not installed: pip install vllm-tpu==0.26.0",
}
ANY = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A folder that quantize wrote.")],
    engine: Annotated[str, typer.Option(help="sglang (sglang-jax 0.1.0rc0) or vllm (vllm-tpu 0.26.0).")] = "sglang",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the server.")] = 30000,
    host: Annotated[str, typer.Option(help="The address that it listens on.")] = "127.0.0.1",
    variant: Annotated[
        list[str],
        typer.Option(
            metavar="FOLDER",
            help="The same model quantized at other widths, whose plan is variant 1, then 2, and so on. Repeatable.",
        ),
    ] = [],  # noqa: B006 (typer copies it)
    adapt: Annotated[
        bool,
        typer.Option(help="Adapt one more variant to the texts of requests that name none, and switch them to it."),
    ] = True,
    monitor: Annotated[
        bool, typer.Option(help="Watch what is routed of each request; without that nothing adapts.")
    ] = True,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that a step is taken to serve, in the limit of adaptation; by default all."),
    ] = None,
    reads: Annotated[
        float, typer.Option(help="How many times the bytes of the baseline a step may read at the adapted variant.")
    ] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests that run together at most.")] = 32,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Serve a quantized model to OpenAI clients, with an engine's batching and paged attention.

    For example: dynamo-jax serve --model quantized --engine sglang --port 30000

    Options that are not below are the engine's own, such as --mem-fraction-static 0.8 or --context-length 4096.

    A request runs at the variant that its body names: "extra_key": "variant=0" of sglang, "vllm_xargs": {"variant": 0}
    of vllm is the plan of the model, 1 that of the first --variant. With sglang, one that names none begins at the
    plan of the model, and its monitor decides; vllm adapts nothing yet.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: known are {', '.join(ENGINES)}")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype}: known are bfloat16, float32")
    if engine == "vllm" and (batch is not None or reads != 1.0):
        raise ValueError("--batch and --reads are limits of adaptation, and with vllm nothing is adapted yet")
    if importlib.util.find_spec(ENGINES[engine]) is None:
        raise ValueError(INSTALL[engine])
    from dynamo_jax.engines.variants import variants_of
    from dynamo_jax.runtime.adapt import check_limit

    folders = [str(Path(folder).absolute()) for folder in (model, *variant)]
    variants_of(folders[0], folders[1:])
    check_limit(batch or 1, reads)
    theirs = ["--host", host, "--port", str(port), "--dtype", dtype]
    if engine == "vllm":
        from dynamo_jax.engines.vllm import arguments

        theirs += ["--max-num-seqs", str(requests), "--served-model-name", model]
        program = [sys.executable, *arguments(folders[0], folders[1:], [*theirs, *context.args])]
    else:
        own = [folders[0], *(word for folder in folders[1:] for word in ("--variant", folder)), "--reads", str(reads)]
        own += ["--batch", str(batch)] if batch else []
        own += [f"--no-{name}" for name, given in (("adapt", adapt), ("monitor", monitor)) if not given]
        theirs += ["--max-running-requests", str(requests)]
        program = [sys.executable, "-m", "dynamo_jax.engines.sglang_server", *own, "--", *theirs, *context.args]
    sys.stdout.flush()
    os.execv(program[0], program)  # the engine's own process, which gets the signals
