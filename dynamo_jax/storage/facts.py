"""What a quantized model says of itself in words: to ``inspect``, and at the end of ``quantize``.

Axes: A datasets, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.huggingface import unread_words
from dynamo_jax.models.rest import FLOAT
from dynamo_jax.precision.plan import Plan, num_weights
from dynamo_jax.quant.nested_gptq import PRIOR_ROWS
from dynamo_jax.runtime.memory import device_bytes, measuring_bytes
from dynamo_jax.runtime.quantized import blind, odd_words
from dynamo_jax.storage.bundles import Bundle
from dynamo_jax.storage.checkpoint import MONITOR, Description, Meta, read_description
from dynamo_jax.storage.results import Result

MORE = 16  # times as many windows, at most, are proposed for experts that calibration hardly reached


def summary(folder: Path) -> dict[str, str]:
    """What ``quantize`` says when it is done: sizes, what the plan is expected to lose, what to watch.

    The loss is the sum of what each expert's width was measured to cost in calibration, to second order.
    """
    description = read_description(folder)
    meta, plan, arrays = description.meta, description.plan, description.arrays
    held = device_bytes(plan, meta.spare).total
    before = f"{bytes_words(meta.expert_bytes + meta.other_bytes)} before; " if meta.expert_bytes else ""
    others, of_bits = meta.rest_bytes or meta.other_bytes, f" (rest: {meta.rest} bits)" if meta.rest != FLOAT else ""
    rest = f", {bytes_words(others)} for all else{of_bits}" if others else of_bits
    bits = f"{8 * held / num_weights(plan):.2f} bits a weight"
    predicted = float(plan.chosen(arrays["block_errors"]).sum())
    few = (_rows(arrays) < PRIOR_ROWS).sum()
    return {
        "size": f"{before}{bytes_words(held)} for the experts ({bits}){rest} on the device",
        "host": f"{bytes_words(_planes_bytes(plan, meta))} in host memory, "
        f"{bytes_words(description.result.size())} on disk: all planes, so that precision can move",
        "loss": f"{predicted:.4f} nats a token more than unquantized, predicted for the known datasets",
        "experts": f"{few} of {arrays['counts'][0].size} had fewer than {PRIOR_ROWS} calibration tokens"
        + (f"; {_remedy(description)}" if few else ""),
        "monitor": monitor_words(meta.names, arrays[f"{MONITOR}limit"], meta.tokens),
        "odd text": _odd(meta),
        **_source(plan, meta),
        "not read": unread_words(meta.not_read),
    }


def _rows(arrays: Bundle) -> Float[np.ndarray, "L E"]:
    """Calibration tokens of each expert."""
    return arrays["counts"].sum(axis=0) + arrays.get("unseen", np.float32(0))


def _source(plan: Plan, meta: Meta) -> dict[str, str]:
    """What the experts came in, if that is known, and how much of the plan is wider."""
    if not meta.expert_format:
        return {}
    bits = 8 * meta.expert_bytes / num_weights(plan)
    wider = int((plan.widths > bits).sum())
    said = f"; {wider:,} of {plan.widths.size:,} blocks are wider, which cannot win back what it lacks" if wider else ""
    return {"source": f"experts: {meta.expert_format}, {bits:.2f} bits a weight{said}"}


def bytes_words(number: float) -> str:
    """In the unit that reads best."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1000:
            return f"{number:,.3g} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def _odd(meta: Meta) -> str:
    return "; ".join(odd_words(meta.odd, {n: v[1] for n, v in meta.calibrated.items()})) or "none"


def _remedy(description: Description) -> str:
    """How many windows would reach the experts that calibration hardly did."""
    meta, counts = description.meta, _rows(description.arrays)
    few = counts < PRIOR_ROWS
    times = PRIOR_ROWS / np.maximum(counts[few], 1e-9)
    reached = times <= MORE
    windows = max(v[1] for v in meta.calibrated.values())
    if not reached.any():
        return "more windows of the same text would hardly reach them"
    wanted = int(np.ceil(windows * times[reached].max()))
    return f"--windows {wanted} would reach {'all' if reached.all() else f'{reached.sum()}'} of them"


def _planes_bytes(plan: Plan, meta: Meta) -> int:
    return dataclasses.replace(plan, widths=np.full_like(plan.widths, meta.max_width)).stored_bytes()


