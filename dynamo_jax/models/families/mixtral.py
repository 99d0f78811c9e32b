"""Mixtral: gates of the chosen experts sum to one, sliding windows."""

from __future__ import annotations

from dynamo_jax.models.families.family import SPARSE, W123, Family, Raw, windows_of


def _mixtral(raw: Raw) -> Raw:
    return {"norm_topk_prob": True, "windows": windows_of(raw)}


_DEFAULTS: Raw = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM", _mixtral, SPARSE, experts=W123, experts_key="num_local_experts", defaults=_DEFAULTS
    ),
}
