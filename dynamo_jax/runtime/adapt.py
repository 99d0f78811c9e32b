"""A plan for novel data, from a window of its own tokens: no labels, no gradients.

One forward pass measures the output error of each block at each width. The known datasets' mean is the prior, worth
``PRIOR_TOKENS`` tokens, so that a short window cannot overturn it. The same number of refinement
pages as in the baseline then goes where it lowers the loss most, and in no window are more bytes read.

Axes: L layers, E experts, M widths of an expert (of its N channel blocks; twice as many where projections are apart),
D hidden, W widths, S windows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools

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
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.store import page_counts

PRIOR_TOKENS = 1024
READ_MARGIN = 0.015  # of the read budget, kept free: windows are a sample of the data to come


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


def adapt(model: QuantizedModel, windows: Int[np.ndarray, "S T1"]) -> Plan:
    """The plan for data like ``windows``: the baseline's page counts, placed anew.

    Its stored bytes equal the baseline's at most, and so do the bytes read a token under the routing
    of the windows.
    """
    if len(windows) == 0:
        raise ValueError("no tokens to adapt to")
    plan, known = model.plan, model.knowledge
    params = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in model.parameters.items()}
    store = jax.tree.map(jnp.asarray, model.store)
    stats, counts = _observe(model.config, params, store, jnp.asarray(windows[:, :-1]), plan.channel_block, plan.apart)
    tokens = windows[:, 1:].size

    # the 8-bit weights stand for those that were quantized, so their own error is taken as none
    measured = np.pad(np.asarray(stats.block_errors), [(0, 0)] * 3 + [(0, 1)]) / tokens
    seen = measured * known.correction[:, :, None, :] * known.loss_per_error[:, None, None, None]
    share = tokens / (tokens + PRIOR_TOKENS)
    errors = share * seen + (1 - share) * known.block_errors

    routed = np.asarray(counts, np.float64)  # each window's own routing bounds the bytes: a mean would not carry over
    read = routed[:, :, :, None, None] / windows[0, 1:].size * plan.costs()
    read = np.broadcast_to(read, (len(windows), *errors.shape)).reshape(len(windows), -1)
    budgets = np.array([plan.bytes_per_token(c, windows[0, 1:].size) for c in routed])
    least = read.reshape(len(windows), -1, len(WIDTHS))[:, :, 0].sum(axis=1)
    budgets = np.maximum(budgets * (1 - READ_MARGIN), least)
    pages_each = np.tile(plan.pages(), plan.widths[..., 0].size)
    widths = reallocate(errors.reshape(-1, len(WIDTHS)), page_counts(plan), read, budgets, pages_each)
    return dataclasses.replace(plan, widths=widths.reshape(plan.widths.shape).astype(np.int8))
