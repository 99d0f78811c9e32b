"""Zero-shot tasks: how often a model is right, before and after quantization, with paired standard errors.

    python examples/tasks.py --model quantized --reference FOLDER --rows ROWS.jsonl

A line of ROWS.jsonl is {"context": "..", "continuations": ["..", ".."], "label": 0}. Without arguments: four rows on
the bundled model, experts in bfloat16 and rounded to 2 bits.
"""

from __future__ import annotations

import argparse

import dynamo_jax as dj

ROWS = [
    dj.Document("The capital of France is", (" Paris", " bread"), 0),
    dj.Document("def add(a, b):\n    return", (" once upon a time", " a + b"), 1),
    dj.Document("One, two, three,", (" four", " blue"), 0),
    dj.Document("She opened the door and", (" went in", " def main"), 0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder that quantize wrote")
    parser.add_argument("--reference", default=dj.BUNDLED, help="the model that it was made from")
    parser.add_argument("--rows", help="a file of documents")
    given = parser.parse_args()

    tasks = {"mine": dj.read_task(given.rows) if given.rows else ROWS}
    original, tokenizer = dj.load_decoder(given.reference), dj.load_tokenizer(given.reference)
    if given.model:
        rows, events = dj.evaluate_tasks(dj.load(given.model), tasks, reference=original)
    else:
        rows, events = dj.evaluate_tasks(original, tasks, tokenizer=tokenizer, variants=("bf16", "rtn2"), prefix=0)
    for row in rows:
        change = "" if row.difference is None else f"  {row.difference:+.1%} to {row.reference}"
        print(f"{row.task}: {row.variant:10} {row.accuracy:.1%} of {row.documents} documents{change}")
    for task, seen in events.items():
        print(f"{task}: the run time switched {sum(event.what in ('adapted', 'gains') for event in seen)} time(s)")


if __name__ == "__main__":
    main()
