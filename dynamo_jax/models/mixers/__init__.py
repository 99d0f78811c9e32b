"""How tokens see each other: one file a mixer, with its parameters, its forward pass and its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from dynamo_jax.models.attention import KeyValues
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.delta_rule import DeltaCache
from dynamo_jax.models.mixers import delta, grouped, kimi_delta, latent, short_conv
from dynamo_jax.models.specs import DeltaNet, Grouped, KimiDelta, Latent, Mixer, ShortConv

# What a layer keeps of the tokens before: whatever its mixer says.
LayerCache = KeyValues | DeltaCache | short_conv.ConvCache
SOFTMAX = (Grouped, Latent)  # mixers that take a cache that attends itself


class Kind(NamedTuple):
    """Of a mixer: its module, made from (config, spec, rngs=), and its empty cache, from (spec, batch, capacity,
    dtype)."""

    module: Any
    cache: Any


KINDS: dict[type, Kind] = {
    Grouped: Kind(grouped.GroupedAttention, grouped.empty_cache),
    Latent: Kind(latent.LatentAttention, latent.empty_cache),
    DeltaNet: Kind(delta.GatedDeltaNet, delta.empty_cache),
    KimiDelta: Kind(kimi_delta.KimiDeltaAttention, kimi_delta.empty_cache),
    ShortConv: Kind(short_conv.ShortConvolution, short_conv.empty_cache),
}


def mixer(config: ModelConfig, spec: Mixer, rngs: nnx.Rngs) -> Any:
    """The module of a layer's mixer: (normed (B, T, D), places, cache) to (out (B, T, D), cache)."""
    return KINDS[type(spec)].module(config, spec, rngs=rngs)


def empty_cache(spec: Mixer, batch: int, capacity: int, dtype: Any) -> LayerCache:
    return KINDS[type(spec)].cache(spec, batch, capacity, dtype)
