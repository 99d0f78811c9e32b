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


def norm_weight(config: ModelConfig, size: int) -> nnx.Param:
    """A norm's weight, such that it multiplies by 1."""
    return nnx.Param(jnp.zeros(size) if config.zero_centred_norms else jnp.ones(size))


def norm_scale(config: ModelConfig, weight: nnx.Param) -> Float[Array, " D"]:
    """What a norm with this weight multiplies by; one more than it in float32 where weights are zero-centred."""
    return 1.0 + weight[...].astype(jnp.float32) if config.zero_centred_norms else weight[...]


class Norm(nnx.Module):
    """RMS norm, or LayerNorm with a bias where the configuration says so."""

    def __init__(self, config: ModelConfig):
        self.config, self.eps = config, config.rms_norm_eps
        self.scale = norm_weight(config, config.hidden_size)
        self.bias = nnx.Param(jnp.zeros(config.hidden_size)) if config.layer_norm else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = norm_scale(self.config, self.scale)
        if self.bias is None:
            return rms_norm(x, scale, self.eps)
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * scale + self.bias[...]).astype(x.dtype)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape) * config.initializer_range)
