"""From sums to significance: what the loss would lose, in nats a token, at each bit-width.

To second order, and with independent errors, adding an error d to a layer's expert output costs
1/2 E[(g . d)^2] nats a token, g being the loss gradient there; for d without a preferred direction
that is E[|g|^2 |d|^2] / 2 D (the empirical Fisher of OBS/SqueezeLLM, arXiv 2306.07629, one number
a token and layer). |d|^2 is measured, for experts and for channel blocks; the statistics hold the sums of
|g|^2 |d|^2 / 2 D (``statistics.token_importance``).

Axes: L layers, E experts, N channel blocks of C channels, F = N*C, D hidden, W widths.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from dynamo_jax.analysis.statistics import Statistics


def expert_significance(stats: Statistics) -> Float[np.ndarray, "L E W"]:
    """Predicted loss, nats a token, when one expert alone is quantized to each width; nan without tokens."""
    return per_token(stats.errors, stats)


def apart_significance(stats: Statistics) -> Float[np.ndarray, "L E U W"]:
    """As ``expert_significance``, when only an expert's gate and up are quantized, and when only its down is."""
    return per_token(stats.apart_errors, stats)


def block_significance(stats: Statistics) -> Float[np.ndarray, "L E N W"]:
    """The same when one channel block alone is quantized to each width; where its gate and up were measured apart
    from its down, the sum of the two."""
    blocks = np.asarray(stats.block_errors)
    if np.shape(stats.apart_errors)[2]:
        layers, experts, both, widths = blocks.shape
        blocks = blocks.reshape(layers, experts, 2, both // 2, widths).sum(axis=2)
    return per_token(blocks, stats)


def per_token(sums: Float[ArrayLike, "L ..."], stats: Statistics) -> Float[np.ndarray, "L ..."]:
    """Means over the tokens of each layer, float64; nan without tokens."""
    sums = np.asarray(sums, np.float64)
    tokens = np.asarray(stats.tokens, np.float64).reshape(-1, *[1] * (sums.ndim - 1))
    return np.divide(sums, tokens, out=np.full(sums.shape, math.nan), where=tokens > 0)


def channel_significance(stats: Statistics, down: Float[ArrayLike, "L E F D"]) -> Float[np.ndarray, "L E F"]:
    """Mean over tokens of g^2 h_f^2 times |down_f|^2: the output energy that goes through the channel."""
    energy = stats.hidden_energy * jnp.sum(jnp.asarray(down, jnp.float32) ** 2, axis=-1)
    return np.asarray(energy / stats.tokens[:, None, None])


def cost_of_row(
    sums: Float[np.ndarray, "L E ..."], rows: Float[np.ndarray, "L E"], prior_rows: float
) -> Float[np.ndarray, "L E ..."]:
    """What a row costs at each expert, given the sums over its rows: the mean, with ``prior_rows`` more rows that
    cost what a row of its layer does, so that few rows say little and none nothing."""
    more = (..., *[None] * (sums.ndim - 2))
    of_layer = sums.sum(axis=1, keepdims=True) / np.maximum(rows.sum(axis=1, keepdims=True), 1)[more]
    return (sums + prior_rows * of_layer) / (rows + prior_rows)[more]


def whole_over_blocks(
    whole: Float[np.ndarray, "L E W"], blocks: Float[np.ndarray, "L E N W"]
) -> Float[np.ndarray, "L E W"]:
    """The error of a whole expert over the sum of its blocks' alone: what the blocks' errors have in common, or
    cancel. 1 where calibration sent the expert nothing."""
    total = blocks.sum(axis=2)
    ratio = np.divide(whole, total, out=np.ones_like(total), where=total > 0)
    return np.clip(ratio, 0.1, 10.0)
