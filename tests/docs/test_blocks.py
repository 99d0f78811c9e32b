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
import functools, pathlib, sys
import dynamo_jax
import dynamo_jax.models.bundled as own
own.BUNDLED = pathlib.Path("narrow")
dynamo_jax.QuantizeConfig = functools.partial(dynamo_jax.QuantizeConfig, calibration_windows=8, unseen_windows=8)
text_a, text_b = pathlib.Path("A.txt").read_text(), pathlib.Path("B.txt").read_text()
"""
WINDOWS = """
import numpy as np
windows = np.random.default_rng(0).integers(0, 8192, (2, 33))
"""
TESTS = """
import sys
sys.path.insert(0, {tests!r})
"""
OWN = (
    TESTS
    + """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from own_models import Model, nll as loss, top_k
rng = np.random.default_rng(0)
wiki_batches, code_batches = ([jnp.asarray(rng.integers(0, 50, (8, 33))) for _ in range(2)] for _ in range(2))
model = Model(nnx.Rngs(0), blocks=((6, 32), (6, 32)))
"""
)
STEP = """
import jax, jax.numpy as jnp
import dynamo_jax as dj
model = dj.load("quantized")
tokens, windows = jnp.zeros((2, 64), jnp.int32), jnp.arange(66).reshape(2, 33)
"""
STEPPED = """
from dynamo_jax.models.decoder import new_cache
tokens, mask = jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4), bool)
logits, state, cache = step(parameters, state, tokens, mask, new_cache(model.config, 8, 16, jnp.float32))
assert logits.shape[:2] == (8, 4)
"""
HOSTS = """
import os
os.mkdir("hosts")
os.chdir("hosts")
os.symlink("../narrow", "FOLDER")
texts = {"code": open("../A.txt").read()}
config = dj.QuantizeConfig(quantizer="rtn", window=64, calibration_windows=2)
"""
LARGER = (
    TESTS
    + """
from small_decoders import decoder_config
config = decoder_config(
    vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, max_position_embeddings=40
)
"""
)
THEIRS = """
import numpy as np

class MoELayer(nnx.Module):
    def __init__(self, rngs):
        def weight(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape) * 0.2)
        self.gate_proj, self.up_proj, self.down_proj = weight(6, 32, 16), weight(6, 32, 16), weight(6, 16, 32)
        self.router = nnx.Linear(32, 6, rngs=rngs)
        self.experts_per_tok = 2
    def __call__(self, x):
        gates, ids = jax.lax.top_k(jax.nn.softmax(self.router(x)), self.experts_per_tok)
        h = jnp.einsum("btd,edf->btef", x, self.gate_proj[...])
        h = jax.nn.silu(h) * jnp.einsum("btd,edf->btef", x, self.up_proj[...])
        y = jnp.einsum("btef,efd->bted", h, self.down_proj[...])
        return jnp.einsum("bted,bte->btd", y, (jax.nn.one_hot(ids, 6) * gates[..., None]).sum(axis=2))

class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nnx.Linear(32, 32, rngs=rngs) for _ in range(4))
    def __call__(self, x):
        return self.o_proj(jax.nn.dot_product_attention(*(p(x)[:, :, None] for p in (
            self.q_proj, self.k_proj, self.v_proj)), is_causal=True)[:, :, 0])

class Block(nnx.Module):
    def __init__(self, rngs, mlp):
        self.attn, self.mlp = Attention(rngs), mlp
    def __call__(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)

class Model(nnx.Module):
    def __init__(self, rngs, mlp=None):
        mlp = mlp or (lambda: MoE(nnx.Linear(32, 6, rngs=rngs), nnx.Linear(32, 32, rngs=rngs), *(
            jax.random.normal(rngs.params(), shape) * 0.2 for shape in ((6, 32, 16), (6, 32, 16), (6, 16, 32)))))
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.layers = nnx.List([Block(rngs, mlp()) for _ in range(4)])
    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)

model, theirs = Model(nnx.Rngs(0)), Model(nnx.Rngs(1), lambda: MoELayer(nnx.Rngs(2)))
rng = np.random.default_rng(0)
wiki_batches, code_batches = ([jnp.asarray(rng.integers(0, 50, (8, 33))) for _ in range(2)] for _ in range(2))
tokens = jnp.zeros((8, 32), jnp.int32)
"""
RAN = """
assert step(served, tokens).shape == (8, 32, 50)
"""
# what a reader brings to a page, and then to its blocks by their numbers
PRELUDES: dict[str, dict[int, str]] = {
    "README.md": {0: SMALL + OWN + WINDOWS},
    "index.md": {0: SMALL},
    "package.md": {0: SMALL},
    "serving.md": {0: SMALL + "text = text_b * 9\n"},
    "howto.md": {0: STEP},
    "extending.md": {},
    "scale.md": {2: "import jax.numpy as jnp\n" + STEPPED + HOSTS, 3: LARGER},
    "pod.md": {},
    "transform.md": {0: TESTS, 2: THEIRS, 6: RAN, 7: RAN},
}
DEVICES = {"scale.md": 8, "pod.md": 16}
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
    brought = PRELUDES[name]
    script = "".join(brought.get(number, "") + part for number, part in enumerate(parts))
    script = script.replace("{tests!r}", repr(str(ROOT / "tests")))
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    if name in ("index.md", "package.md", "transform.md"):
        (tmp_path / "quantized").unlink()  # which the page makes
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if name in DEVICES:
        emulated = f" --xla_force_host_platform_device_count={DEVICES[name]}"
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + emulated
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pages_with_blocks_are_all_run():
    with_blocks = {page.name for page in PAGES if blocks(page)}
    assert with_blocks == set(PRELUDES)
