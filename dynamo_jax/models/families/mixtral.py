"""Mixtral: gates of the chosen experts sum to one, sliding windows."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS5, SPARSE, W123, Family, Raw, windows_of


def _mixtral(raw: Raw) -> Raw:
    return {"norm_topk_prob": True, "windows": windows_of(raw, raw.get("sliding_window"))}


FAMILIES = {
    "mixtral": Family("MixtralForCausalLM", _mixtral, SPARSE, experts=W123, defaults={"rope_theta": 1e6} | EPS5),
}
