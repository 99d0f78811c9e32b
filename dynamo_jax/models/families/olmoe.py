"""OLMoE: query and key norms over the whole vector, clipped projections."""

from __future__ import annotations

from dynamo_jax.models.families.family import Family, Raw, Rotary, biased, flag, grouped, mixture, number, stack
from dynamo_jax.models.specs import LayerSpec, Router


def _olmoe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    clip = None if raw["clip_qkv"] is None else number(raw, "clip_qkv")
    mixer = grouped(raw, rope, qk_norm="vector", clip_qkv=clip, **biased(raw))
    return stack(raw, mixer, mixture(raw, Router(norm_topk_prob=flag(raw, "norm_topk_prob"))))


_DEFAULTS: Raw = {"rms_norm_eps": 1e-5, "clip_qkv": None, "norm_topk_prob": False}
FAMILIES = {
    "olmoe": Family("OlmoeForCausalLM", _olmoe, defaults=_DEFAULTS),
}
