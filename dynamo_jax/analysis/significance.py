"""From sums to significance: what the loss would lose, in nats a token, at each bit-width.

To second order, and with independent errors, adding an error d to a layer's expert output costs
1/2 E[(g . d)^2] nats a token, g being the loss gradient there; for d without a preferred direction
that is 1/2 E|g|^2 E|d|^2 / D (the empirical Fisher of OBS/SqueezeLLM, arXiv 2306.07629, one number
a layer). |d|^2 is measured for experts; for channel blocks it is predicted from channel energies.

Axes: L layers, E experts, N channel blocks of C channels, F = N*C, D hidden, W widths.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dynamo_jax.analysis.statistics import Statistics


def expert_significance(stats: Statistics, sensitivity: Float[ArrayLike, " L"]) -> Float[np.ndarray, "L E W"]:
    """Predicted loss, nats a token, when one expert alone is quantized to each width.

    ``sensitivity``: the sum of ``output_sensitivity`` over the same tokens.
    """
    return np.asarray(stats.errors) * loss_per_error(stats, sensitivity)[:, None, None]


def loss_per_error(stats: Statistics, sensitivity: Float[ArrayLike, " L"]) -> Float[np.ndarray, " L"]:
    """Nats a token for each unit of summed squared output error, by layer."""
    tokens = np.asarray(stats.tokens, np.float64)
    hidden_size = stats.input_energy.shape[-1]
    return 0.5 * np.asarray(sensitivity, np.float64) / tokens / hidden_size / tokens


def channel_significance(stats: Statistics, down: Float[ArrayLike, "L E F D"]) -> Float[np.ndarray, "L E F"]:
    """Mean over tokens of g^2 h_f^2 times |down_f|^2: the output energy that goes through the channel."""
    energy = stats.hidden_energy * jnp.sum(jnp.asarray(down, jnp.float32) ** 2, axis=-1)
    return np.asarray(energy / stats.tokens[:, None, None])


def block_errors(
    stats: Statistics,
    down: Float[ArrayLike, "L E F D"],
    deltas: Float[Array, "L P E F D"],
    channel_block: int,
) -> Float[Array, "L E N"]:
    """Predicted sum over tokens of g^2 |output error|^2 when each block is at one width.

    ``deltas``: weight errors at that width, gate, up, down. Input dimensions are taken as
    uncorrelated, and the three projections' errors as independent, so squares add.
    """
    gate, up, down_error = deltas[:, 0], deltas[:, 1], deltas[:, 2]
    input_sq = stats.input_energy / jnp.maximum(stats.gate_sq, 1e-30)[..., None]
    reach = jnp.sum(jnp.asarray(down, jnp.float32) ** 2, axis=-1)
    through_gate = stats.gate_gain * jnp.einsum("lefd,led->lef", gate**2, input_sq)
    through_up = stats.up_gain * jnp.einsum("lefd,led->lef", up**2, input_sq)
    direct = stats.hidden_energy * jnp.sum(down_error**2, axis=-1)
    per_channel = reach * (through_gate + through_up) + direct
    layers, experts, channels = per_channel.shape
    return per_channel.reshape(layers, experts, channels // channel_block, channel_block).sum(axis=-1)


def measured_over_predicted(
    measured: Float[np.ndarray, "L E W"], predicted: Float[np.ndarray, "L E N W"]
) -> Float[np.ndarray, "L E W"]:
    """How far the prediction is off for each expert; 1 where calibration sent it nothing."""
    total = predicted.sum(axis=2)
    ratio = np.divide(measured, total, out=np.ones_like(total), where=total > 0)
    return np.clip(ratio, 0.1, 10.0)
