"""Stand-ins that let vLLM's backend for TPUs, tpu-inference 0.26.0, run on a CPU: for tests only, and slow.

``python vllm_on_cpu.py FOLDER`` fills a folder that goes onto PYTHONPATH. In it lie a ``libtpu``, by which vLLM takes
this machine for a TPU, and this module as a plug-in of vLLM, which each of its processes calls. Replaced are: the mesh
(a CPU has no coordinates), how much memory there is, options of XLA that only its TPU compiler knows, the list of the
backend's own models (one of them imports torchvision), and attention, whose kernel is for TPUs alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

LIBTPU = r'''"""A stand-in, by which vLLM takes this machine for a TPU."""

import importlib.util
import pathlib
import re

import torch

# torchax 0.0.13 names overloads that torch 2.13 has no more
torchax = pathlib.Path(importlib.util.find_spec("torchax").origin).parent
for file in torchax.rglob("*.py"):
    for operation, overload in re.findall(r"aten\.(\w+)\.(\w*[Dd]imname\w*)", file.read_text()):
        if not hasattr(getattr(torch.ops.aten, operation), overload):
            setattr(getattr(torch.ops.aten, operation), overload, object())


def get_library_path():
    return None
'''


def fill(folder: Path) -> None:
    """Write the stand-ins."""
    facts = folder / "vllm_on_cpu-0.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "vllm_on_cpu.py")
    (folder / "libtpu.py").write_text(LIBTPU)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-on-cpu\nVersion: 0\n")
    (facts / "entry_points.txt").write_text("[vllm.general_plugins]\nvllm_on_cpu = vllm_on_cpu:register\n")


def register() -> None:
    """Put the stand-ins in place."""
    import jax
    from tpu_inference import utils
    from tpu_inference.layers.common import attention_interface
    from tpu_inference.models.common import model_loader
    from tpu_inference.runner import tpu_runner

    def mesh(shape, names, devices=None):
        return jax.make_mesh(shape, names, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(names))

    def memory(devices):
        return [(0, 2**30) for _ in devices]

    def model_of(config):
        for name in config.architectures:
            if name in model_loader._MODEL_REGISTRY:
                return model_loader._MODEL_REGISTRY[name]
        raise model_loader.UnsupportedArchitectureError(str(config.architectures))

    utils.make_optimized_mesh = tpu_runner.make_optimized_mesh = mesh
    utils.hbm_usage_bytes = memory
    model_loader.get_step_fn_compiler_options = lambda: None
    model_loader._get_model_architecture = model_of
    attention_interface.attention = attention


def attention(cache, q, k, v, metadata, mesh, head_dim_original, sm_scale, attention_chunk_size=None, sinks=None):
    """The backend's ``attention``, by gathering each token's keys and values over ``block_tables``.

    q: (N, H, C); k, v: (N, J, C); cache: pages in the layout of the backend's kernels.
    """
    import jax.numpy as jnp

    pages, page, *_, width = cache.shape
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    number = jnp.arange(tokens)
    row = jnp.minimum(jnp.searchsorted(starts, number, side="right") - 1, len(lengths) - 1)
    real = number < starts[-1]
    tables = metadata.block_tables.reshape(len(lengths), -1)
    own = lengths[row] - (starts[row + 1] - starts[row]) + number - starts[row]  # of each token its position
    here = jnp.where(real, tables[row, jnp.maximum(own, 0) // page] * page + own % page, pages * page)
    flat = cache.reshape(pages * page, -1, width)
    new = jnp.concatenate([k, v], axis=-1).reshape(tokens, -1, min(width, 2 * size))
    flat = flat.at[here, : new.shape[1]].set(new.astype(cache.dtype), mode="drop")
    at = (tables[row][:, :, None] * page + jnp.arange(page)).reshape(tokens, -1)
    both = flat[at][:, :, : new.shape[1]].reshape(tokens, -1, kv_heads, 2 * size).astype(jnp.float32)
    keys, values = both[..., :size], both[..., size:]
    scores = jnp.einsum("njgc,nsjc->njgs", q.reshape(tokens, kv_heads, -1, size).astype(jnp.float32), keys) * sm_scale
    position = jnp.arange(at.shape[1])
    seen = position <= own[:, None]
    if attention_chunk_size:
        seen &= position > own[:, None] - attention_chunk_size
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    sink = jnp.full(heads, -jnp.inf) if sinks is None else sinks
    sink = jnp.broadcast_to(sink.reshape(kv_heads, -1, 1), (*scores.shape[:3], 1))
    whole = jnp.concatenate([scores, sink], axis=-1)
    weights = jnp.exp(whole - whole.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :-1]
    out = jnp.einsum("njgs,nsjv->njgv", weights, values).reshape(tokens, heads, size)
    return flat.reshape(cache.shape), out.astype(q.dtype)


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
