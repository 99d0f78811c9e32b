"""The package as it is installed."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_list_of_packages_is_the_folders():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for p in (ROOT / "dynamo_jax").rglob("__init__.py")
        if not {"kernels", "configs"} & set(p.parent.parts[len(ROOT.parts) :])
    }
    assert listed == folders | {"dynamo_jax.kernels", "dynamo_jax.configs"}


def test_importing_touches_no_device_and_exports_little():
    assert run("import sys, dynamo_jax; print('jax' in sys.modules)").strip() == "False"


def test_help_names_every_command():
    out = run(
        "import sys; sys.argv = ['dynamo-jax', '--help']; "
        "from dynamo_jax.commands.app import app; app(standalone_mode=False)"
    )
    assert all(
        name in out for name in ("demo", "train", "analyze", "quantize", "eval", "generate", "export", "inspect")
    )


@pytest.mark.slow
def test_the_wheel_holds_every_source_and_the_bundled_model(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dynamo_jax").rglob("*.py") if "kernels" not in p.parts}
    sources |= {f"dynamo_jax/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert sources <= names
    bundled = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert {f"dynamo_jax/models/tiny_moe/{n}" for n in bundled} <= names
    assert not {n for n in names if n.startswith("kernels/")}
