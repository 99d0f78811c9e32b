"""A plan for novel data, from a window of its own tokens: no labels, no gradients.

One forward pass measures the output error of each block at each width (``observe_windows``). The known datasets' mean
is the prior, worth ``PRIOR_TOKENS`` tokens, so that a short window cannot overturn it. The same number of refinement
pages as in the baseline then goes where it lowers the loss most, and in no eighth of the text are more bytes read
(``adapted_plan``, a small linear program).

Axes: L layers, E experts, M widths of an expert (of its N channel blocks; twice as many where projections are apart),
D hidden, W widths, S windows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.analysis.statistics import Statistics, observe
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import with_parameters
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.precision.allocate import reallocate
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.runtime.store import page_counts

PRIOR_TOKENS = 1024
MOST_SPANS = 8  # of a text, whose reads are bounded one by one: the time to solve grows with them
READ_MARGIN = 0.015  # of the read budget, kept free: windows are a sample of the data to come


class Observation(NamedTuple):
    """What a text showed, as sums over its tokens.

    errors: gate-weighted squared output error of each of an expert's widths, 8 bits taken as exact. counts: routed
    tokens of each window. tokens: of each window.
    """

    errors: Float[np.ndarray, "L E M W"]
    counts: Float[np.ndarray, "S L E"]
    tokens: Float[np.ndarray, " S"]


@functools.partial(jax.jit, static_argnames=("config", "channel_block", "apart"))
def _observe(
    config: ModelConfig,
    parameters: dict[str, Array],
    store: Planes,
    tokens: Int[Array, "B T"],
    channel_block: int,
    apart: bool,
) -> tuple[Statistics, Float[Array, "B L E"]]:
    def layer_weights(width: int, layer: int) -> ExpertWeights:
        own = jax.tree.map(lambda a: a[layer], store)
        return ExpertWeights(*dequantize(own, width).astype(jnp.bfloat16).astype(jnp.float32).swapaxes(0, 1))

    layers = range(config.num_moe_layers)
    full = [layer_weights(8, layer) for layer in layers]
    candidates = [[layer_weights(width, layer) for width in WIDTHS[:-1]] for layer in layers]
    model = with_parameters(config, parameters)
    return observe(model, tokens, jnp.ones(tokens.shape), full, candidates, channel_block, apart)


def observe_windows(model: QuantizedModel, windows: Int[np.ndarray, "S T1"]) -> Observation:
    """Measure the planes on windows of tokens, one after the other, so that one program serves any number."""
    if windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"no tokens to adapt to: {windows.shape[0]} windows of {windows.shape[1]} tokens")
    params = model.device_parameters()
    store = jax.tree.map(jnp.asarray, model.store)
    errors, counts = np.zeros(()), []
    for window in windows:
        tokens = jnp.asarray(window[None, :-1])
        stats, routed = _observe(model.config, params, store, tokens, model.plan.channel_block, model.plan.apart)
        errors = errors + np.asarray(stats.block_errors, np.float64)
        counts.append(np.asarray(routed[0], np.float64))
    each = np.full(len(windows), windows.shape[1] - 1.0)
    return Observation(np.pad(errors, [(0, 0)] * 3 + [(0, 1)]), np.stack(counts), each)


def adapted_plan(plan: Plan, known: Knowledge, seen: Observation, spare: dict[int, int] | None = None) -> Plan:
    """The plan for what was seen: the page counts of ``plan``, the baseline, placed anew.

    Its stored bytes equal the baseline's at most, and so do the bytes read a token under the routing
    of the windows. ``spare``: pages of each level that may be others than the baseline's, any number by default.
    """
    tokens = float(seen.tokens.sum())
    measured = seen.errors / tokens * known.correction[:, :, None, :] * known.loss_per_error[:, None, None, None]
    share = tokens / (tokens + PRIOR_TOKENS)
    errors = share * measured + (1 - share) * known.block_errors
    return placed_anew(plan, errors, seen.counts, seen.tokens, spare=spare)


def placed_anew(
    plan: Plan,
    errors: Float[np.ndarray, "L E M W"],
    counts: Float[np.ndarray, "S L E"],
    tokens: Float[np.ndarray, " S"],
    margin: float = READ_MARGIN,
    spare: dict[int, int] | None = None,
) -> Plan:
    """The pages of ``plan`` where they lower the errors most; in no part of the windows, with ``counts`` of
    ``tokens`` routed to each expert, are more bytes read a token than by ``plan``, less a share of ``margin``."""
    # routing of parts of the text bounds the bytes: a mean over all of it would not carry over
    spans = range(0, len(counts), -(-len(counts) // MOST_SPANS))
    counts, tokens = np.add.reduceat(counts, spans), np.add.reduceat(tokens, spans)
    read = counts[:, :, :, None, None] / tokens[:, None, None, None, None] * plan.costs()
    read = np.broadcast_to(read, (len(counts), *errors.shape)).reshape(len(counts), -1)
    budgets = np.array([plan.bytes_per_token(c, t) for c, t in zip(counts, tokens)])
    least = read.reshape(len(counts), -1, len(WIDTHS))[:, :, 0].sum(axis=1)
    budgets = np.maximum(budgets * (1 - margin), least)
    pages_each = np.tile(plan.pages(), plan.widths[..., 0].size)
    now = plan.widths.reshape(-1)
    widths = reallocate(errors.reshape(-1, len(WIDTHS)), page_counts(plan), read, budgets, pages_each, now, spare)
    return dataclasses.replace(plan, widths=widths.reshape(plan.widths.shape).astype(np.int8))


def adapt(model: QuantizedModel, windows: Int[np.ndarray, "S T1"], spare: dict[int, int] | None = None) -> Plan:
    """``adapted_plan`` of the model for data like ``windows``."""
    return adapted_plan(model.plan, model.knowledge, observe_windows(model, windows), spare)
