"""A quantized model on disk: a folder of safetensors files and JSON, a file a layer.

    dynamo_jax.json          format version, configuration, names, sizes
    plan.safetensors         plan, page tables, and what calibration knew
    top.safetensors          embeddings, last norm, head
    layer-000.safetensors    a layer's planes and its unquantized parameters
    source/                  config.json, tokenizer and chat template of the model that was quantized

A file a layer, so that a model larger than memory can be written and read in parts. The folder is
written under a temporary name beside its place and renamed when whole: a killed process or a full
disk leaves no half checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Float

from dynamo_jax.files import read_json, whole_folder, write_text
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.models.huggingface import TOKENIZER, UNQUANTIZED
from dynamo_jax.precision.plan import Plan, num_weights
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS
from dynamo_jax.runtime.memory import device_bytes, measuring_bytes
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel, blind, odd_words
from dynamo_jax.runtime.signatures import Signatures
from dynamo_jax.runtime.store import page_tables
from dynamo_jax.settings import from_dict
from dynamo_jax.storage.bundles import (
    Bundle,
    check_planes,
    layer_name,
    planes_bundle,
    read_bundle,
    stacked_planes,
)

FORMAT = 6
NAME = "dynamo_jax quantized model"
META, PLAN, TOP, SOURCE = "dynamo_jax.json", "plan.safetensors", "top.safetensors", "source"
KNOWLEDGE = ("counts", "loss_per_error", "block_errors", "correction")
MONITOR = "monitor/"  # before the names of the signatures' arrays


def is_checkpoint(folder: Path) -> bool:
    return (folder / META).is_file()


def check_free(folder: Path) -> None:
    """An output folder may be missing, empty, or an earlier result of ours."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_checkpoint(folder):
        raise ValueError(f"{folder}: exists and holds something else; choose another folder")


def save(folder: str | Path, model: QuantizedModel) -> None:
    """Write the checkpoint; an earlier checkpoint of that name is replaced when the new one is whole.

    What the folder holds: docs/checkpoints.md. It is larger than the plan's bytes, since all planes up to 8 bits are
    kept for switching. ValueError: ``folder`` exists and is something else. OSError: it cannot be written.
    """
    folder = Path(folder).absolute()
    check_free(folder)
    with whole_folder(folder) as partial:
        arrays = {name: np.asarray(a) for name, a in model.parameters.items()}
        write_tensors(partial / TOP, {name: a for name, a in arrays.items() if not name.startswith("layers.")})
        for layer in range(model.config.num_hidden_layers):
            write_tensors(partial / f"{layer_name(layer)}.safetensors", _layer_bundle(model, arrays, layer))
        sizes = Sizes(model.window, model.spare, model.store.widths[-1])
        describe_to(partial, model.config, model.plan, sizes, model.knowledge, model.files)


def _layer_bundle(model: QuantizedModel, arrays: Bundle, layer: int) -> Bundle:
    prefix = f"layers.{layer}."
    own = {f"parameters/{n.removeprefix(prefix)}": a for n, a in arrays.items() if n.startswith(prefix)}
    if layer in model.config.dense_layers:
        return own
    index = model.config.moe_layers.index(layer)
    return own | planes_bundle(jax.tree.map(lambda a: a[index], model.store))


class Sizes(NamedTuple):
    """Of a quantized model. window: tokens of a calibration window; spare: slots beside the baseline's, as a share of
    its pages; max_width: of the planes."""

    window: int
    spare: float
    max_width: int


