"""The pages that people read: links, lines, words, commands and names in them are right.

No page is built and nothing is fetched here: ``make docs`` builds the site. What pages say of the code is compared
with its source, so that no test but one waits for JAX.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree

import pytest
import typer

import dynamo_jax
from dynamo_jax.commands.app import app

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
INDEXED = ROOT / tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]
PAGES = sorted(set(DOCS.rglob("*.md")) - {INDEXED})  # of the site
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", INDEXED, *PAGES]
GLOSSARY = DOCS / "glossary.md"
LONGEST = 100

WORDS = (  # that the glossary explains
    *("channel", "channel-block", "width", "plan", "budget", "plane", "page", "slot", "spare", "page-table", "variant"),
    *("baseline", "known", "novel", "signature", "reads"),
)
TERMS = {  # words that mean one thing only, so that a page which uses one links to what it means
    "channel-block": r"\bchannel blocks?\b",
    "page-table": r"\bpage tables?\b",
    "plane": r"\bplanes?\b",
    "baseline": r"\bbaselines?\b",
    "signature": r"\bsignatures?\b",
    "monitor": r"\bmonitors?\b",
    "adaptation": r"\badaptations?\b",
    "novel": r"\bnovel\b",
}


def named(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=named)


def prose(path: pathlib.Path) -> list[tuple[int, str]]:
    """Numbered lines outside of code and tables."""
    lines, fenced = [], False
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "    ", ":::", "<!--")):
            lines.append((number, line))
    return lines


def blocks(path: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def anchors(path: pathlib.Path) -> set[str]:
    """Of headings, as GitHub and the site make them."""
    heads = [line.lstrip("#").strip() for _, line in prose(path) if line.startswith("#")]
    heads = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).replace("`", "") for head in heads]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def defined(path: pathlib.Path) -> set[str]:
    """Names at the top of a source."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def public(path: pathlib.Path) -> list[str]:
    """``__all__`` of a source."""
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(n.value) for n in assigned if getattr(n.targets[0], "id", "") == "__all__")


def links(path: pathlib.Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


# Links


@each(TEXTS)
def test_a_link_leads_somewhere(path):
    lost = []
    for link in links(path):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


def test_the_navigation_has_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\n\n")[0]
    pages = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    assert sorted(pages) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)


def test_a_name_of_a_page_in_a_source_is_a_page():
    """As in "Source: docs/method.md"."""
    sources = [p for room in ("dynamo_jax", "kernels", "configs", "benchmarks") for p in (ROOT / room).rglob("*.*")]
    texts = [p.read_text() for p in sources if p.suffix in (".py", ".toml", ".md")]
    names = {name for text in texts for name in re.findall(r"docs/[\w/-]+\.md", text)}
    assert names
    assert not {name for name in names if not (ROOT / name).is_file()}


@pytest.mark.parametrize("path", [*TEXTS, ROOT / "mkdocs.yml", DOCS / "site.py"], ids=named)
def test_no_page_knows_a_machine_or_a_registry(path):
    assert not re.search(r"pypi\.org|npmjs|pythonhosted|(?<![\w.~])/(root|work|opt|home)/", path.read_text())


# Words and lines


@each(TEXTS)
def test_lines_are_short(path):
    long = [number for number, line in prose(path) if len(line) > LONGEST and max(map(len, line.split())) < 80]
    assert not long


@each(PAGES)
def test_a_page_begins_with_its_name_and_whom_it_is_for(path):
    title, empty, whom = path.read_text().split("\n")[:3]
    assert title.startswith("# ") and not empty
    assert whom.startswith("*For ")
    assert [line for _, line in prose(path) if line.startswith("# ")] == [title]


@each(TEXTS)
def test_a_list_begins_after_an_empty_line(path):
    """Else the site shows it as a part of the paragraph before it."""
    lines = dict(prose(path))
    item = re.compile(r"(- |\d+\. )")
    starts = [n for n, line in lines.items() if item.match(line) and not item.match(lines.get(n - 1, ""))]
    wrong = [n for n in starts if (before := lines.get(n - 1, "")) and not before.startswith("  ")]
    assert not wrong


def test_the_glossary_explains_the_words():
    assert set(WORDS) | set(TERMS) <= anchors(GLOSSARY)
    assert "docs/glossary.md" in links(ROOT / "README.md")


