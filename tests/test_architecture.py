"""Who may import whom, and the habits that a reader relies on, checked on the source."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dynamo_jax"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
SOURCES = [p for p in SOURCES if "dynamo_jax/kernels" not in p.as_posix()]

MAY_IMPORT = {
    "kernels": {"kernels"},
    "quant": {"quant", "kernels.layout"},
    "models": {"models", "kernels"},
    "analysis": {"analysis", "models", "kernels"},
    "precision": {"precision", "kernels.layout"},
    "runtime": {"runtime", "precision", "analysis", "models", "quant", "kernels"},
}
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


def part(path: pathlib.Path) -> str:
    return path.parent.name if path.parent != PACKAGE else "top"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_part_may(path):
    names = imported(path)
    ours = {n.removeprefix("dynamo_jax.") for n in names if n.startswith("dynamo_jax.")}
    allowed = MAY_IMPORT.get(part(path))
    if allowed is not None:
        assert not {n for n in ours if not any(n == a or n.startswith(f"{a}.") for a in allowed)}
    if part(path) == "kernels":
        assert {n.split(".")[0] for n in names} <= KERNELS_MAY_USE
    assert not {n for n in names if n.split(".")[0] in ("kernels", "pickle", "torch", "transformers")}


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
            module = __import__(node.module, fromlist=sorted(wanted))  # modules among them too
            assert {n for n in wanted if not hasattr(module, n)} == set(), node.module
