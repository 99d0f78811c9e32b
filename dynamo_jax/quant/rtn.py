"""Round to nearest on a uniform asymmetric grid a group: the field's plain baseline.

w = (q - z) * s with s = (max - min) / (2^bits - 1), z the rounded offset; s stored in bfloat16, z in a byte.
No clipping search, no calibration (as in "RTN" rows of GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def round_to_nearest(w: Float[Array, "*S D"], bits: int, group_size: int) -> Float[Array, "*S D"]:
    """The dequantized float32 weights; groups of ``group_size`` along the last axis."""
    if w.shape[-1] % group_size:
        raise ValueError(f"last axis {w.shape[-1]} is not a multiple of group_size {group_size}")
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, group_size)
    low = jnp.minimum(groups.min(axis=-1, keepdims=True), 0.0)
    high = jnp.maximum(groups.max(axis=-1, keepdims=True), 0.0)
    scale = ((high - low) / (2**bits - 1)).astype(jnp.bfloat16).astype(jnp.float32)
    scale = jnp.where(scale == 0, 1.0, scale)
    zero = jnp.minimum(jnp.round(-low / scale), 2**bits - 1)  # a scale rounded down would put it past the grid
    q = jnp.clip(jnp.round(groups / scale) + zero, 0, 2**bits - 1)
    return ((q - zero) * scale).reshape(w.shape)


def rtn_bits_per_weight(bits: int, group_size: int) -> float:
    """Codes, a bfloat16 scale and a zero point of one byte a group."""
    return bits + 24 / group_size
