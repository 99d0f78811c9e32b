"""Mellum 2: Qwen3-MoE's parts, with rotary positions of their own in windows."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    by_type,
    dense_types,
    flag,
    layer_types,
    layers_of,
    mixture,
    stack,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _mellum(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    types = layer_types(raw, [FULL] * layers_of(raw))
    experts = mixture(raw, Router(norm_topk_prob=flag(raw, "norm_topk_prob")), "moe_intermediate_size")
    mixers = by_type(raw, rope, types, qk_norm="head", **biased(raw))
    return stack(raw, mixers, experts, dense=dense_types(raw, 0))


_DEFAULTS: Raw = {
    **{"num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 7168, "rms_norm_eps": 1e-6},
    **{"sliding_window": 1024, "norm_topk_prob": True},
}
_ROPE: Raw = {FULL: {"rope_type": "default", "rope_theta": 500000.0}, SLIDING: {"rope_type": "default"}}
FAMILIES = {"mellum": Family("MellumForCausalLM", _mellum, defaults=_DEFAULTS, rope=_ROPE, by_type=True)}
