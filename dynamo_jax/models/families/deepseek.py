"""DeepSeek-V2 and DeepSeek-V3: latent attention, groups of experts, shared experts, dense first layers.

Kimi-K2 and GLM-4.7-Flash (``glm4_moe_lite``) are DeepSeek-V3 of other sizes.
"""

from __future__ import annotations

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    Family,
    Raw,
    Rotary,
    biased,
    corrected,
    dense_types,
    first_dense,
    flag,
    mixture,
    number,
    shared_beside,
    stack,
    whole,
    whole_or_none,
)
from dynamo_jax.models.specs import Latent, LayerSpec, Mixture, Router


def _latent(raw: Raw, rope: Rotary, interleave: bool) -> Latent:
    turned = whole(raw, "qk_rope_head_dim")
    if turned % 2:
        raise ValueError(f"qk_rope_head_dim={turned}: expected an even number, since rotary positions turn pairs")
    return Latent(
        num_attention_heads=whole(raw, "num_attention_heads"),
        q_lora_rank=whole_or_none(raw, "q_lora_rank"),
        kv_lora_rank=whole(raw, "kv_lora_rank"),
        qk_nope_head_dim=whole(raw, "qk_nope_head_dim"),
        v_head_dim=whole(raw, "v_head_dim"),
        rope=rope(dim=turned, rope_interleave=interleave),
        **biased(raw),
    )


def _experts(raw: Raw, router: Router) -> Mixture:
    return mixture(raw, router, "moe_intermediate_size", **shared_beside(raw))


def _deepseek_v2(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    method = raw["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {shown(method)} is not supported; known: greedy, group_limited_greedy")
    if flag(raw, "norm_topk_prob") or flag(raw, "mlp_bias"):
        raise ValueError("norm_topk_prob and mlp_bias are not supported for deepseek_v2")
    limited = method == "group_limited_greedy"
    groups: Raw = {name: whole(raw, name) for name in ("n_group", "topk_group")} if limited else {}
    router = Router(routed_scaling_factor=number(raw, "routed_scaling_factor"), **groups)
    return stack(raw, _latent(raw, rope, True), _experts(raw, router), dense=first_dense(raw))


def _deepseek_v3(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = _latent(raw, rope, flag(raw, "rope_interleave"))
    return stack(raw, mixer, _experts(raw, corrected(raw)), dense=first_dense(raw))


def _glm4_moe_lite(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = _latent(raw, rope, flag(raw, "rope_interleave"))
    return stack(raw, mixer, _experts(raw, corrected(raw)), dense=dense_types(raw))


_BOTH: Raw = {
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V2: Raw = {
    "intermediate_size": 11008,
    "first_k_dense_replace": 0,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "mlp_bias": False,
}
_V3: Raw = {
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "rope_interleave": True,
}
_LITE: Raw = {
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "intermediate_size": 10240,
    "mlp_layer_types": None,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "rms_norm_eps": 1e-5,
}
_EXPERTS = "n_routed_experts"
FAMILIES = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, experts_key=_EXPERTS, defaults=_BOTH | _V2),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, experts_key=_EXPERTS, defaults=_BOTH | _V3),
    "kimi_k2": Family("DeepseekV3ForCausalLM", _deepseek_v3, experts_key=_EXPERTS, defaults=_BOTH | _V3),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", _glm4_moe_lite, experts_key=_EXPERTS, defaults=_LITE),
}