def describe_to(
    folder: Path, config: ModelConfig, plan: Plan, sizes: Sizes, knowledge: Knowledge, files: dict[str, bytes]
) -> None:
    """Write all but the layers and the top; the JSON comes last, and makes the folder a checkpoint."""
    known = knowledge
    arrays = {name: np.asarray(getattr(known, name)) for name in KNOWLEDGE}
    arrays |= {MONITOR + name: np.asarray(a) for name, a in known.signatures._asdict().items()}
    tables = {f"page_table{level}": table for level, table in page_tables(plan).items()}
    write_tensors(folder / PLAN, arrays | tables | {"widths": plan.widths})
    (folder / SOURCE).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / SOURCE / name).write_bytes(content)
    meta = {
        "name": NAME,
        "format": FORMAT,
        "config": config.to_dict(),
        "unquantized": UNQUANTIZED,
        **sizes._asdict(),
        "channel_block": plan.channel_block,
        "group_size": plan.group_size,
        "per_projection": plan.apart,
        "names": list(known.names),
        "tokens": known.tokens,
        "calibrated": {name: list(v) for name, v in known.calibrated.items()},
        "odd": {name: list(v) for name, v in known.odd.items()},
    }
    write_text(folder / META, json.dumps(meta, indent=2) + "\n")


def load(folder: str | Path) -> QuantizedModel:
    """The quantized model in ``folder``, planes in host memory.

    ValueError, which names the file: something is missing, damaged, or of another format.
    """
    folder = Path(folder).absolute()
    meta, config, plan, arrays = read_description(folder)
    try:
        for level, table in page_tables(plan).items():
            if not np.array_equal(table, arrays[f"page_table{level}"]):
                raise ValueError(f"the page table of level {level} does not fit the plan")
        knowledge = Knowledge(
            names=tuple(meta["names"]),
            signatures=Signatures(*(jnp.asarray(arrays[MONITOR + name]) for name in Signatures._fields)),
            odd={name: tuple(v) for name, v in meta["odd"].items()},
            calibrated={name: (v[0], v[1]) for name, v in meta["calibrated"].items()},
            tokens=meta["tokens"],
            **{name: arrays[name] for name in KNOWLEDGE},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / PLAN}: does not fit {META}: {error}") from error
    files = {p.name: p.read_bytes() for p in sorted((folder / SOURCE).glob("*"))}
    if TOKENIZER not in files:
        raise ValueError(f"{folder / SOURCE / TOKENIZER}: no such file")
    kept: Bundle = dict(read_bundle(folder / TOP))

    def layer_bundle(name: str) -> Bundle:
        bundle = read_bundle(folder / f"{name}.safetensors")
        check_planes(folder / f"{name}.safetensors", bundle, config, plan, meta["max_width"])
        prefix = f"layers.{int(name.removeprefix('layer-'))}."
        for key in [k for k in bundle if k.startswith("parameters/")]:
            kept[prefix + key.removeprefix("parameters/")] = bundle.pop(key)
        return bundle

    for layer in config.dense_layers:
        layer_bundle(layer_name(layer))
    store = stacked_planes(layer_bundle, config)
    return QuantizedModel(
        config=config,
        parameters={name: jnp.asarray(a) for name, a in kept.items()},
        tokenizer=tokenizers.Tokenizer.from_str(files[TOKENIZER].decode()),
        store=store,
        plan=plan,
        window=meta["window"],
        knowledge=knowledge,
        files=files,
        spare=meta["spare"],
    )


class Description(NamedTuple):
    """All of a checkpoint but its layers."""

    meta: dict[str, Any]
    config: ModelConfig
    plan: Plan
    arrays: Bundle


