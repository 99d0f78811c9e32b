"""Build the text corpus that the bundled model is trained on.

Purpose: one folder with NAME.train.txt and NAME.heldout.txt for each kind of text, none of it text that
the demo evaluates on. Sources: the packages that lie under --raw (docs/training.md lists the commands),
the running Python's own library, and public files given as NAME=FILE (+NAME=FILE: for training only).
The held-out part is whole documents of a kind, never seen in training. What training text has in common
with held-out or evaluated text (100 bytes or more, white space aside) is cut out of the training text;
--check then looks for 50 random stretches of 200 characters of each evaluated text in all training text.

    python benchmarks/training_corpus.py --raw raw/ --out corpus/ --leave-out wikitext2-valid.txt \
        --text encyclopedic=wikitext2-train.txt --text web=c4.jsonl --text arithmetic=gsm8k.txt
    python benchmarks/training_corpus.py --raw raw/ --out corpus/ --leave-out wikitext2-valid.txt --check
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from corpus_sources import (
    LANGUAGES,
    code_kinds,
    file_documents,
    first_documents,
    language_documents,
    python_library,
    question_documents,
    text_kinds,
)

from dynamo_jax.texts.demo import KINDS, TEXT_BYTES, collect

TRAIN_BYTES = 12_000_000
HELDOUT_BYTES = 160_000
# Twice what the demo evaluates on; where a set is also trained on, its first half at least is left out.
EVALUATED_BYTES = 2 * TEXT_BYTES
GRAM = 100  # bytes; every stretch of 200 characters holds one that begins at a multiple of GRAM
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Kinds = dict[str, tuple[list[str], list[str]]]  # kind -> documents to hold out from, documents for training only


def gather(raw: Path, texts: Iterable[str]) -> Kinds:
    kinds: Kinds = {name: (documents, []) for name, documents in first_documents(raw).items()}
    for kind in LANGUAGES:
        manuals, more = language_documents(raw, kind)
        first = kind in ("german", "french", "spanish")
        kinds[kind] = (manuals, more) if first else (manuals + more, [])
    for made in (code_kinds(raw), text_kinds(raw)):
        for kind, documents in made.items():
            kinds.setdefault(kind, ([], []))[0].extend(documents)
    # The first weights have seen most of Python's library: what is held out comes from other packages.
    kinds["python"][1].extend(python_library())
    for item in texts:
        name, _, path = item.partition("=")
        more = name.startswith("+")  # "+web=FILE": for training only
        kinds.setdefault(name.removeprefix("+"), ([], []))[more].extend(file_documents(Path(path)))
    for kind, documents in question_documents(raw).items():
        kinds.setdefault(kind, ([], []))[kind in ("encyclopedic",)].extend(documents)
    return kinds


def normal(text: str) -> bytes:
    return " ".join(text.split()).encode()


def hashes(data: bytes) -> np.ndarray:
    """Of each GRAM bytes that follow one another, at every offset: a polynomial hash modulo 2**64."""
    values = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)
    if len(values) < GRAM:
        return np.empty(0, np.uint64)
    out = np.zeros(len(values) - GRAM + 1, np.uint64)
    for i in range(GRAM):  # GRAM passes over the text, each one vectorised
        out = out * MULTIPLIER + values[i : i + len(out)]
    return out


def evaluated_texts(leave_out: Iterable[Path]) -> dict[str, str]:
    found = {f"demo {n}": collect(parts(None), EVALUATED_BYTES) for n, parts in KINDS.items()}
    return found | {p.name: p.read_text(errors="ignore") for p in leave_out}


def without(document: str, left_out: np.ndarray) -> str:
    """The document less its lines that hold text of ``left_out`` (sorted hashes); empty if that is much of it."""
    before = len(document)
    for _ in range(8):
        lines = document.split("\n")
        words = [" ".join(line.split()).encode() for line in lines]
        ends = np.cumsum([len(w) + bool(w) for w in words])
        joined = b" ".join(w for w in words if w)
        blocks = len(joined) // GRAM
        if not blocks:
            return document
        found = hashes_of_blocks(joined, blocks)
        place = np.searchsorted(left_out, found)
        hit = np.flatnonzero(left_out[np.minimum(place, len(left_out) - 1)] == found)
        if not len(hit):
            return document if len(document) > before / 2 else ""
        first = np.searchsorted(ends, hit * GRAM, side="right")
        last = np.searchsorted(ends, hit * GRAM + GRAM - 1, side="right")
        gone = {i for a, b in zip(first, last) for i in range(a, b + 1)}
        document = "\n".join(line for i, line in enumerate(lines) if i not in gone)
    return ""


def hashes_of_blocks(data: bytes, blocks: int) -> np.ndarray:
    values = np.frombuffer(data[: blocks * GRAM], np.uint8).astype(np.uint64).reshape(blocks, GRAM) + np.uint64(1)
    out = np.zeros(blocks, np.uint64)
    for i in range(GRAM):
        out = out * MULTIPLIER + values[:, i]
    return out


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Shuffle whole documents (seed 0); the last ones are held out."""
    documents = [d.strip() for d in documents if d.strip()]
    random.Random(0).shuffle(documents)
    share = min(HELDOUT_BYTES, sum(len(d.encode()) for d in documents) // 10)
    heldout: list[str] = []
    while sum(len(d.encode()) for d in heldout) < share:
        heldout.append(documents.pop()[: share // 2])
    return documents, heldout


def write_train(path: Path, documents: list[str], more: list[str], left_out: np.ndarray) -> tuple[int, int]:
    """Bytes written and bytes cut. Documents of both lists in turn, so that neither crowds out the other."""
    more = [d.strip() for d in more if d.strip()]
    random.Random(1).shuffle(more)
    turns = sorted(
        [(i / len(documents), d) for i, d in enumerate(documents)] + [(i / len(more), d) for i, d in enumerate(more)]
    )
    size = cut = 0
    with path.open("w", encoding="utf-8") as out:
        for _, document in turns:
            kept = without(document, left_out)
            cut += len(document.encode()) - len(kept.encode())
            if kept.strip():
                out.write(kept.strip() + "\n\n")
                size += len(kept.encode()) + 2
            if size >= TRAIN_BYTES:
                break
    return size, cut


def stretches(text: str, count: int = 50, length: int = 200) -> Iterator[str]:
    """Random stretches of a text, white space made single."""
    text, rng = " ".join(text.split()), random.Random(0)
    for _ in range(count if len(text) > length else 0):
        start = rng.randrange(len(text) - length)
        yield text[start : start + length]


def check(out: Path, evaluated: dict[str, str]) -> int:
    """Print how many stretches of each text occur in training text; the sum."""
    train = {p.name: " ".join(p.read_text(encoding="utf-8").split()) for p in sorted(out.glob("*.train.txt"))}
    texts = evaluated | {p.name: p.read_text(encoding="utf-8") for p in sorted(out.glob("*.heldout.txt"))}
    total = 0
    for name, text in texts.items():
        wanted = list(stretches(text))
        hits = [file for s in wanted for file, t in train.items() if s in t]
        total += len(hits)
        print(f"{name}: {len(hits)} of {len(wanted)}", *sorted(set(hits)), flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--leave-out", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="check the corpus in --out, build nothing")
    args = parser.parse_args()
    evaluated = evaluated_texts(args.leave_out)
    if args.check:
        print("found:", check(args.out, evaluated))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = {kind: (*split(documents), more) for kind, (documents, more) in gather(args.raw, args.text).items()}
    for kind, (_, heldout, _) in kinds.items():
        (args.out / f"{kind}.heldout.txt").write_text("\n\n".join(heldout), encoding="utf-8")
    texts = [*evaluated.values(), *("\n\n".join(heldout) for _, heldout, _ in kinds.values())]
    left_out = np.unique(np.concatenate([hashes(normal(t)) for t in texts]))
    for kind, (documents, heldout, more) in kinds.items():
        size, cut = write_train(args.out / f"{kind}.train.txt", documents, more, left_out)
        print(f"{kind}: {size} bytes for training, {sum(map(len, heldout))} held out, {cut} cut", flush=True)


if __name__ == "__main__":
    main()
