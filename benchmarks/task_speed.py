"""How long a task takes here, and in lm-evaluation-harness's own model ``hf``, on the same two cores.

    pip install '.[eval]' accelerate
    python benchmarks/task_speed.py [--task hellaswag] [--documents 300] [--json PATH]

Both get the same requests, log-likelihoods of each document's continuations, of the bundled model in float32, twice.
"dynamo" is our model for the harness. What it compiles counts the first time, and nothing compiled is kept from earlier
runs. "hf" is the harness's, by transformers and torch, with ``--batch-size`` sequences at a time: of 16, 64 and 256 the
fastest on two cores. A table of seconds, the ratios, and what both found right. Documents on which they differ are
those where two experts are all but equal for a token: together, sequences are summed in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dynamo_jax.files import write_json
from dynamo_jax.harness import DynamoJax
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.texts.tasks import Document, read_set

END = "<|endoftext|>"


def theirs(folder: Path, batch: int) -> HFLM:
    """The bundled model as transformers loads it."""
    for file in BUNDLED.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch, max_length=256)


def right(found: list[tuple[float, bool]], documents: list[Document]) -> np.ndarray:
    """Of each document, whether its right continuation is the likeliest."""
    left = iter(found)
    return np.array([int(np.argmax([next(left)[0] for _ in d.continuations])) == d.label for d in documents])


def timed(model: Any, requests: list[Instance]) -> tuple[list[tuple[float, bool]], float]:
    begun = time.perf_counter()
    return model.loglikelihood(requests), time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="hellaswag", help="a set that ``eval --task`` knows")
    parser.add_argument("--documents", type=int, default=300, help="the first so many")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences at a time, of hf")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    documents = read_set(arguments.task, limit=arguments.documents)
    torch.set_num_threads(os.cpu_count() or 1)
    rows: list[dict[str, Any]] = []
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"hf": theirs(Path(folder), arguments.batch_size), "dynamo": DynamoJax("tiny-moe")}
        for name, model in models.items():
            asked = [(d.context, c) for d in documents for c in d.continuations]
            requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
            (found, first), (_, again) = (timed(model, requests) for _ in range(2))
            answers.append(right(found, documents))
            row = {"model": name, "task": arguments.task, "documents": len(documents), "requests": len(requests)}
            rows.append(row | {"first": first, "again": again, "accuracy": float(answers[-1].mean())})
            print(f"{name:8s} {first:8.1f} s, then {again:8.1f} s  accuracy {rows[-1]['accuracy']:.2%}", flush=True)
    ratios = {turn: rows[1][turn] / rows[0][turn] for turn in ("first", "again")}
    differ = int((answers[0] != answers[1]).sum())
    print(f"dynamo takes {ratios['first']:.2f} of hf's time, then {ratios['again']:.2f}; {differ} documents differ")
    if arguments.json:
        write_json(arguments.json, {"results": rows, "ratios": ratios, "differ": differ})


if __name__ == "__main__":
    main()
