"""Phi-3.5-MoE: layer norms, SparseMixer routing, biases."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS5, SPARSE, W123, Family, Raw, biased, windows_of


def _phimoe(raw: Raw) -> Raw:
    return {
        **biased(raw),
        "windows": windows_of(raw, raw.get("sliding_window")),
        "layer_norm": True,
        "routing": "sparsemixer",
        "router_jitter_noise": raw.get("router_jitter_noise", 0.01),
        "head_bias": raw.get("lm_head_bias", False),
    }


FAMILIES = {
    "phimoe": Family("PhimoeForCausalLM", _phimoe, SPARSE, experts=W123, defaults={"rope_theta": 1e6} | EPS5),
}
