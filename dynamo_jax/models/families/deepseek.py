"""DeepSeek-V2 and DeepSeek-V3: latent attention, groups of experts, shared experts, dense first layers."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS6, Family, Raw, biased


def _deepseek(raw: Raw) -> Raw:
    dense = tuple(range(raw.get("first_k_dense_replace") or 0))
    return {
        "intermediate_size": raw.get("moe_intermediate_size"),
        "num_experts": raw.get("n_routed_experts"),
        "dense_layers": dense,
        "dense_intermediate_size": raw.get("intermediate_size", 0) if dense else 0,
        "shared_intermediate_size": (raw.get("n_shared_experts") or 0) * (raw.get("moe_intermediate_size") or 0),
        "routed_scaling_factor": raw.get("routed_scaling_factor", 1.0),
        "head_dim": (raw.get("qk_nope_head_dim") or 0) + (raw.get("qk_rope_head_dim") or 0),
        "num_key_value_heads": raw.get("num_attention_heads"),
        **{name: raw.get(name) or 0 for name in _LATENT},
        **biased(raw),
    }


_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _deepseek_v2(raw: Raw) -> Raw:
    method = raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {method!r} is not supported; known: greedy, group_limited_greedy")
    if raw.get("norm_topk_prob") or raw.get("mlp_bias"):
        raise ValueError("norm_topk_prob and mlp_bias are not supported for deepseek_v2")
    limited = method == "group_limited_greedy"
    groups = {"n_group": raw.get("n_group") or 0, "topk_group": raw.get("topk_group") or 0} if limited else {}
    return {**_deepseek(raw), **groups, "rope_interleave": True}


def _deepseek_v3(raw: Raw) -> Raw:
    return {
        **_deepseek(raw),
        "routing": "sigmoid",
        "norm_topk_prob": raw.get("norm_topk_prob", True),
        "n_group": raw.get("n_group") or 0,
        "topk_group": raw.get("topk_group") or 0,
        "rope_interleave": raw.get("rope_interleave", True),
    }


FAMILIES = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, defaults=EPS6),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, defaults=EPS6),
}