@each([p for p in PAGES if p != GLOSSARY])
def test_a_page_links_to_the_words_that_it_uses(path):
    found = set(links(path))
    glossary = os.path.relpath(GLOSSARY, path.parent)
    assert glossary in found
    text = " ".join(line for _, line in prose(path) if not line.startswith("#"))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text).lower()
    used = {slug for slug, words in TERMS.items() if re.search(words, text)}
    assert not {slug for slug in used if f"{glossary}#{slug}" not in found}


def test_words_are_spelled_right():
    if importlib.util.find_spec("codespell_lib") is None:
        pytest.skip("codespell is not installed: pip install '.[test]'")
    command = [sys.executable, "-c", "from codespell_lib import _script_main as main; raise SystemExit(main())"]
    texts = [named(path) for path in (*TEXTS, DOCS / "drawings")]
    done = subprocess.run([*command, *texts], cwd=ROOT, capture_output=True, text=True)
    assert not done.stdout + done.stderr


# What pages say of the program


def test_the_reference_has_every_public_name_once():
    for page, package in (("package", "dynamo_jax"), ("transform", "dynamo_jax.transform")):
        text = (DOCS / f"reference/{page}.md").read_text()
        names = re.findall(rf"^::: {package}\.(\w+)$", text, re.MULTILINE)
        assert sorted(names) == sorted(public(ROOT / package.replace(".", "/") / "__init__.py"))


def test_the_kernels_in_the_reference_are_there():
    text = (DOCS / "reference/kernels.md").read_text()
    names = re.findall(r"^::: dynamo_jax\.kernels\.(\w+)\.(\w+)$", text, re.MULTILINE)
    assert names
    assert not [name for module, name in names if name not in defined(ROOT / f"kernels/{module}.py")]


@each(TEXTS)
def test_commands_and_their_options_are_there(path):
    commands = typer.main.get_command(app).commands
    options = {name: {o for p in c.params for o in p.opts} for name, c in commands.items()}
    shells = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    lines = [line.split("#")[0] for line in shells.split("\n")]
    lines += re.findall(r"`(dynamo-jax [^`]*)`", path.read_text())
    for line in lines:
        for name, rest in re.findall(r"dynamo-jax ([a-z][a-z-]*)([^;&|]*)", line):
            assert name in options, line
            if name != "lm-eval":
                assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options[name] | {"--help"}, line


@each(TEXTS)
def test_python_on_a_page_can_be_read_and_its_names_are_there(path):
    there = {*dynamo_jax.__all__, *public(ROOT / "dynamo_jax/transform/__init__.py")}
    for block in blocks(path, "python"):
        used = {n.attr for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Attribute) and is_ours(n.value)}
        assert used <= there, block


def is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("dj", "djt", "dynamo_jax")


def test_pages_count_the_families_that_are_known():
    from dynamo_jax.models.families.table import FAMILIES, WRAPPERS

    for path in (ROOT / "README.md", INDEXED):
        (said,) = re.findall(r"(\d+)\s+values\s+of\s+`model_type`", path.read_text())
        assert int(said) == len(FAMILIES)
    listed = set(re.findall(r"`([\w]+)`", (DOCS / "checkpoints.md").read_text()))
    text_parts = {f"{name}_text" for name in WRAPPERS}  # listed by the name of the whole model
    assert set(FAMILIES) - text_parts <= listed


@pytest.mark.parametrize("path", sorted((DOCS / "drawings").glob("*.svg")), ids=lambda p: p.stem)
def test_a_drawing_says_what_it_shows_and_has_a_dark_side(path):
    drawing = xml.etree.ElementTree.parse(path).getroot()
    names = {child.tag.rpartition("}")[2]: child.text or "" for child in drawing}
    assert drawing.get("role") == "img" and names["title"] and len(names["desc"]) > 60
    light, dark = names["style"].split("prefers-color-scheme: dark")
    colours = re.compile(r"--(\w+): #")
    used = set(re.findall(r"var\(--(\w+)\)", names["style"]))
    assert used == set(colours.findall(light)) == set(colours.findall(dark))
    assert any(f"drawings/{path.name}" in link for page in PAGES for link in links(page))
