"""A short causal convolution between two gates, in place of attention (LFM2, arXiv 2511.23404).

    B, C, x = in_proj(input);  out = out_proj(C * convolution(B * x))

It sees ``conv_L_cache`` tokens, the newest one too, each channel by itself. A token that is padding is not seen.

Axes: B batch, T tokens, D hidden, W tokens that the convolution sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.convolution import convolved
from dynamo_jax.models.norms import normal
from dynamo_jax.models.specs import ShortConv


class ConvCache(NamedTuple):
    """What one layer keeps. window: the convolution's inputs of the newest tokens, zeros before the first one."""

    window: Float[Array, "B W-1 D"]


class ShortConvolution(nnx.Module):
    """The mixer with its projections (in, out); in_proj gives both gates, then what is convolved."""

    def __init__(self, config: ModelConfig, spec: ShortConv, *, rngs: nnx.Rngs):
        c = config
        self.spec = spec
        self.in_proj = normal(rngs, (c.hidden_size, 3 * c.hidden_size), c)
        self.conv = normal(rngs, (c.hidden_size, 1, spec.conv_L_cache), c)
        self.out = normal(rngs, (c.hidden_size, c.hidden_size), c)
        if spec.conv_bias:
            sizes = (3 * c.hidden_size, c.hidden_size, c.hidden_size)
            self.in_bias, self.conv_bias, self.out_bias = (nnx.Param(jnp.zeros(n)) for n in sizes)

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: ConvCache | None
    ) -> tuple[Float[Array, "B T D"], ConvCache | None]:
        before = empty_cache(self.spec, x.shape[0], 0, x.dtype) if cache is None else cache
        first, last, own = jnp.split(self.product(x, "in_proj", "in_bias"), 3, axis=-1)
        mixed, window = convolved(first * own, self.conv[...][:, 0], before.window, places.mask, self.with_bias)
        out = self.product(last * mixed, "out", "out_bias")
        return out, None if cache is None else ConvCache(window.astype(cache.window.dtype))

    def product(self, x: Float[Array, "B T C"], weights: str, bias: str) -> Float[Array, "B T E"]:
        out = matmul(x.reshape(-1, x.shape[-1]), getattr(self, weights)[...].astype(x.dtype))
        out = out + getattr(self, bias)[...].astype(x.dtype) if self.spec.conv_bias else out
        return out.reshape(*x.shape[:2], -1)

    def with_bias(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x + self.conv_bias[...].astype(x.dtype) if self.spec.conv_bias else x


def empty_cache(spec: ShortConv, batch: int, capacity: int, dtype: Any) -> ConvCache:
    """One layer's cache; it is of one size, whatever the ``capacity``."""
    return ConvCache(jnp.zeros((batch, spec.conv_L_cache - 1, spec.channels), dtype))
