"""The Python blocks of README and docs run, one page after the other, each block after the one above it.

What a reader brings, texts and models, is made here: the prelude of a page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_jax.storage import checkpoint

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SMALL = """
import pathlib, sys
import dynamo_jax.models.bundled as own
own.BUNDLED = pathlib.Path("narrow")
text_a, text_b = pathlib.Path("A.txt").read_text(), pathlib.Path("B.txt").read_text()
"""
WINDOWS = """
import numpy as np
windows = np.random.default_rng(0).integers(0, 8192, (2, 33))
"""
OWN = """
import sys
sys.path.insert(0, {tests!r})
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from own_models import Model, nll as loss, top_k
rng = np.random.default_rng(0)
wiki_batches, code_batches = ([jnp.asarray(rng.integers(0, 50, (8, 33))) for _ in range(2)] for _ in range(2))
model = Model(nnx.Rngs(0), blocks=((6, 32), (6, 32)))
"""
PRELUDES = {
    "README.md": SMALL + OWN + WINDOWS,
    "index.md": SMALL,
    "package.md": SMALL,
    "serving.md": SMALL + "text = text_b * 9\n",
}
QUICK = ("README.md",)  # the others are among the slow tests


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(narrow_folder, shallow, quantized, texts, tmp_path_factory):
    """Where a reader would be: with texts and with a model that quantize wrote."""
    path = tmp_path_factory.mktemp("reader")
    (path / "narrow").symlink_to(narrow_folder)
    (path / "A.txt").write_text(texts["code"], encoding="utf-8")
    (path / "B.txt").write_text(texts["verse"], encoding="utf-8")
    for name in ("quantized", "FOLDER", "OUT"):
        checkpoint.save(path / name, quantized)
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PRELUDES]
)
def test_the_blocks_of_a_page_run(name, folder, tmp_path):
    (page,) = [page for page in PAGES if page.name == name and "reference" not in page.parts]
    parts = blocks(page)
    assert parts
    script = PRELUDES[name].format(tests=str(ROOT / "tests")) + "\n".join(parts)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    if name in ("index.md", "package.md"):
        (tmp_path / "quantized").unlink()  # which the page makes
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pages_with_blocks_are_all_run():
    with_blocks = {page.name for page in PAGES if blocks(page)}
    # parts of programs; whole ones are examples/own_step.py, examples/pod.py and examples/own_nnx_model.py
    continued = {"howto.md", "scale.md", "pod.md", "transform.md"}
    assert with_blocks <= PRELUDES.keys() | continued
