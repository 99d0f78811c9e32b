"""Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form.

Axes: B batch, T tokens, S cached tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynamo_jax.kernels.products import matmul
from dynamo_jax.models.attention import Attends, KeyValues, Places, attended
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.norms import normal, rms_norm
from dynamo_jax.models.rotary import rotate, yarn_mscale
from dynamo_jax.models.specs import Latent, RopeScaling


class LatentAttention(nnx.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) in its absorbed form.

    Keys and values are linear in one vector of kv_lora_rank numbers a token. The key matrix is multiplied
    into the query and the value matrix into the output, so all heads share that vector as their only key
    and value: the cache holds it and the rotary key, and nothing is expanded for each head.
    """

    def __init__(self, config: ModelConfig, spec: Latent, *, rngs: nnx.Rngs):
        c, s = config, spec
        heads, key = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
        self.config, self.spec = c, s
        if s.q_lora_rank:
            self.q_down = normal(rngs, (c.hidden_size, s.q_lora_rank), c)
            self.q_down_norm = nnx.Param(jnp.ones(s.q_lora_rank))
            if s.qkv_bias:
                self.q_down_bias = nnx.Param(jnp.zeros(s.q_lora_rank))
            self.q_up = normal(rngs, (s.q_lora_rank, heads * key), c)
        else:
            self.q = normal(rngs, (c.hidden_size, heads * key), c)
        self.kv_down = normal(rngs, (c.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim), c)
        if s.qkv_bias:
            self.kv_down_bias = nnx.Param(jnp.zeros(s.kv_lora_rank + s.qk_rope_head_dim))
        self.kv_norm = nnx.Param(jnp.ones(s.kv_lora_rank))
        self.kv_up = normal(rngs, (s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim)), c)
        self.o = normal(rngs, (heads * s.v_head_dim, c.hidden_size), c)
        if s.output_bias:
            self.o_bias = nnx.Param(jnp.zeros(c.hidden_size))
        if s.gating != "none":
            self.gate = normal(rngs, (c.hidden_size, heads * (1 if s.gating == "per-head" else s.v_head_dim)), c)

    def __call__(
        self, x: Float[Array, "B T D"], places: Places, cache: KeyValues | Attends | None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s = self.spec
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
        q_rotary = self.turned(q[..., nope:], places)
        q = jnp.concatenate([q_latent, q_rotary], axis=-1)

        latent = matmul(flat, self.kv_down[...].astype(x.dtype))
        if s.qkv_bias:
            latent = latent + self.kv_down_bias[...].astype(x.dtype)
        latent = latent.reshape(*x.shape[:2], 1, -1)
        k_rotary = self.turned(latent[..., rank:], places)
        k = jnp.concatenate([rms_norm(latent[..., :rank], self.kv_norm[...], 1e-6), k_rotary], axis=-1)
        out, after = attended(q, k, k[..., :rank], places, cache, self.scale(), s.window)
        out = jnp.einsum("bthr,rhv->bthv", out, up[..., nope:])
        if s.gating != "none":
            gates = matmul(flat, self.gate[...].astype(x.dtype)).astype(jnp.float32)
            out = out * jax.nn.sigmoid(gates).astype(x.dtype).reshape(shape)
        out = matmul(out.reshape(flat.shape[0], -1), self.o[...].astype(x.dtype))
        if s.output_bias:
            out = out + self.o_bias[...].astype(x.dtype)
        return out.reshape(x.shape), after

    def turned(self, x: Float[Array, "B T H R"], places: Places) -> Float[Array, "B T H R"]:
        """By rotary positions, where there are some."""
        rope = self.spec.rope
        return x if rope is None else rotate(x, places.angles[self.config.ropes.index(rope)], rope.rope_interleave)

    def scale(self) -> float:
        """1/sqrt(key size), times YaRN's temperature squared where the checkpoint has one."""
        s = self.spec
        scale, scaling = (s.qk_nope_head_dim + s.qk_rope_head_dim) ** -0.5, s.rope.scaling if s.rope else RopeScaling()
        if scaling.rope_type != "default" and scaling.mscale_all_dim:
            scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale


def empty_cache(spec: Latent, batch: int, capacity: int, dtype: Any) -> KeyValues:
    """One layer's cache of ``capacity`` tokens a sequence: latent vectors with rotary keys, and no values."""
    shape = (batch, capacity, 1)
    keys = jnp.zeros((*shape, spec.kv_lora_rank + spec.qk_rope_head_dim), dtype)
    return KeyValues(keys, jnp.zeros((*shape, 0), dtype))
