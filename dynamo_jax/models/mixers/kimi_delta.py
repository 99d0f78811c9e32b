"""Kimi's delta attention: the delta rule of ``delta_rule.py`` with a decay for each row of a head's state (arXiv
2510.26692, section 3).

Of a row, decay = -exp(a_log) softplus(f + dt_bias), or -limit sigmoid(exp(a_log) (f + dt_bias)); of a head,
beta = sigmoid(b). Queries, keys and values each go through a short causal convolution and SiLU before, and the output
is normed and multiplied by sigmoid(g). A token that is padding has decay 0 and beta 0, and the convolution does not
see it.

Axes: B batch, T tokens, D hidden, J heads, K head size, W tokens that the convolution sees.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import Places
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.convolution import convolved
from dynamo_jax.models.delta_rule import DeltaCache, Tokens, advance, tokens_of
from dynamo_jax.models.norms import normal, rms_norm
from dynamo_jax.models.specs import KimiDelta

A_RANGE = (1.0, 16.0)  # of exp(a_log) before training


class KimiDeltaAttention(nnx.Module):
    """The mixer with its projections (in, out)."""

    def __init__(self, config: ModelConfig, spec: KimiDelta, *, rngs: nnx.Rngs):
        c, s = config, spec
        heads, size, of_all = s.linear_num_heads, s.linear_head_dim, s.linear_num_heads * s.linear_head_dim
        self.config, self.spec = c, s
        self.q, self.k, self.v = (normal(rngs, (c.hidden_size, of_all), c) for _ in range(3))
        shape = (of_all, 1, s.linear_conv_kernel_dim)
        self.q_conv, self.k_conv, self.v_conv = (normal(rngs, shape, c) for _ in range(3))
        self.b = normal(rngs, (c.hidden_size, heads), c)
        if s.low_rank:
            self.decay_down, self.gate_down = (normal(rngs, (c.hidden_size, size), c) for _ in range(2))
            self.decay_up, self.gate_up = (normal(rngs, (size, of_all), c) for _ in range(2))
        else:
            self.decay, self.gate = (normal(rngs, (c.hidden_size, of_all), c) for _ in range(2))
        low, high = A_RANGE
        self.a_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high)))
        self.dt_bias = nnx.Param(jnp.zeros(of_all))
        self.gated_norm = nnx.Param(jnp.ones(size))
        self.o = normal(rngs, (of_all, c.hidden_size), c)

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: DeltaCache | None
    ) -> tuple[Float[Array, "B T D"], DeltaCache | None]:
        before = empty_cache(self.spec, x.shape[0], 0, x.dtype) if cache is None else cache
        mixed = jnp.concatenate([self.projected(x, weights) for weights in (self.q, self.k, self.v)], axis=-1)
        taps = jnp.concatenate([w[...][:, 0] for w in (self.q_conv, self.k_conv, self.v_conv)])
        mixed, window = convolved(mixed, taps, before.window, places.mask)
        out, state = advance(self.tokens(mixed, x, places.mask), before.state)
        out = rms_norm(out, self.gated_norm[...], self.config.rms_norm_eps).reshape(*x.shape[:2], -1)
        gates = (self.gate_down, self.gate_up) if self.spec.low_rank else (self.gate,)
        out = (out * jax.nn.sigmoid(self.projected(x, *gates).astype(jnp.float32))).astype(x.dtype)
        out = self.projected(out, self.o)
        return out, None if cache is None else DeltaCache(window.astype(cache.window.dtype), state)

    def projected(self, x: Float[Array, "B T _"], *weights: nnx.Param) -> Float[Array, "B T _"]:
        flat = x.reshape(-1, x.shape[-1])
        for factor in weights:
            flat = matmul(flat, factor[...].astype(x.dtype))
        return flat.reshape(*x.shape[:2], -1)

    def tokens(self, mixed: Float[Array, "B T _"], x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Tokens:
        s = self.spec
        heads = (*x.shape[:2], s.linear_num_heads, s.linear_head_dim)
        q, k, v = (part.reshape(heads) for part in jnp.split(mixed, 3, axis=-1))
        factors = (self.decay_down, self.decay_up) if s.low_rank else (self.decay,)
        f = self.projected(x, *factors).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        f, rate = f.reshape(heads), jnp.exp(self.a_log[...].astype(jnp.float32))[:, None]
        decay = -s.decay_limit * jax.nn.sigmoid(rate * f) if s.decay_limit else -rate * jax.nn.softplus(f)
        beta = jax.nn.sigmoid(self.projected(x, self.b).astype(jnp.float32))
        return tokens_of(q, k, v[..., None, :], decay[..., None, :], beta[..., None], mask)


def empty_cache(spec: KimiDelta, batch: int, capacity: int, dtype: Any) -> DeltaCache:
    """One layer's cache; it is of one size, whatever the ``capacity``."""
    heads, size = spec.linear_num_heads, spec.linear_head_dim
    window = jnp.zeros((batch, spec.linear_conv_kernel_dim - 1, 3 * heads * size), dtype)
    return DeltaCache(window, jnp.zeros((batch, heads, 1, size, size), jnp.float32))
