"""Rotary positions and the ways in which families stretch them to longer contexts.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); YaRN (2309.00071, section
3); LongRoPE (2402.13753); llama3: the Llama 3 report (2407.21783, section 3.4.2).

Axes: B batch, T tokens, H heads, C head size, K = C/2 frequencies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.specs import Rope


class Angles(NamedTuple):
    """Cosines and sines of each position, float32, (B, T, K), scaled as the rope type asks for."""

    cos: Float[Array, "B T K"]
    sin: Float[Array, "B T K"]


def frequencies(rope: Rope, positions: int) -> tuple[Float[np.ndarray, " K"], float]:
    """Radians a position for each pair of dimensions, and the factor of cosines and sines. positions: of the model."""
    scaling = rope.scaling
    dim = rope.dim
    plain = float(rope.rope_theta) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    length = scaling.original_max_position_embeddings or positions
    if scaling.rope_type == "default":
        return plain, 1.0
    if scaling.rope_type == "ntk_alpha":
        return plain * scaling.alpha ** (-np.arange(0, dim, 2) / (dim - 2)), 1.0
    if scaling.rope_type == "proportional":
        turned = np.arange(dim // 2) < int(scaling.partial_rotary_factor * dim // 2)
        return np.where(turned, plain / scaling.factor, 0.0), 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        turns = length * plain / (2 * math.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)
        return plain * (smooth + (1 - smooth) / scaling.factor), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(rope, plain, length)
    longer = math.sqrt(1 + math.log(scaling.factor) / math.log(length)) if scaling.factor > 1 else 1.0
    return plain / np.asarray(scaling.short_factor), scaling.attention_factor or longer


def _yarn(rope: Rope, plain: np.ndarray, length: int) -> tuple[np.ndarray, float]:
    scaling, dim = rope.scaling, rope.dim

    def index_of(turns: float) -> float:
        """The frequency index that makes ``turns`` turns over the original length."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    factor = scaling.attention_factor
    if not factor:
        factor = yarn_mscale(scaling.factor, 1.0)
        if scaling.mscale and scaling.mscale_all_dim:
            factor = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return plain * (1 - ramp) + plain / scaling.factor * ramp, factor


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def angles(config: ModelConfig, positions: Int[Array, "B T"]) -> tuple[Angles, ...]:
    """Of each of ``config.ropes``."""
    found = []
    for rope in config.ropes:
        frequency, factor = frequencies(rope, config.max_position_embeddings)
        angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
        found.append(Angles(jnp.cos(angle) * factor, jnp.sin(angle) * factor))
    return tuple(found)


def rotate(x: Float[Array, "B T H C"], at: Angles, interleave: bool = False) -> Float[Array, "B T H C"]:
    """Rotate the halves of each head's first 2K numbers against each other, or, interleaved, their even ones against
    their odd ones; the result then has the even ones first. That order is the same for queries and keys, so it cancels.
    """
    x32 = x[..., : 2 * at.cos.shape[-1]].astype(jnp.float32)
    a, b = (x32[..., 0::2], x32[..., 1::2]) if interleave else jnp.split(x32, 2, axis=-1)
    cos, sin = at.cos[:, :, None, :], at.sin[:, :, None, :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., turned.shape[-1] :]], axis=-1) if turned.shape != x.shape else turned
