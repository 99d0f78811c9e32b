"""The package as it is installed, and the names that it offers."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import dynamo_jax

ROOT = pathlib.Path(__file__).parent.parent
LINKED = {"kernels", "configs"}  # folders beside dynamo_jax that are installed in it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_list_of_packages_is_the_folders():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "dynamo_jax").rglob("__init__.py")
        if not LINKED & set(p.parent.parts[len(ROOT.parts) :])
    }
    linked = {"kernels", "configs", "configs.recipes", "configs.train"}
    assert listed == folders | {f"dynamo_jax.{name}" for name in linked}


def test_importing_touches_no_device():
    assert run("import sys, dynamo_jax; print({'jax', 'numpy'} & set(sys.modules))").strip() == "set()"


def test_the_command_line_starts_without_jax():
    out = run(
        "import sys; sys.argv = ['dynamo-jax', '--help']; from dynamo_jax.commands.app import app; "
        "app(standalone_mode=False); print('jax' in sys.modules)"
    )
    commands = ("demo", "train", "analyze", "quantize", "eval", "generate", "export", "inspect")
    assert all(name in out for name in commands)
    assert out.strip().endswith("False")


# The public face


@pytest.mark.parametrize("name", dynamo_jax.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name):
    value = getattr(dynamo_jax, name)
    if name == "BUNDLED":
        assert value.is_dir()
        return
    assert len(inspect.getdoc(value) or "") > 60
    assert value.__module__.startswith("dynamo_jax.")


def test_a_public_name_is_not_a_module_below():
    """Importing a module of that name would put the module in the name's place."""
    below = {p.stem for p in (ROOT / "dynamo_jax").iterdir()}
    assert not below & set(dynamo_jax.__all__)


def test_names_for_readers_of_types_are_the_names_that_are_looked_up():
    tree = ast.parse((ROOT / "dynamo_jax/__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    declared = {(n.module.removeprefix("dynamo_jax."), a.name) for n in block.body for a in n.names}
    assert declared == {(module, name) for module, names in dynamo_jax._MODULES.items() for name in names}
    assert sorted(name for _, name in declared) == sorted(dynamo_jax.__all__)
    assert dir(dynamo_jax) == sorted([*dynamo_jax.__all__, "__version__"])


def test_the_docstring_of_the_package_names_them_all():
    assert set(dynamo_jax.__all__) <= set(re.findall(r"\w+", dynamo_jax.__doc__))


# What is built


def test_what_a_package_index_shows_has_no_link_that_leads_nowhere():
    links = re.findall(r"\]\(([^)]*)\)", (ROOT / PROJECT["project"]["readme"]).read_text())
    assert not [link for link in links if not link.startswith("https://")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_source_the_presets_and_the_bundled_model(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    package = ROOT / "dynamo_jax"
    sources = {p.relative_to(ROOT).as_posix() for p in package.rglob("*.py") if not LINKED & set(p.parts)}
    sources |= {f"dynamo_jax/{p.relative_to(ROOT)}" for name in LINKED for p in (ROOT / name).rglob("*.py")}
    sources |= {f"dynamo_jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.toml")}
    assert sources <= names
    bundled = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert {f"dynamo_jax/models/tiny_moe/{n}" for n in bundled} <= names
    assert "dynamo_jax/py.typed" in names
    assert not {n for n in names if n.split("/")[0] in (*LINKED, "tests", "benchmarks")}
    assert f"Version: {dynamo_jax.__version__}\n" in metadata


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_developer_needs(built):
    with tarfile.open(built[0]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    tracked = [p for room in ("benchmarks", "configs", "docs", "kernels", "tests") for p in (ROOT / room).rglob("*.*")]
    wanted = {p.relative_to(ROOT).as_posix() for p in tracked if p.is_file() and "__pycache__" not in p.parts}
    assert wanted | {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "colab/demo.ipynb"} <= names
