"""Phi-3.5-MoE: layer norms, SparseMixer routing, biases."""

from __future__ import annotations

from dynamo_jax.models.families.family import SPARSE, W123, Family, Raw, biased, flag, number, windows_of


def _phimoe(raw: Raw) -> Raw:
    return {
        **biased(raw),
        "windows": windows_of(raw),
        "layer_norm": True,
        "routing": "sparsemixer",
        "router_jitter_noise": number(raw, "router_jitter_noise", 0.0, 1.0),
        "head_bias": flag(raw, "lm_head_bias"),
    }


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
        SPARSE,
        experts=W123,
        experts_key="num_local_experts",
        defaults=_DEFAULTS,
        rope_types=("default", "longrope"),
        short_mscale=True,
    ),
}
