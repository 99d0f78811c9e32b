"""How long a task takes here, and in lm-evaluation-harness's own model ``hf``, on the same two cores.

    pip install '.[eval]' accelerate
    python benchmarks/task_speed.py [--task hellaswag] [--documents 10042] [--json PATH]

Both get the same requests, log-likelihoods of each document's continuations, of the bundled model in float32. "dynamo"
is our model for the harness; what it compiles counts, and nothing compiled is kept from earlier runs. "hf" is the
harness's, by transformers and torch, with ``--batch-size`` sequences at a time (of 16, 64 and 256 the fastest on two
cores was taken for the default). A table of seconds, the ratio, and what both found right. Documents on which they
differ are those where two experts are all but equal for a token: together, sequences are summed in another order.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="hellaswag", help="a set that ``eval --task`` knows")
    parser.add_argument("--documents", type=int, help="the first so many; all by default")
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
            begun = time.perf_counter()
            found = model.loglikelihood(requests)
            seconds = time.perf_counter() - begun
            answers.append(right(found, documents))
            row = {"model": name, "task": arguments.task, "documents": len(documents), "requests": len(requests)}
            rows.append(row | {"seconds": seconds, "accuracy": float(answers[-1].mean())})
            print(f"{name:8s} {seconds:8.1f} s  accuracy {rows[-1]['accuracy']:.2%}", flush=True)
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    differ = int((answers[0] != answers[1]).sum())
    print(f"dynamo takes {ratio:.2f} of hf's time; of {len(documents)} documents {differ} come out otherwise")
    if arguments.json:
        write_json(arguments.json, {"results": rows, "ratio": ratio, "differ": differ})


if __name__ == "__main__":
    main()
