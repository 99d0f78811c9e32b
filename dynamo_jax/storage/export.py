"""A quantized model back as a Hugging Face folder: dequantized bfloat16 experts, everything else as it was.

What stands in the folder is what the quantized model computes with at its baseline plan: run-time
weights are the planes' sum rounded to bfloat16. A layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.files import read_json, write_bytes, write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.names import expert_names
from dynamo_jax.models.formats.expert_files import Triple, expert_tensors
from dynamo_jax.models.huggingface import layer_tensor_names, tensor_names, write_shards
from dynamo_jax.precision.plan import Plan
from dynamo_jax.progress import Log, Progress, no_log, no_progress
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.bundles import Bundle, layer_planes
from dynamo_jax.storage.results import JOB, LOCK, SUMS, Making, digest_of, is_done, located

EXPORT_FORMAT = 1  # raised when the same model is exported otherwise
MARKER = "dynamo_jax_export.json"  # what made the folder


def export(
    folder: str | Path,
    out: str | Path,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
    log: Log = no_log,
) -> None:
    """Write the quantized model in ``folder`` as the Hugging Face folder ``out``, which is missing or empty, or with
    ``overwrite`` an earlier export.

    Experts are bfloat16 there, at the widths of the baseline: as many bytes as before quantization. A layer is in
    memory at a time. What config.json promises and the export does not have is taken out, and ``log`` is told: Python
    files of the model's own (``auto_map``) and layers that predict further tokens. ValueError: ``out`` is not free, or
    ``folder`` is not a whole quantized model.
    """
    folder, out = Path(folder), Path(out).resolve()
    description = checkpoint.read_description(folder)
    result, config = description.result, description.config
    if f"{checkpoint.SOURCE}/config.json" not in result.sums:
        raise ValueError(
            f"{folder / checkpoint.SOURCE / 'config.json'}: no such file; "
            "this model did not come from a checkpoint folder"
        )
    job = {"command": "export", "format": EXPORT_FORMAT, "model": digest_of(located(folder, SUMS))}
    if is_done(out, MARKER, job):
        log(f"{out}: done already, by the same command")
        return
    with Making(out, MARKER, job, overwrite=overwrite, resumes=False) as making:
        write_shards(making.folder, _shards(description, progress), config.num_hidden_layers + 1)
        for name in result.sums:
            if name.startswith(f"{checkpoint.SOURCE}/"):
                own = making.folder / name.removeprefix(f"{checkpoint.SOURCE}/")
                own.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(own, result.path(name).read_bytes())
        raw = read_json(making.folder / "config.json")
        write_json(making.folder / "config.json", _config_of(raw, config, log))
        settings = making.folder / "tokenizer_config.json"
        if settings.is_file() and "auto_map" in (raw := read_json(settings)):
            raw.pop("auto_map")
            write_json(settings, raw)
        write_json(making.folder / MARKER, {"name": "dynamo_jax export", "job": job})
        files = [p for p in making.folder.rglob("*") if p.is_file() and p.name not in (JOB, LOCK)]
        making.publish({p.relative_to(making.folder).as_posix(): digest_of(p) for p in files})


def _config_of(raw: dict[str, Any], config: ModelConfig, log: Log) -> dict[str, Any]:
    """config.json of the export from that of the model."""
    raw = (
        raw
        | {"dtype": "bfloat16", "tie_word_embeddings": config.tie_word_embeddings}
        | ({"torch_dtype": "bfloat16"} if "torch_dtype" in raw else {})
    )
    raw.pop("quantization_config", None)  # MXFP4 experts are bfloat16 now
    if raw.pop("auto_map", None) is not None:
        log("config.json: auto_map is left out, since the model's own Python files are not copied")
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        if raw.get(key):
            raw[key] = 0
            log(f"config.json: {key} is 0 now, since layers that predict further tokens are not kept")
    return raw


def _shards(description: checkpoint.Description, progress: Progress) -> Iterator[Bundle]:
    config = description.config
    for layer in range(config.num_hidden_layers):
        yield _layer_tensors(description, layer)
        progress("export layers", layer + 1, config.num_hidden_layers)
    top = checkpoint.top_bundle(description.result, config)
    yield {theirs: top[ours] for ours, theirs, _ in tensor_names(config) if not ours.startswith("layers.")}


def _layer_tensors(description: checkpoint.Description, layer: int) -> Bundle:
    result, meta, config, plan, _ = description
    bundle = checkpoint.layer_bundle(result, config, plan, meta.max_width, layer)
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
