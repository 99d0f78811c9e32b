"""Who may import whom, and the habits that a reader relies on, checked on the source."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dynamo_jax"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
SOURCES = [p for p in SOURCES if not re.search("dynamo_jax/(kernels|configs)/", p.as_posix())]

LOW = {"files", "progress", "settings"}  # import nothing of ours above them
RUN_TIME = {"kernels", "quant", "models", "analysis", "precision", "runtime"}
MAY_IMPORT: dict[str, set[str]] = {
    "files": set(),
    "progress": set(),
    "settings": {"configs", "files"},
    "kernels": {"kernels"},
    "quant": {"quant", "kernels.layout"},
    "texts": {"texts", "models.tokenizer", "files"},
    "models.formats": {"models.formats", "models.config", "models.specs", "files"},
    "models.families": {"models.families", "models.formats", "models.config", "models.specs", "files"},
    "models.tokenizer": {"files"},
    "models": {"models", "kernels", "files"},
    "analysis": {"analysis", "models", "kernels"},
    "precision": {"precision", "kernels.layout"},
    "runtime": RUN_TIME,
    "storage": {"storage", "runtime", "models", "precision", "quant", "kernels.layout", *LOW},
    "calibration": {"calibration", "storage", "texts", *RUN_TIME, *LOW},
    "evaluation": {"evaluation", "texts", *RUN_TIME, *LOW},
    "report": {
        *("report", "evaluation", "calibration", "analysis", "precision", "runtime", "models", "kernels.layout"),
        *("files", "progress"),
    },
    "transform": {"transform", "calibration", "storage", *RUN_TIME, *LOW},
    "engines": {"engines", "storage", "runtime", "models", "precision", "files"},
    "generation": {"storage", "runtime", "models", "kernels.layout"},
    "harness": {"generation", "evaluation", "runtime", "models"},
    "training": {"models", "files"},
    "demo": {"texts", "storage", "calibration", "evaluation", "report", *RUN_TIME, *LOW},
    "recipes": {"texts", "calibration", "evaluation", "quant"},
    "bench": {"recipes", "texts", "storage", "calibration", "evaluation", "report", "models", "runtime", "progress"},
    "commands": {
        *("commands", "demo", "bench", "recipes", "training", "engines", "generation", "harness", "texts", "storage"),
        *("calibration", "evaluation", "report", "runtime", "models", *LOW),
    },
}
FACES = {"__init__", "__main__"}  # hand names on
KERNELS_MAY_USE = {
    "__future__",
    "collections",
    "functools",
    "math",
    "typing",
    "jax",
    "jaxlib",
    "numpy",
    "jaxtyping",
    "dynamo_jax",
}


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(path: pathlib.Path) -> str:
    """The name below ``dynamo_jax``."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The most particular entry of the table that a module belongs to."""
    fits = [r for r in MAY_IMPORT if name == r or name.startswith(f"{r}.")]
    return max(fits, key=len, default=name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_room_may(path):
    names = imported(path)
    assert not {n for n in names if n.split(".")[0] in ("kernels", "pickle", "torch", "transformers")}
    name = module(path)
    if name in FACES:
        return
    assert room(name) in MAY_IMPORT, f"{name}: a room that the table does not know"
    ours = {n.removeprefix("dynamo_jax.") for n in names if n.startswith("dynamo_jax.")} - {"__version__"}
    allowed = MAY_IMPORT[room(name)]
    assert not {n for n in ours if not any(n == a or n.startswith(f"{a}.") for a in allowed)}
    if room(name) == "kernels":
        assert {n.split(".")[0] for n in names} <= KERNELS_MAY_USE


def test_no_module_imports_itself_by_way_of_others():
    modules = {module(p): p for p in SOURCES if module(p) not in FACES}
    edges = {}
    for name, path in modules.items():
        ours = {n.removeprefix("dynamo_jax.") for n in imported(path) if n.startswith("dynamo_jax.")}
        edges[name] = {n if n in modules else n.rpartition(".")[0] for n in ours} & set(modules) - {name}
    done: set[str] = set()
    while ready := {n for n, of in edges.items() if n not in done and of <= done}:
        done |= ready
    assert set(edges) == done


def test_the_table_in_the_docs_is_the_one_that_holds():
    text = (ROOT / "docs/design.md").read_text()
    table = text.split("## Who may import whom")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \|(.*)\|$", table, re.MULTILINE)
    found = {name: set(re.findall(r"`([a-z_.]+)`", words)) for name, words in rows}
    assert found == {name: may - {name} for name, may in MAY_IMPORT.items()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_says_what_it_is_for_and_stays_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)) or not text.strip()
    assert text.count("\n") <= 500
    assert path.stem not in ("utils", "helpers", "common")
    assert "allow_pickle" not in text


def defined(path: pathlib.Path) -> set[str]:
    """Names at the top of a module, imported ones too."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        for inner in ast.walk(node):
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in inner.names}
            elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                names.add(inner.name)
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                names.add(inner.id)
    return names


BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_what_a_benchmark_imports_of_ours_is_there(path):
    """Benchmarks take from seconds to hours; no test runs them."""
    modules = {p.stem: p for p in BENCHMARKS}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        wanted = {alias.name for alias in node.names}
        if node.module in modules:
            assert wanted <= defined(modules[node.module]), node.module
        elif node.module.split(".")[0] == "dynamo_jax":
            try:
                module = __import__(node.module, fromlist=sorted(wanted))  # modules among them too
            except ModuleNotFoundError as error:
                assert error.name and not error.name.startswith("dynamo_jax")  # an extra's package
                continue
            assert {n for n in wanted if not hasattr(module, n)} == set(), node.module
