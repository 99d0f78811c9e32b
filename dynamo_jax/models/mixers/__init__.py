"""How tokens see each other: one file a mixer, with its parameters, its forward pass and its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from dynamo_jax.models.attention import LayerCache
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.mixers import grouped, latent
from dynamo_jax.models.specs import Grouped, Latent, Mixer


class Kind(NamedTuple):
    """Of a mixer: its module, made from (config, spec, rngs=), and its empty cache, from (spec, batch, capacity,
    dtype)."""

    module: Any
    cache: Any


KINDS: dict[type, Kind] = {
    Grouped: Kind(grouped.GroupedAttention, grouped.empty_cache),
    Latent: Kind(latent.LatentAttention, latent.empty_cache),
}


def mixer(config: ModelConfig, spec: Mixer, rngs: nnx.Rngs) -> Any:
    """The module of a layer's mixer: (normed (B, T, D), places, cache) to (out (B, T, D), cache)."""
    return KINDS[type(spec)].module(config, spec, rngs=rngs)


def empty_cache(spec: Mixer, batch: int, capacity: int, dtype: Any) -> LayerCache:
    return KINDS[type(spec)].cache(spec, batch, capacity, dtype)
