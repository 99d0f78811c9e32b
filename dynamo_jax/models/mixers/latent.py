"""Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form.

Axes: B batch, T tokens, S cached tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import KeyValues, Places, attend, write
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.norms import normal, rms_norm
from dynamo_jax.models.rotary import rotate, yarn_mscale
from dynamo_jax.models.specs import Latent


class LatentAttention(nnx.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form.

    Keys and values are linear in one vector of kv_lora_rank numbers a token. The key matrix is multiplied
    into the query and the value matrix into the output, so all heads share that vector as their only key
    and value: the cache holds it and the rotary key, and nothing is expanded for each head.
    """

    def __init__(self, config: ModelConfig, spec: Latent, *, rngs: nnx.Rngs):
        c, s = config, spec
        heads, key = s.num_attention_heads, s.qk_nope_head_dim + s.rope.dim
        self.config, self.spec = c, s
        if s.q_lora_rank:
            self.q_down = normal(rngs, (c.hidden_size, s.q_lora_rank), c)
            self.q_down_norm = nnx.Param(jnp.ones(s.q_lora_rank))
            if s.qkv_bias:
                self.q_down_bias = nnx.Param(jnp.zeros(s.q_lora_rank))
            self.q_up = normal(rngs, (s.q_lora_rank, heads * key), c)
        else:
            self.q = normal(rngs, (c.hidden_size, heads * key), c)
        self.kv_down = normal(rngs, (c.hidden_size, s.kv_lora_rank + s.rope.dim), c)
        if s.qkv_bias:
            self.kv_down_bias = nnx.Param(jnp.zeros(s.kv_lora_rank + s.rope.dim))
        self.kv_norm = nnx.Param(jnp.ones(s.kv_lora_rank))
        self.kv_up = normal(rngs, (s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim)), c)
        self.o = normal(rngs, (heads * s.v_head_dim, c.hidden_size), c)
        if s.output_bias:
            self.o_bias = nnx.Param(jnp.zeros(c.hidden_size))

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: KeyValues | None
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        s = self.spec
        turns, interleave = places.angles[self.config.ropes.index(s.rope)], s.rope.rope_interleave
        flat = x.reshape(-1, x.shape[-1])
        shape = (*x.shape[:2], s.num_attention_heads, -1)
        rank, nope = s.kv_lora_rank, s.qk_nope_head_dim
        up = self.kv_up[...].astype(x.dtype).reshape(rank, s.num_attention_heads, -1)

        query, q_weights = flat, self.q_up if s.q_lora_rank else self.q
        if s.q_lora_rank:
            query = matmul(flat, self.q_down[...].astype(x.dtype))
            if s.qkv_bias:
                query = query + self.q_down_bias[...].astype(x.dtype)
            query = rms_norm(query, self.q_down_norm[...], 1e-6)
        q = matmul(query, q_weights[...].astype(x.dtype)).reshape(shape)
        q_latent = jnp.einsum("bthc,rhc->bthr", q[..., :nope], up[..., :nope])
        q_rotary = rotate(q[..., nope:], turns, interleave)
        q = jnp.concatenate([q_latent, q_rotary], axis=-1)

        latent = matmul(flat, self.kv_down[...].astype(x.dtype))
        if s.qkv_bias:
            latent = latent + self.kv_down_bias[...].astype(x.dtype)
        latent = latent.reshape(*x.shape[:2], 1, -1)
        k_rotary = rotate(latent[..., rank:], turns, interleave)
        k = jnp.concatenate([rms_norm(latent[..., :rank], self.kv_norm[...], 1e-6), k_rotary], axis=-1)
        cache = write(cache, k, k[..., :0], places)
        if cache is not None:
            k = cache.keys
        out = attend(q, k, k[..., :rank], places, self.scale(), s.window)
        out = jnp.einsum("bthr,rhv->bthv", out, up[..., nope:])
        out = matmul(out.reshape(flat.shape[0], -1), self.o[...].astype(x.dtype))
        if s.output_bias:
            out = out + self.o_bias[...].astype(x.dtype)
        return out.reshape(x.shape), cache

    def scale(self) -> float:
        """1/sqrt(key size), times YaRN's temperature squared where the checkpoint has one."""
        s, scaling = self.spec, self.spec.rope.scaling
        scale = (s.qk_nope_head_dim + s.rope.dim) ** -0.5
        if scaling.rope_type != "default" and scaling.mscale_all_dim:
            scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale


def empty_cache(spec: Latent, batch: int, capacity: int, dtype: Any) -> KeyValues:
    """One layer's cache of ``capacity`` tokens a sequence: latent vectors with rotary keys, and no values."""
    shape = (batch, capacity, 1)
    keys = jnp.zeros((*shape, spec.kv_lora_rank + spec.rope.dim), dtype)
    return KeyValues(keys, jnp.zeros((*shape, 0), dtype))
