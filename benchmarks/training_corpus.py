"""Build the text corpus that the bundled model is trained on.

Purpose: one folder with NAME.train.txt and NAME.heldout.txt for each kind of text.
Sources: Debian packages that were unpacked under --debian (docs/training.md lists the
commands), the running Python's own library, and public files given as NAME=FILE.
The held-out part is the last share of the whole documents of a kind, never seen in training.

    python benchmarks/training_corpus.py --debian raw/ --out corpus/ \
        --text encyclopedic=wikitext2-train.txt --text web=c4.jsonl --text arithmetic=gsm8k.txt
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TRAIN_BYTES = 12_000_000
HELDOUT_BYTES = 160_000


class _PageText(html.parser.HTMLParser):
    """Collects the visible text of one HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag, attrs):
        self._hidden += tag in ("script", "style", "head")
        if tag in ("p", "div", "li", "h1", "h2", "h3", "pre", "br", "tr"):
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style", "head")

    def handle_data(self, data):
        if not self._hidden:
            self.parts.append(data)


def page_text(page: str) -> str:
    parser = _PageText()
    parser.feed(page)
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", "".join(parser.parts))).strip()


def manual_text(roff: str) -> str:
    """The prose of a manual page: requests dropped, inline fonts and escapes resolved."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".de", ".ie", ".el", ".if", ".ds", ".nr")):
            continue
        line = re.sub(r"^\.(SH|SS|B|I|BR|BI|IR|RB|IP|TP)\s*", "", line)
        if line.startswith("."):
            continue
        line = re.sub(r"\\f(\(..|\[[^]]*\]|.)", "", line)
        line = line.replace("\\-", "-").replace("\\&", "").replace("\\(aq", "'").replace("\\e", "\\")
        lines.append(line.replace('"', "") if line.isupper() else line)
    return "\n".join(lines)


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def _files(root: Path, pattern: str, without: str = "\0") -> Iterator[Path]:
    return (p for p in sorted(root.glob(pattern)) if p.is_file() and without not in str(p))


def debian_documents(root: Path) -> dict[str, list[str]]:
    handbook = "x-debian-handbook/usr/share/doc/debian-handbook/html/{}/*.html"
    kinds: dict[str, list[str]] = {
        "dictionary": re.split(r"\n(?=\S)", _read(root / "x-dict-gcide/usr/share/dictd/gcide.dict.dz")),
        "kernel-docs": [_read(p) for p in _files(root, "x-linux-doc-6.1/**/*.rst.gz", "translations")],
    }
    bible = root / "bible.txt"  # bible -f gen1:1-rev22:21 > bible.txt
    kinds["scripture"] = re.findall(r"(?:.*\n){1,40}", bible.read_text())
    for kind, code in (("german", "de"), ("french", "fr"), ("spanish", "es")):
        pages = [page_text(_read(p)) for p in _files(root, handbook.format(f"{code}-{code.upper()}"))]
        pages += [manual_text(_read(p)) for p in _files(root, f"x-manpages-{code}/**/*.gz", "share/doc")]
        kinds[kind] = pages
    kinds["german"] += [_read(p) for p in _files(root, "x-fortunes-de/usr/share/games/fortunes/de/*") if not p.suffix]
    return kinds


def python_documents() -> list[str]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    files = [p for r in roots for p in sorted(r.glob("**/*.py")) if "site-packages" not in str(p)]
    return [_read(p) for p in files if p.stat().st_size < 200_000]


def file_documents(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in path.read_text().splitlines() if line.strip()]
    return re.findall(r"(?:.*\n){1,200}", path.read_text(errors="ignore") + "\n")


def write_kind(out: Path, kind: str, documents: list[str]) -> tuple[int, int]:
    """Shuffle whole documents (seed 0), cut both parts to size, write them."""
    documents = [d.strip() for d in documents if d.strip()]
    random.Random(0).shuffle(documents)
    share = min(HELDOUT_BYTES, sum(len(d.encode()) for d in documents) // 10)
    heldout: list[str] = []
    while sum(len(d.encode()) for d in heldout) < share:
        heldout.append(documents.pop()[: share // 2])
    train = "\n\n".join(documents).encode()[:TRAIN_BYTES].decode(errors="ignore")
    (out / f"{kind}.train.txt").write_text(train)
    (out / f"{kind}.heldout.txt").write_text("\n\n".join(heldout))
    return len(train.encode()), share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = debian_documents(args.debian) | {"python": python_documents()}
    for item in args.text:
        name, _, path = item.partition("=")
        kinds.setdefault(name, []).extend(file_documents(Path(path)))
    for kind, documents in kinds.items():
        print(kind, *write_kind(args.out, kind, documents))


if __name__ == "__main__":
    main()
