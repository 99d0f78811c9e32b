"""Qwen2-MoE and Qwen3-MoE: dense layers among sparse ones, a gated shared expert in the older one."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS6, Family, Raw, biased, windows_of


def _qwen2_moe(raw: Raw) -> Raw:
    layers, last = range(raw.get("num_hidden_layers", 0)), raw.get("max_window_layers", 28)
    sliding = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    slides = raw.get("layer_types") or ["full" if i % 2 or i >= last else "sliding" for i in layers]
    return {
        **_qwen_dense(raw),
        "qkv_bias": raw.get("qkv_bias", True),
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "shared_intermediate_size": raw.get("shared_expert_intermediate_size", 0),
        "shared_gate": True,
        "windows": windows_of(raw, sliding, [t.startswith("sliding") for t in slides]),
    }


def _qwen3_moe(raw: Raw) -> Raw:
    sliding = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    return {
        **_qwen_dense(raw),
        **biased(raw),
        "qk_norm": "head",
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "windows": windows_of(raw, sliding),
    }


def _qwen_dense(raw: Raw) -> Raw:
    step, only = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    dense = tuple(i for i in range(raw.get("num_hidden_layers", 0)) if i in only or (i + 1) % step)
    return {
        "intermediate_size": raw.get("moe_intermediate_size"),
        "dense_layers": dense,
        "dense_intermediate_size": raw.get("intermediate_size", 0) if dense else 0,
    }


FAMILIES = {
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, shared="shared_expert", defaults=EPS6),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, defaults=EPS6),
}
