"""A quantized model back as a Hugging Face folder: dequantized bfloat16 experts, everything else as it was, or
dequantized too where the rest has 8 or 4 bits.

What stands in the folder is what the quantized model computes with at its baseline plan: run-time
weights are the planes' sum rounded to bfloat16. A layer is in memory at a time. Tensors that the decoder has no use
for are not in a quantized folder; they are copied from the folder that it was made from, if that is at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.files import read_json, shortened, write_bytes, write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.families.names import Filed, expert_names, names_alone
from dynamo_jax.models.families.table import TEXT_PARTS
from dynamo_jax.models.formats.declared import KEY, OLDER_KEY
from dynamo_jax.models.formats.expert_files import Triple, expert_tensors
from dynamo_jax.models.huggingface import Source, layer_tensor_names, tensor_names, unread_words, write_shards
from dynamo_jax.models.rest import expanded
from dynamo_jax.precision.plan import Plan
from dynamo_jax.progress import Log, Progress, no_log, no_progress
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.bundles import Bundle, layer_planes
from dynamo_jax.storage.results import JOB, LOCK, SUMS, Making, digest_of, is_done, located

EXPORT_FORMAT = 1  # raised when the same model is exported otherwise
SHARD_BYTES = 2**31  # of tensors that are copied, in one file
MARKER = "dynamo_jax_export.json"  # what made the folder


def export(
    folder: str | Path,
    out: str | Path,
    progress: Progress = no_progress,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    log: Log = no_log,
) -> None:
    """Write the quantized model in ``folder`` as the Hugging Face folder ``out``, which is missing or empty, or with
    ``overwrite`` an earlier export.

    Experts are bfloat16 there, at the widths of the baseline: as many bytes as before quantization. A layer is in
    memory at a time. source: the Hugging Face folder that was quantized; tensors that were not read, such as a vision
    tower's, are copied from it, as floats where they are packed there. What config.json promises and the export does
    not have is taken out, and ``log`` is told: Python files of the model's own (``auto_map``) and, without ``source``,
    layers that predict further tokens. ValueError: ``out`` is not free, ``folder`` is not a whole quantized model, or
    ``source`` is not what it was made from.
    """
    folder, out = Path(folder), Path(out).resolve()
    description = checkpoint.read_description(folder)
    result, config = description.result, description.config
    if "config.json" not in result.sums:
        raise ValueError(f"{folder / 'config.json'}: no such file; this model did not come from a checkpoint folder")
    origin = _origin(description, Path(source)) if source else None
    if not origin:
        description = description._replace(config=names_alone(config))
    job = {"command": "export", "format": EXPORT_FORMAT, "model": digest_of(located(folder, SUMS))}
    if origin:
        job["source"] = hashlib.sha256(json.dumps(origin.fingerprint()).encode()).hexdigest()
    if is_done(out, MARKER, job):
        log(f"{out}: done already, by the same command")
        return
    with Making(out, MARKER, job, overwrite=overwrite, resumes=False) as making:
        copied = _parts(origin) if origin else []
        count = config.num_hidden_layers + 1 + len(copied)
        write_shards(making.folder, _shards(description, origin, copied, progress), count)
        for name in checkpoint.side_names(description):
            (making.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(making.folder / name, result.path(name).read_bytes())
        raw = read_json(making.folder / "config.json")
        write_json(making.folder / "config.json", _config_of(raw, description, origin, log))
        settings = making.folder / "tokenizer_config.json"
        if settings.is_file() and "auto_map" in (raw := read_json(settings)):
            raw.pop("auto_map")
            write_json(settings, raw)
        write_json(making.folder / MARKER, {"name": "dynamo_jax export", "job": job})
        files = [p for p in making.folder.rglob("*") if p.is_file() and p.name not in (JOB, LOCK)]
        making.publish({p.relative_to(making.folder).as_posix(): digest_of(p) for p in files})


def _origin(description: checkpoint.Description, folder: Path) -> Source:
    """The folder that was quantized. ValueError: it is another one."""
    source = Source(folder)
    if digest_of(folder / "config.json") != description.result.sums["config.json"]:
        raise ValueError(f"{folder / 'config.json'}: not what was quantized, which {description.result.folder} says")
    if other := sorted(set(source.unread) ^ set(description.meta.not_read)):
        said = f"{shortened(other[0])} is not read of one of this and what {description.result.folder} was made from"
        raise ValueError(f"{source.files.listing}: {said}")
    return source


def _parts(source: Source) -> list[list[str]]:
    """The tensors that were not read, some for each file."""
    parts: list[list[str]] = []
    room = 0
    for name in source.unread:
        size = source.files.headers[name].nbytes
        if not parts or size > room:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(name)
        room -= size
    return parts


def _config_of(
    raw: dict[str, Any], description: checkpoint.Description, origin: Source | None, log: Log
) -> dict[str, Any]:
    """config.json of the export from that of the model."""
    raw = (
        raw
        | {"dtype": "bfloat16", "tie_word_embeddings": description.config.tie_word_embeddings}
        | ({"torch_dtype": "bfloat16"} if "torch_dtype" in raw else {})
    )
    places = [raw, *(raw[key] for key in TEXT_PARTS if isinstance(raw.get(key), dict))]
    for place in places:
        for key in (KEY, OLDER_KEY):
            place.pop(key, None)  # what another tool packed is floats now
    if raw.pop("auto_map", None) is not None:
        log("config.json: auto_map is left out, since the model's own Python files are not copied")
    if (left := description.meta.not_read) and not origin:
        log(f"left out, since --source is not given: {unread_words(left)}")
    for place in places if not origin else ():
        for key in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"):
            if isinstance(place.get(key), int) and place[key] > 0:
                _without_further_layers(place, key, description.config.num_hidden_layers)
                log(f"config.json: {key} is 0 now, since layers that predict further tokens are not kept")
    return raw


def _without_further_layers(raw: dict[str, Any], key: str, layers: int) -> None:
    """Without the layers that ``key`` counts, in lists with a value for each layer too."""
    every = layers + raw[key]
    for name, own in raw.items():
        if isinstance(own, list) and len(own) == every and not name.endswith("_token_id"):
            raw[name] = own[:layers]
    raw[key] = 0


def _shards(
    description: checkpoint.Description, origin: Source | None, copied: list[list[str]], progress: Progress
) -> Iterator[Bundle]:
    config = description.config
    for layer in range(config.num_hidden_layers):
        yield _layer_tensors(description, origin, layer)
        progress("export layers", layer + 1, config.num_hidden_layers)
    top = expanded(checkpoint.top_bundle(description.result, config, description.meta.rest))
    yield {theirs: top[ours] for ours, theirs, _ in tensor_names(config) if not ours.startswith("layers.")}
    for names in copied:
        assert origin is not None
        yield {name: origin.files.read(name) for name in names}
        origin.release()


def _layer_tensors(description: checkpoint.Description, origin: Source | None, layer: int) -> Bundle:
    result, meta, config, plan, _ = description
    bundle = checkpoint.layer_bundle(result, config, plan, meta, layer)
    own = expanded({k.removeprefix("parameters/"): a for k, a in bundle.items() if k.startswith("parameters/")})
    tensors = {}
    for ours, theirs, filed in layer_tensor_names(config, layer):
        name = f"{config.prefix}layers.{layer}.{theirs}"
        beside = origin.files.read(name) if origin and filed is Filed.FIRST else None
        tensors[name] = filed.to_file(own[ours], beside)
    if layer in config.dense_layers:
        return tensors
    widths = plan.channel_widths()[config.moe_layers.index(layer)]
    planes = layer_planes(bundle)
    experts = [_dequantized_expert(_expert(planes, e), widths[e], plan) for e in range(config.num_experts)]
    return tensors | expert_tensors(expert_names(config, layer, meta.fused), experts, own)


def _expert(planes: Planes, expert: int) -> Planes:
    return jax.tree.map(lambda a: a[expert], planes)


def _dequantized_expert(planes: Planes, widths: Int[np.ndarray, "P F"], plan: Plan) -> Triple:
    """bfloat16 gate, up and down (F, D) of one expert whose planes are (P, F, ..), each channel at its width
    (``Plan.channel_widths``). ``plan`` says how large the expert is."""
    out: Float[np.ndarray, "P F D"] | None = None
    for width in WIDTHS:
        if (at := widths == width).any():
            value = np.asarray(dequantize(planes, width).astype(ml_dtypes.bfloat16))
            out = np.zeros_like(value) if out is None else out
            out[at] = value[at]
    assert out is not None
    gate, up, down = out[:, : plan.channels, : plan.hidden_size]
    return gate, up, down
