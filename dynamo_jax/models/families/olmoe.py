"""OLMoE: query and key norms over the whole vector, clipped projections."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS5, Family, Raw, biased


def _olmoe(raw: Raw) -> Raw:
    return {"qk_norm": "vector", "clip_qkv": raw.get("clip_qkv"), **biased(raw)}


FAMILIES = {
    "olmoe": Family("OlmoeForCausalLM", _olmoe, defaults=EPS5),
}
