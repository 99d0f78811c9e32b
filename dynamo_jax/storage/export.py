"""A quantized model back as a Hugging Face folder: dequantized bfloat16 experts, everything else as it was.

What stands in the folder is what the quantized model computes with at its baseline plan: run-time
weights are the planes' sum rounded to bfloat16. A layer is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.files import whole_folder, write_text
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.families.names import expert_names, layer_tensor_names, tensor_names
from dynamo_jax.models.formats.expert_files import Triple, expert_tensors
from dynamo_jax.models.huggingface import write_shards
from dynamo_jax.precision.plan import Plan
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.bundles import Bundle, check_planes, layer_name, layer_planes, read_bundle


def export(folder: str | Path, out: str | Path, progress: Progress = no_progress) -> None:
    """Write the quantized model in ``folder`` as the Hugging Face folder ``out``, which must be missing or empty.

    Experts are bfloat16 there, at the widths of the baseline: as many bytes as before quantization. A layer is in
    memory at a time. ValueError: ``out`` is not free, or ``folder`` is not a whole quantized model.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; choose another folder")
    description = checkpoint.read_description(folder)
    source = folder / checkpoint.SOURCE
    if not (source / "config.json").is_file():
        raise ValueError(f"{source / 'config.json'}: no such file; this model did not come from a checkpoint folder")
    with whole_folder(out) as partial:
        config = description.config
        write_shards(partial, _shards(folder, description, progress), config.num_hidden_layers + 1)
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
        raw.pop("quantization_config", None)  # MXFP4 experts are bfloat16 now
        write_text(partial / "config.json", json.dumps(raw | {"dtype": "bfloat16"}, indent=2) + "\n")


def _shards(folder: Path, description: checkpoint.Description, progress: Progress) -> Iterator[Bundle]:
    config = description.config
    for layer in range(config.num_hidden_layers):
        yield _layer_tensors(folder, description, layer)
        progress("export layers", layer + 1, config.num_hidden_layers)
    top = read_bundle(folder / checkpoint.TOP)
    yield {theirs: top[ours] for ours, theirs, _ in tensor_names(config) if not ours.startswith("layers.")}


def _layer_tensors(folder: Path, description: checkpoint.Description, layer: int) -> Bundle:
    meta, config, plan, _ = description
    path = folder / f"{layer_name(layer)}.safetensors"
    bundle = read_bundle(path)
    check_planes(path, bundle, config, plan, meta["max_width"])
    own = {k.removeprefix("parameters/"): a for k, a in bundle.items() if k.startswith("parameters/")}
    tensors = {}
    for ours, theirs, turned in layer_tensor_names(config, layer):
        tensors[f"model.layers.{layer}.{theirs}"] = own[ours].T if turned else own[ours]
    if layer in config.dense_layers:
        return tensors
    widths = plan.page_widths()[config.moe_layers.index(layer)].reshape(config.num_experts, -1, plan.blocks)
    planes = layer_planes(bundle)
    experts = [dequantized_expert(_expert(planes, e), widths[e], plan) for e in range(config.num_experts)]
    return tensors | expert_tensors(expert_names(config, layer), experts, own)


def _expert(planes: Planes, expert: int) -> Planes:
    return jax.tree.map(lambda a: a[expert], planes)


def dequantized_expert(planes: Planes, widths: Int[np.ndarray, "U N"], plan: Plan) -> Triple:
    """bfloat16 gate, up and down (F, D) of one expert whose planes are (P, F, ..), each block at its width; U is 1
    or, where each projection has its own widths, 3. ``plan`` says how large blocks and the expert are."""
    projections = planes.scales.shape[0]
    of_channel = np.broadcast_to(
        np.repeat(widths, plan.channel_block, axis=1), (projections, widths.shape[1] * plan.channel_block)
    )
    out: Float[np.ndarray, "P F D"] | None = None
    for width in WIDTHS:
        if (at := of_channel == width).any():
            value = np.asarray(dequantize(planes, width).astype(ml_dtypes.bfloat16))
            out = np.zeros_like(value) if out is None else out
            out[at] = value[at]
    assert out is not None
    gate, up, down = out[:, : plan.channels, : plan.hidden_size]
    return gate, up, down
