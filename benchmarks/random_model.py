"""What a step of a model takes beside its experts, at random: for benchmarks of time and memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from layers import PREFILL

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, new_cache, parameters


def model_arrays(config: ModelConfig) -> dict[str, Any]:
    """Random parameters of all but the experts."""
    shapes = jax.eval_shape(lambda: parameters(Decoder(config, with_experts=False, rngs=nnx.Rngs(0))))
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * 0.02, static_argnums=1)
    return {n: make(jax.random.key(i), s.shape) for i, (n, s) in enumerate(sorted(shapes.items()))}


def batch_of(config: ModelConfig, requests: int, length: int) -> tuple[Any, Any, Any]:
    """Tokens, mask and an empty cache of a step."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (requests, length))
    return tokens, np.ones((requests, length), bool), new_cache(config, requests, 2 * PREFILL, jnp.bfloat16)
