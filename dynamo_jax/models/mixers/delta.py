"""The gated delta net: a linear mixer with the delta rule of ``delta_rule.py`` (arXiv 2412.06464).

Of a head, decay = -exp(a_log) softplus(a + dt_bias) is not above 0, beta = sigmoid(b) is in (0, 1). Queries, keys and
values go through a short causal convolution and SiLU before, queries and keys are made unit vectors, queries divided by
sqrt(K), and the output is normed and multiplied by SiLU(z). A token that is padding has decay 0 and beta 0, and the
convolution does not see it.

Axes: B batch, T tokens, D hidden, J key heads, G value heads that share a key head, K key size, V value size, W tokens
that the convolution sees, M = J (2K + GV) channels of the convolution.
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
from dynamo_jax.models.specs import DeltaNet

A_RANGE = (0.01, 16.0)  # of exp(a_log) before training


class GatedDeltaNet(nnx.Module):
    """The mixer with its projections (in, out); fused ones are ordered key head by key head."""

    def __init__(self, config: ModelConfig, spec: DeltaNet, *, rngs: nnx.Rngs):
        c, s = config, spec
        self.config, self.spec = c, s
        heads, value, mixed = s.linear_num_value_heads, _value_size(s), _channels(s)
        if s.fused_projections:
            self.qkvz = normal(rngs, (c.hidden_size, mixed + value), c)
            self.ba = normal(rngs, (c.hidden_size, 2 * heads), c)
        else:
            self.qkv = normal(rngs, (c.hidden_size, mixed), c)
            self.z = normal(rngs, (c.hidden_size, value), c)
            self.b, self.a = (normal(rngs, (c.hidden_size, heads), c) for _ in range(2))
        self.conv = normal(rngs, (mixed, 1, s.linear_conv_kernel_dim), c)
        low, high = A_RANGE
        self.a_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high)))
        self.dt_bias = nnx.Param(jnp.ones(heads))
        self.gated_norm = nnx.Param(jnp.ones(s.linear_value_head_dim))
        self.out = normal(rngs, (value, c.hidden_size), c)

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: DeltaCache | None
    ) -> tuple[Float[Array, "B T D"], DeltaCache | None]:
        before = empty_cache(self.spec, x.shape[0], 0, x.dtype) if cache is None else cache
        mixed, z, b, a = self.projected(x)
        mixed, window = convolved(mixed, self.conv[...][:, 0], before.window, places.mask)
        tokens = self.tokens(mixed, b, a, places.mask)
        out, state = advance(tokens, before.state)
        out = rms_norm(out, self.gated_norm[...], self.config.rms_norm_eps) * jax.nn.silu(z.astype(jnp.float32))
        out = out.astype(x.dtype).reshape(-1, _value_size(self.spec))
        out = matmul(out, self.out[...].astype(x.dtype)).reshape(x.shape)
        return out, None if cache is None else DeltaCache(window.astype(cache.window.dtype), state)

    def projected(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array, Array]:
        """Inputs of the convolution (B, T, M), z (B, T, J, G, V), b and a (B, T, J, G)."""
        s, flat, of_tokens = self.spec, x.reshape(-1, x.shape[-1]), x.shape[:2]

        def product(weights: nnx.Param, *shape: int) -> Array:
            return matmul(flat, weights[...].astype(x.dtype)).reshape(*of_tokens, *shape)

        heads = (s.linear_num_key_heads, s.linear_num_value_heads // s.linear_num_key_heads)
        z_shape = (*heads, s.linear_value_head_dim)
        if not s.fused_projections:
            return product(self.qkv, -1), product(self.z, *z_shape), product(self.b, *heads), product(self.a, *heads)
        key, value = s.linear_key_head_dim, heads[1] * s.linear_value_head_dim
        parts = jnp.split(product(self.qkvz, heads[0], -1), (key, 2 * key, 2 * key + value), axis=-1)
        mixed = jnp.concatenate([part.reshape(*of_tokens, -1) for part in parts[:3]], axis=-1)
        b, a = jnp.split(product(self.ba, heads[0], -1), 2, axis=-1)
        return mixed, parts[3].reshape(*of_tokens, *z_shape), b, a

    def tokens(self, mixed: Float[Array, "B T M"], b: Array, a: Array, mask: Bool[Array, "B T"] | None) -> Tokens:
        s = self.spec
        size = s.linear_num_key_heads * s.linear_key_head_dim
        q, k, v = jnp.split(mixed, (size, 2 * size), axis=-1)
        q, k = (part.reshape(*part.shape[:2], s.linear_num_key_heads, -1) for part in (q, k))
        of_head = (self.a_log[...].astype(jnp.float32), self.dt_bias[...].astype(jnp.float32))
        a_log, dt_bias = (part.reshape(a.shape[2:]) for part in of_head)
        decay = -jnp.exp(a_log) * jax.nn.softplus(a.astype(jnp.float32) + dt_bias)
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        return tokens_of(q, k, v.reshape(*a.shape, s.linear_value_head_dim), decay[..., None], beta, mask)


def empty_cache(spec: DeltaNet, batch: int, capacity: int, dtype: Any) -> DeltaCache:
    """One layer's cache; it is of one size, whatever the ``capacity``."""
    s = spec
    heads = (s.linear_num_key_heads, s.linear_num_value_heads // s.linear_num_key_heads)
    state = (batch, *heads, s.linear_key_head_dim, s.linear_value_head_dim)
    window = (batch, s.linear_conv_kernel_dim - 1, _channels(s))
    return DeltaCache(jnp.zeros(window, dtype), jnp.zeros(state, jnp.float32))


def _value_size(spec: DeltaNet) -> int:
    return spec.linear_num_value_heads * spec.linear_value_head_dim


def _channels(spec: DeltaNet) -> int:
    return 2 * spec.linear_num_key_heads * spec.linear_key_head_dim + _value_size(spec)
