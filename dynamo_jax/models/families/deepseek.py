"""DeepSeek-V2 and DeepSeek-V3: latent attention, groups of experts, shared experts, dense first layers.

Kimi-K2 and GLM-4.7-Flash (``glm4_moe_lite``) are DeepSeek-V3 of other sizes. DeepSeek-V3.2 and GLM-5 attend to keys
that an index chooses, and are read up to the length at which it chooses all. Mistral-Small-4 has V3's attention and a
softmax router.
"""

from __future__ import annotations

from typing import Any

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
    mixture_with_shared,
    number,
    stack,
    whole,
    whole_or_none,
)
from dynamo_jax.models.specs import WHOLE_LIMIT, Latent, LayerSpec, Router


def latent(raw: Raw, rope: Rotary | None, interleave: bool = False, **own: Any) -> Latent:
    """Latent attention by DeepSeek's keys. rope: None for attention without positions; own: what else a family says."""
    turned = whole(raw, "qk_rope_head_dim")
    if turned % 2:
        raise ValueError(f"qk_rope_head_dim={turned}: expected an even number, since rotary positions turn pairs")
    return Latent(
        num_attention_heads=whole(raw, "num_attention_heads"),
        q_lora_rank=whole_or_none(raw, "q_lora_rank"),
        kv_lora_rank=whole(raw, "kv_lora_rank"),
        qk_nope_head_dim=whole(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=turned,
        v_head_dim=whole(raw, "v_head_dim"),
        rope=rope and rope(dim=turned, rope_interleave=interleave),
        **biased(raw),
        **own,
    )


def _deepseek_v2(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    method = raw["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {shown(method)} is not supported; known: greedy, group_limited_greedy")
    if flag(raw, "norm_topk_prob") or flag(raw, "mlp_bias"):
        raise ValueError("norm_topk_prob and mlp_bias are not supported for deepseek_v2")
    limited = method == "group_limited_greedy"
    groups: Raw = {name: whole(raw, name) for name in ("n_group", "topk_group")} if limited else {}
    router = Router(routed_scaling_factor=number(raw, "routed_scaling_factor"), **groups)
    return stack(raw, latent(raw, rope, True), mixture_with_shared(raw, router), dense=first_dense(raw))


def _deepseek_v3(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = latent(raw, rope, flag(raw, "rope_interleave"))
    return stack(raw, mixer, mixture_with_shared(raw, corrected(raw)), dense=first_dense(raw))


def _indexed(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    """DeepSeek-V3.2 and GLM-5: an index chooses ``index_topk`` keys, which are all up to as many positions."""
    if flag(raw, "mlp_bias"):
        raise ValueError("mlp_bias is not supported for indexed attention")
    dense = dense_types(raw, whole(raw, "first_k_dense_replace", 0))
    return stack(raw, latent(raw, rope, True), mixture_with_shared(raw, corrected(raw)), dense=dense)


def _index_limit(raw: Raw) -> tuple[int, str]:
    return whole(raw, "index_topk"), "past them attention is to the keys that an index chooses (index_topk)"


def _mistral4(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    if whole_or_none(raw, "n_group") > 1:
        raise ValueError("groups of experts are not supported for mistral4")
    router = Router(
        norm_topk_prob=flag(raw, "norm_topk_prob"), routed_scaling_factor=number(raw, "routed_scaling_factor")
    )
    mixer = latent(raw, rope, flag(raw, "rope_interleave"))
    return stack(raw, mixer, mixture_with_shared(raw, router), dense=first_dense(raw))


def _mistral_limit(raw: Raw) -> tuple[int, str]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or _MISTRAL_ROPE
    if not isinstance(rope, dict) or not rope.get("llama_4_scaling_beta"):
        return WHOLE_LIMIT, ""
    return whole(rope, "original_max_position_embeddings"), "past them queries are scaled (llama_4_scaling_beta)"


def _glm4_moe_lite(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = latent(raw, rope, flag(raw, "rope_interleave"))
    return stack(raw, mixer, mixture_with_shared(raw, corrected(raw)), dense=dense_types(raw))


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
_V32: Raw = {
    **{"first_k_dense_replace": 3, "mlp_layer_types": None, "mlp_bias": False, "index_topk": 2048},
    **{"n_shared_experts": 1, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": True},
}
_GLM5: Raw = {
    **{"intermediate_size": 12288, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256},
    **{"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
}
_MISTRAL: Raw = {
    **{"intermediate_size": 12288, "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64},
    **{"first_k_dense_replace": 0, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
    **{"norm_topk_prob": True, "rope_interleave": True},
}
_MISTRAL_ROPE: Raw = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "original_max_position_embeddings": 8192},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1},
}
_EXPERTS = "n_routed_experts"
FAMILIES = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, experts_key=_EXPERTS, defaults=_BOTH | _V2),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, experts_key=_EXPERTS, defaults=_BOTH | _V3),
    "kimi_k2": Family("DeepseekV3ForCausalLM", _deepseek_v3, experts_key=_EXPERTS, defaults=_BOTH | _V3),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", _glm4_moe_lite, experts_key=_EXPERTS, defaults=_LITE),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM", _indexed, experts_key=_EXPERTS, defaults=_BOTH | _V3 | _V32, limit=_index_limit
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM", _indexed, experts_key=_EXPERTS, defaults=_BOTH | _V32 | _GLM5, limit=_index_limit
    ),
    "mistral4": Family(
        "Mistral4ForCausalLM",
        _mistral4,
        experts_key=_EXPERTS,
        defaults=_BOTH | _MISTRAL,
        rope=_MISTRAL_ROPE,
        limit=_mistral_limit,
        partial=True,
    ),
}
