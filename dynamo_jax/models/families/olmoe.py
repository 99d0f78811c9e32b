"""OLMoE: query and key norms over the whole vector, clipped projections."""

from __future__ import annotations

from dynamo_jax.models.families.family import Family, Raw, biased, flag, number


def _olmoe(raw: Raw) -> Raw:
    return {
        "qk_norm": "vector",
        "clip_qkv": None if raw["clip_qkv"] is None else number(raw, "clip_qkv"),
        "norm_topk_prob": flag(raw, "norm_topk_prob"),
        **biased(raw),
    }


_DEFAULTS: Raw = {"rms_norm_eps": 1e-5, "clip_qkv": None, "norm_topk_prob": False}
FAMILIES = {
    "olmoe": Family("OlmoeForCausalLM", _olmoe, defaults=_DEFAULTS),
}
