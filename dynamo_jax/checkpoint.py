"""A quantized model on disk: one Orbax checkpoint folder.

arrays/ holds parameters, planes, page tables, plan and signatures; meta/ holds JSON: format version,
configuration, names, the tokenizer. Nothing is pickled. The folder is written under a temporary name
beside its place and renamed when whole, so a killed process or a full disk leaves no half checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tokenizers

from dynamo_jax.kernels.layout import LEVELS, WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.runtime.store import page_tables
from dynamo_jax.settings import from_dict

FORMAT = 1
NAME = "dynamo_jax quantized model"


def is_checkpoint(folder: Path) -> bool:
    return (folder / "meta").is_dir() and (folder / "arrays").is_dir()


def check_free(folder: Path) -> None:
    """An output folder may be missing, empty, or an earlier result of ours."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_checkpoint(folder):
        raise ValueError(f"{folder}: exists and holds something else; choose another --out")


def save(folder: Path, model: QuantizedModel) -> None:
    """Write the checkpoint; an earlier checkpoint of that name is replaced when the new one is whole."""
    folder = folder.absolute()
    check_free(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                partial,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(_arrays(model)), meta=ocp.args.JsonSave(_meta(model))
                ),
            )
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path) -> QuantizedModel:
    """The model in ``folder``; anything missing or damaged is a ValueError that names the folder."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not is_checkpoint(folder):
        raise ValueError(f"{folder}: not a {NAME} (no meta/ and arrays/)")
    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            meta = checkpointer.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            if meta.get("name") != NAME or meta.get("format") != FORMAT:
                raise ValueError(f"format {meta.get('format')!r} of {meta.get('name')!r}; this version reads {FORMAT}")
            restored = checkpointer.restore(folder, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))
        return _model(meta, restored.arrays)
    except Exception as error:  # tensorstore and orbax raise many types on damage
        message = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ValueError(f"{folder}: damaged or incomplete checkpoint: {message}") from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax warns through absl that it takes shardings from the file, which is what we want."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _arrays(model: QuantizedModel) -> dict[str, Any]:
    known = model.knowledge
    store = {f"codes{b}": model.store.codes[b] for b in WIDTHS}
    store |= {f"ratios{b}": model.store.ratios[b] for b in LEVELS}
    return {
        "parameters": {name.replace(".", "/"): a for name, a in model.parameters.items()},
        "planes": store | {"scales": model.store.scales},
        "plan": {"widths": model.plan.widths},
        "page_tables": {str(level): table for level, table in page_tables(model.plan).items()},
        "knowledge": {
            "counts": known.counts,
            "loss_per_error": known.loss_per_error,
            "block_errors": known.block_errors,
            "correction": known.correction,
        },
    }


def _meta(model: QuantizedModel) -> dict[str, Any]:
    known = model.knowledge
    return {
        "name": NAME,
        "format": FORMAT,
        "config": model.config.to_dict(),
        "window": model.window,
        "channel_block": model.plan.channel_block,
        "group_size": model.plan.group_size,
        "names": list(known.names),
        "threshold": known.threshold,
        "tokens": known.tokens,
        "calibrated": {name: list(v) for name, v in known.calibrated.items()},
        "tokenizer": model.tokenizer.to_str(),
    }


def _model(meta: dict[str, Any], arrays: dict[str, Any]) -> QuantizedModel:
    config = from_dict(ModelConfig, meta["config"], "config")
    planes = jax.tree.map(np.asarray, arrays["planes"])
    plan = Plan(
        widths=np.asarray(arrays["plan"]["widths"]),
        channel_block=meta["channel_block"],
        group_size=meta["group_size"],
        hidden_size=config.hidden_size,
    )
    for level, table in page_tables(plan).items():
        if not np.array_equal(table, np.asarray(arrays["page_tables"][str(level)])):
            raise ValueError(f"the page table of level {level} does not fit the plan")
    knowledge = Knowledge(
        names=tuple(meta["names"]),
        threshold=meta["threshold"],
        calibrated={name: (v[0], v[1]) for name, v in meta["calibrated"].items()},
        tokens=meta["tokens"],
        **{name: np.asarray(a) for name, a in arrays["knowledge"].items()},
    )
    return QuantizedModel(
        config=config,
        parameters={name.replace("/", "."): a for name, a in arrays["parameters"].items()},
        tokenizer=tokenizers.Tokenizer.from_str(meta["tokenizer"]),
        store=Planes(
            {b: planes[f"codes{b}"] for b in WIDTHS}, planes["scales"], {b: planes[f"ratios{b}"] for b in LEVELS}
        ),
        plan=plan,
        window=meta["window"],
        knowledge=knowledge,
    )


def describe(model: QuantizedModel) -> dict[str, Any]:
    """What ``dynamo-jax inspect`` shows of a quantized model."""
    widths, counts = np.unique(model.plan.widths, return_counts=True)
    return {
        "experts": f"{model.config.num_moe_layers} layers x {model.config.num_experts}, "
        f"top {model.config.num_experts_per_tok}",
        "bits_per_weight": model.plan.bits_per_weight(),
        "stored_bytes": model.plan.stored_bytes(),
        "channel_block": model.plan.channel_block,
        "group_size": model.plan.group_size,
        "blocks_by_width": {int(w): int(c) for w, c in zip(widths, counts)},
        "known": {name: model.knowledge.calibrated[name][1] for name in model.knowledge.names},
        "novelty_threshold_bits": model.knowledge.threshold,
        "parameters_dtype": str(next(iter(model.parameters.values())).dtype),
        "config": dataclasses.asdict(model.config),
    }