def memory(folder: Path) -> dict[str, str]:
    """Bits a weight of a quantized model, and its bytes on the device, in host memory and on disk."""
    result, meta, config, plan, _ = read_description(folder)
    return _memory(result, config, plan, meta)


def describe(folder: Path) -> dict[str, Any]:
    """What ``dynamo-jax inspect`` shows of a quantized model, without reading its layers."""
    result, meta, config, plan, arrays = read_description(folder)
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
        "positions": config.positions,
        "experts": f"{config.num_moe_layers} layers x {config.num_experts}, top {config.num_experts_per_tok}",
        **_memory(result, config, plan, meta),
        "channel_block": plan.channel_block,
        "group_size": plan.group_size,
        **blocks,
        "known": {name: v[1] for name, v in meta.calibrated.items()},
        **_beside_known(config, meta, arrays),
        f"fewer than {PRIOR_ROWS} calibration tokens": hardly_reached(config, _rows(arrays)),
        "monitor": monitor_words(meta.names, arrays[f"{MONITOR}limit"], meta.tokens),
        "not of one kind": _odd(meta),
        "not quantized": meta.unquantized,
        **_source(plan, meta),
        "not read": unread_words(meta.not_read),
    }


def _memory(result: Result, config: ModelConfig, plan: Plan, meta: Meta) -> dict[str, str]:
    """Bits a weight, and bytes on the device, in host memory and on disk."""
    held, weights = device_bytes(plan, meta.spare), num_weights(plan)
    plan_bits, spare, staged, tables = (8 * n / weights for n in held)
    planes = _planes_bytes(plan, meta)
    widths = sum(width <= meta.max_width for width in WIDTHS)
    measuring = measuring_bytes(config, planes // max(1, config.num_moe_layers), widths)
    parts = f"plan {plan_bits:.3f}, spare slots {spare:.3f}, pages on their way {staged:.3f}, page tables {tables:.3f}"
    largest = f"all planes up to {meta.max_width} bits"
    return {
        "bits a weight": f"{8 * held.total / weights:.4f} on the device ({parts})",
        "experts on the device": f"{held.total:,} bytes",
        "measuring novel text": f"{measuring:,} bytes beside activations, between two steps",
        **_others(meta),
        "experts in host memory": f"{planes:,} bytes ({largest}, for switching)",
        "on disk": f"{result.size():,} bytes ({largest}, and all else)",
    }


def _others(meta: Meta) -> dict[str, str]:
    """What is no expert's, as far as its bytes are known."""
    found = {"rest": "its own dtype" if meta.rest == FLOAT else f"{meta.rest} bits"}
    if others := meta.rest_bytes or meta.other_bytes:
        found["all else on the device"] = f"{others:,} bytes"
    return found


def monitor_words(names: Sequence[str], limit: Float[np.ndarray, " S"], tokens: int) -> str:
    """Where novel text begins, or why nowhere; ``limit``: of log distances, ``tokens``: of calibration."""
    if why := blind(limit, tokens):
        return why
    times = ", ".join(f"{np.exp(value / 2):.2g} ({name})" for name, value in zip(names, limit))
    return f"novel is what lies farther off than a dataset's own windows on the mean, times {times}"


def _beside_known(config: ModelConfig, meta: Meta, arrays: Bundle) -> dict[str, str]:
    """What else calibration was given, and what the planes were trained on."""
    found = {}
    if "unseen" in arrays and (rows := float(arrays["unseen"][0].sum())):
        found["unseen"] = f"{rows / config.num_experts_per_tok:,.0f} tokens that stand for what nobody has seen"
    if trained := ((meta.job or {}).get("settings") or {}).get("distil"):
        found["distilled"] = f"on {trained:,} tokens"
    return found


def hardly_reached(config: ModelConfig, rows: Float[np.ndarray, "L E"]) -> str:
    """The experts that were quantized by their layer's inputs more than by their own, named layer by layer."""
    few = rows < PRIOR_ROWS
    layers = [f"layer {n}: {', '.join(map(str, np.flatnonzero(row)))}" for n, row in zip(config.moe_layers, few)]
    named = [words for words, row in zip(layers, few) if row.any()]
    return f"{int(few.sum())} of {few.size} experts" + (f" ({'; '.join(named)})" if named else "")
