"""GLM-4.5 to 4.7, Solar-Open and dots.llm1: grouped-query attention, DeepSeek-V3's experts and router."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    corrected,
    first_dense,
    flag,
    grouped,
    layer_types,
    layers_of,
    mixture_with_shared,
    stack,
    whole,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec


def _glm4_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    norm = "head" if flag(raw, "use_qk_norm") else "none"
    mixer = grouped(raw, rope, share=0.5, qkv_bias=flag(raw, "attention_bias"), qk_norm=norm)
    return stack(raw, mixer, mixture_with_shared(raw, corrected(raw)), dense=first_dense(raw))


def _solar_open(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    return stack(
        raw, grouped(raw, rope, qkv_bias=flag(raw, "attention_bias")), mixture_with_shared(raw, corrected(raw))
    )


def _dots1(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    slide = raw["sliding_window"] is not None and raw["max_window_layers"] is not None
    first = whole(raw, "max_window_layers", 0) if slide else layers_of(raw)
    types = layer_types(raw, [SLIDING if i >= first else FULL for i in range(layers_of(raw))])
    mixer = grouped(raw, rope, qk_norm="head", **biased(raw))
    return stack(raw, mixer, mixture_with_shared(raw, corrected(raw)), windows_of(raw, types), first_dense(raw))


_ALL: Raw = {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_GLM: Raw = {"intermediate_size": 10944, "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False}
_VISION: Raw = {"attention_bias": True}
_SOLAR: Raw = {"norm_topk_prob": True, "head_dim": 128, "rope_theta": 1e6}
_DOTS: Raw = {
    "intermediate_size": 10944,
    "num_key_value_heads": 32,
    "n_shared_experts": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 62,
}
_KEY = "n_routed_experts"
FAMILIES = {
    "glm4_moe": Family("Glm4MoeForCausalLM", _glm4_moe, experts_key=_KEY, defaults=_ALL | _GLM, partial=True),
    "glm4v_moe_text": Family(
        "Glm4vMoeForConditionalGeneration",
        _glm4_moe,
        experts_key=_KEY,
        defaults=_ALL | _GLM | _VISION,
        partial=True,
    ),
    "solar_open": Family("SolarOpenForCausalLM", _solar_open, experts_key=_KEY, defaults=_ALL | _SOLAR),
    "dots1": Family("Dots1ForCausalLM", _dots1, experts_key=_KEY, defaults=_ALL | _DOTS),
}
