"""Text to a quantized model: analyze the known datasets, allocate, quantize.

The stages are functions of arrays from the packages below; this module only carries the data from
one to the next, in batches of one compiled shape, and tells a progress callback where it is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from dynamo_jax.analysis.significance import (
    channel_significance,
    expert_significance,
    loss_per_error,
    measured_over_predicted,
)
from dynamo_jax.analysis.statistics import Statistics, merge, observe, output_sensitivity
from dynamo_jax.data import token_windows
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters, with_parameters
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.precision.allocate import allocate
from dynamo_jax.precision.plan import Plan, block_costs, expert_plan
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.runtime.adapt import predicted_block_errors
from dynamo_jax.runtime.monitor import novelty_threshold
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.runtime.store import quantize_experts

Progress = Callable[[str, int, int], None]  # (stage, done, of)


def no_progress(stage: str, done: int, of: int) -> None:
    """The callback that shows nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What ``dynamo-jax quantize`` decides by. bits counts scales; windows are of ``window`` tokens."""

    bits: float = 3.0
    group_size: int = 64
    channel_block: int = 16
    window: int = 256
    calibration_windows: int = 32
    adaptation_windows: int = 8
    batch_size: int = 8


class Analysis(NamedTuple):
    """One dataset's sums. windows: routing counts of each window (S, L, E)."""

    stats: Statistics
    sensitivity: Float[np.ndarray, " L"]
    windows: Float[np.ndarray, "S L E"]

    def expert_significance(self) -> Float[np.ndarray, "L E W"]:
        return expert_significance(self.stats, self.sensitivity)

    def channel_significance(self, down: Float[ArrayLike, "L E F D"]) -> Float[np.ndarray, "L E F"]:
        return channel_significance(self.stats, down)


@functools.partial(jax.jit, static_argnames="config")
def _analyze_batch(
    config: ModelConfig,
    params: dict[str, Array],
    candidates: list[list[ExpertWeights]],
    tokens: Int[Array, "B T1"],
    mask: Float[Array, "B T"],
) -> tuple[Statistics, Float[Array, " L"], Float[Array, "B L E"]]:
    model = with_parameters(config, params)
    weights = [layer_weights(model, i) for i in range(config.num_moe_layers)]
    stats, counts = observe(model, tokens[:, :-1], mask, weights, candidates)
    return stats, output_sensitivity(model, tokens, mask), counts


def layer_weights(model: Decoder, layer: int) -> ExpertWeights:
    weights = model.moe_layers()[layer].expert_weights()
    assert weights is not None
    return weights


