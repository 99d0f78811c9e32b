"""Phi-3.5-MoE: layer norms, SparseMixer routing, biases."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    SPARSE,
    SPARSE_NAMES,
    W123,
    Family,
    Raw,
    Rotary,
    biased,
    flag,
    grouped,
    mixture,
    number,
    stack,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _phimoe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    router = Router(routing="sparsemixer", router_jitter_noise=number(raw, "router_jitter_noise", 0.0, 1.0))
    return stack(raw, grouped(raw, rope, **biased(raw)), mixture(raw, router), windows_of(raw))


def _top(raw: Raw) -> Raw:
    return {"layer_norm": True, "head_bias": flag(raw, "lm_head_bias")}


_DEFAULTS: Raw = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "router_jitter_noise": 0.01,
    "lm_head_bias": False,
}
FAMILIES = {
    "phimoe": Family(
        "PhimoeForCausalLM",
        _phimoe,
        SPARSE_NAMES,
        SPARSE,
        W123,
        _top,
        experts_key="num_local_experts",
        defaults=_DEFAULTS,
        rope_types=("default", "longrope"),
        short_mscale=True,
    ),
}
