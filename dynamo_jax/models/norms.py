"""Normalization, and how parameters start.

Axes: D hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynamo_jax.models.config import ModelConfig


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


class Norm(nnx.Module):
    """RMS norm, or LayerNorm with a bias where the configuration says so."""

    def __init__(self, config: ModelConfig):
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size)) if config.layer_norm else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.bias is None:
            return rms_norm(x, self.scale[...], self.eps)
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape) * config.initializer_range)