def batches(windows: Int[np.ndarray, "S T1"], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of exactly ``size`` windows with masks (size, T); the last one is filled with masked copies."""
    out = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        mask = np.zeros((size, windows.shape[1] - 1), np.float32)
        mask[: len(part)] = 1
        out.append((np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)]), mask))
    return out


def candidate_weights(store: Planes) -> list[list[ExpertWeights]]:
    """For each layer, its experts at each width."""
    by_width = [dequantize(store, width) for width in WIDTHS]  # (L, E, P, F, D) each
    return [[ExpertWeights(*w[layer].swapaxes(0, 1)) for w in by_width] for layer in range(len(by_width[0]))]


def analyze(
    model: Decoder,
    candidates: list[list[ExpertWeights]],
    windows: Int[np.ndarray, "S T1"],
    batch_size: int,
    name: str = "",
    progress: Progress = no_progress,
) -> Analysis:
    """Stream the windows of one dataset through the model; see ``analysis.statistics``."""
    params = {k: v.astype(jnp.float32) for k, v in parameters(model).items()}
    total: tuple[Statistics, Array] | None = None
    counts = []
    parts = batches(windows, batch_size)
    for index, (tokens, mask) in enumerate(parts):
        stats, sensitivity, routed = _analyze_batch(model.config, params, candidates, tokens, mask)
        counts.append(np.asarray(routed)[mask[:, 0] > 0])
        total = (stats, sensitivity) if total is None else (merge(total[0], stats), total[1] + sensitivity)
        progress(f"analyze {name}", index + 1, len(parts))
    assert total is not None
    return Analysis(total[0], np.asarray(total[1]), np.concatenate(counts))


def baseline_plan(analyses: list[Analysis], config: QuantizeConfig, model: ModelConfig) -> Plan:
    """One width an expert, least loss summed over the known datasets, under the byte budget."""
    costs = block_costs(config.channel_block, model.hidden_size, config.group_size)
    blocks = model.intermediate_size // config.channel_block
    least = 8 * costs[0] / (3 * config.channel_block * model.hidden_size)
    if config.bits < least:
        raise ValueError(
            f"a budget of {config.bits:g} bits a weight is too small: the least is {least:g}, "
            f"2 bits and a scale for each group of {config.group_size}"
        )
    errors = np.sum([a.expert_significance() for a in analyses], axis=0)
    items = errors.reshape(-1, len(WIDTHS))
    budget = config.bits * model.num_expert_weights / 8
    widths = allocate(items, np.broadcast_to(costs * blocks, items.shape), budget)
    shape = (model.num_moe_layers, model.num_experts)
    return expert_plan(widths.reshape(shape), blocks, config.channel_block, config.group_size, model.hidden_size)


def knowledge_of(
    analyses: dict[str, Analysis],
    store: Planes,
    weights: Float[Array, "L E P F D"],
    config: QuantizeConfig,
    calibrated: dict[str, tuple[str, int]],
) -> Knowledge:
    """Signatures, prior errors and corrections of the known datasets together."""
    runs = list(analyses.values())
    stats = functools.reduce(merge, (a.stats for a in runs))
    sensitivity = np.sum([a.sensitivity for a in runs], axis=0)
    tokens = float(stats.tokens[0])
    predicted = predicted_block_errors(store, stats, config.channel_block, weights)
    correction = measured_over_predicted(np.asarray(stats.errors), predicted)
    per_error = loss_per_error(stats, sensitivity) * tokens
    block_errors = predicted * correction[:, :, None, :] / tokens * per_error[:, None, None, None]
    return Knowledge(
        names=tuple(analyses),
        counts=np.stack([np.asarray(a.stats.counts) for a in runs]),
        threshold=novelty_threshold({n: a.windows for n, a in analyses.items()}, config.adaptation_windows),
        loss_per_error=per_error,
        block_errors=block_errors,
        correction=correction,
        calibrated=calibrated,
        tokens=int(tokens),
    )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def quantize(
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    known: dict[str, str],
    config: QuantizeConfig,
    progress: Progress = no_progress,
) -> tuple[QuantizedModel, dict[str, Analysis]]:
    """Analyze the known texts (name -> text), allocate the baseline under ``config.bits``, quantize."""
    check_shapes(model.config, config)
    if not known:
        raise ValueError("no known dataset: calibration needs at least one")
    windows = {
        name: token_windows(text, tokenizer, config.window, name, config.calibration_windows)
        for name, text in known.items()
    }
    layers = [layer_weights(model, i) for i in range(model.config.num_moe_layers)]
    progress("quantize planes", 0, 1)
    store = quantize_experts(layers, config.group_size)
    progress("quantize planes", 1, 1)
    candidates = candidate_weights(store)
    analyses = {name: analyze(model, candidates, w, config.batch_size, name, progress) for name, w in windows.items()}
    progress("allocate", 0, 1)
    plan = baseline_plan(list(analyses.values()), config, model.config)
    full = jnp.stack([jnp.stack(w, axis=1) for w in layers]).astype(jnp.float32)
    calibrated = {name: (digest(known[name]), len(w)) for name, w in windows.items()}
    knowledge = knowledge_of(analyses, store, full, config, calibrated)
    progress("allocate", 1, 1)
    experts = set(expert_parameter_names(model.config))
    rest = {name: a for name, a in parameters(model).items() if name not in experts}
    quantized = QuantizedModel(
        config=model.config,
        parameters=rest,
        tokenizer=tokenizer,
        store=store,
        plan=plan,
        window=config.window,
        knowledge=knowledge,
    )
    return quantized, analyses


def check_shapes(model: ModelConfig, config: QuantizeConfig) -> None:
    if model.intermediate_size % config.channel_block:
        raise ValueError(f"channel_block {config.channel_block} does not divide the {model.intermediate_size} channels")
    if model.hidden_size % config.group_size or config.group_size % 8:
        raise ValueError(
            f"group_size {config.group_size} does not divide the hidden size {model.hidden_size} in eights"
        )
    if config.window > model.max_position_embeddings:
        raise ValueError(f"window {config.window} is past the model's {model.max_position_embeddings} positions")