def read_description(folder: Path) -> Description:
    """The checkpoint's JSON and plan; ValueError where they are missing, damaged or of another format."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not is_checkpoint(folder):
        raise ValueError(f"{folder}: not a {NAME} (no {META})")
    meta = read_json(folder / META)
    if meta.get("name") != NAME or meta.get("format") != FORMAT:
        found = f"format {meta.get('format')!r} of {meta.get('name')!r}"
        raise ValueError(f"{folder / META}: {found}; this version reads format {FORMAT} of {NAME!r}")
    arrays = read_bundle(folder / PLAN)
    try:
        config = from_dict(ModelConfig, meta["config"], "config")
        plan = Plan(
            widths=arrays["widths"],
            channel_block=meta["channel_block"],
            group_size=meta["group_size"],
            hidden_size=config.hidden_size,
            apart=meta["per_projection"],
            channels=config.intermediate_size,
        )
        units = plan.blocks * (2 if plan.apart else 1)
        if plan.widths.shape != (config.num_moe_layers, config.num_experts, units):
            raise ValueError(f"the plan has the shape {plan.widths.shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / META}: damaged: {error}") from error
    return Description(meta, config, plan, arrays)


def describe(folder: Path) -> dict[str, Any]:
    """What ``dynamo-jax inspect`` shows of a quantized model, without reading its layers."""
    meta, config, plan, arrays = read_description(folder)
    names = ("gate and up blocks by width", "down blocks by width") if plan.apart else ("blocks by width",)
    blocks = {}
    for name, part in zip(names, np.split(plan.widths, len(names), axis=2)):
        widths, counts = np.unique(part, return_counts=True)
        blocks[name] = ", ".join(f"{w} bits: {c:,}" for w, c in zip(widths, counts))
    return {
        "family": config.family,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "experts": f"{config.num_moe_layers} layers x {config.num_experts}, top {config.num_experts_per_tok}",
        **_memory(folder, config, plan, meta),
        "channel_block": plan.channel_block,
        "group_size": plan.group_size,
        **blocks,
        "known": {name: v[1] for name, v in meta["calibrated"].items()},
        f"fewer than {PRIOR_ROWS} calibration tokens": hardly_reached(config, arrays["counts"]),
        "monitor": monitor_words(meta["names"], arrays[f"{MONITOR}limit"], meta["tokens"]),
        "not of one kind": "; ".join(odd_words(meta["odd"], {n: v[1] for n, v in meta["calibrated"].items()}))
        or "none",
        "not quantized": meta["unquantized"],
    }


def _memory(folder: Path, config: ModelConfig, plan: Plan, meta: dict[str, Any]) -> dict[str, str]:
    """Bits a weight, and bytes on the device, in host memory and on disk."""
    held, weights = device_bytes(plan, meta["spare"]), num_weights(plan)
    plan_bits, spare, staged, tables = (8 * n / weights for n in held)
    planes = dataclasses.replace(plan, widths=np.full_like(plan.widths, meta["max_width"])).stored_bytes()
    widths = sum(width <= meta["max_width"] for width in WIDTHS)
    measuring = measuring_bytes(config, planes // max(1, config.num_moe_layers), widths)
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    parts = f"plan {plan_bits:.3f}, spare slots {spare:.3f}, pages on their way {staged:.3f}, page tables {tables:.3f}"
    largest = f"all planes up to {meta['max_width']} bits"
    return {
        "bits a weight": f"{8 * held.total / weights:.4f} on the device ({parts})",
        "experts on the device": f"{held.total:,} bytes",
        "measuring novel text": f"{measuring:,} bytes beside activations, between two steps",
        "experts in host memory": f"{planes:,} bytes ({largest}, for switching)",
        "on disk": f"{sum(files):,} bytes ({largest}, and what is not quantized)",
    }


def monitor_words(names: list[str], limit: Float[np.ndarray, " S"], tokens: int) -> str:
    """Where novel text begins, or why nowhere; ``limit``: of log distances, ``tokens``: of calibration."""
    if why := blind(limit, tokens):
        return why
    times = ", ".join(f"{np.exp(value / 2):.2g} ({name})" for name, value in zip(names, limit))
    return f"novel is what lies farther off than a dataset's own windows on the mean, times {times}"


def hardly_reached(config: ModelConfig, counts: Float[np.ndarray, "S L E"]) -> str:
    """The experts that were quantized by their layer's inputs more than by their own, named layer by layer."""
    few = counts.sum(axis=0) < PRIOR_ROWS
    layers = [f"layer {n}: {', '.join(map(str, np.flatnonzero(row)))}" for n, row in zip(config.moe_layers, few)]
    named = [words for words, row in zip(layers, few) if row.any()]
    return f"{int(few.sum())} of {few.size} experts" + (f" ({'; '.join(named)})" if named else "")
