"""Qwen2-MoE and Qwen3-MoE: dense layers among sparse ones, a gated shared expert in the older one."""

from __future__ import annotations

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    biased,
    flag,
    layer_types,
    layers_of,
    whole,
    windows_of,
)


def _qwen2_moe(raw: Raw) -> Raw:
    last = whole(raw, "max_window_layers", 0)
    default = [FULL if i % 2 or i >= last else SLIDING for i in range(layers_of(raw))]
    types = layer_types(raw, default)
    return {
        **_qwen_dense(raw),
        "qkv_bias": flag(raw, "qkv_bias"),
        "norm_topk_prob": flag(raw, "norm_topk_prob"),
        "shared_intermediate_size": whole(raw, "shared_expert_intermediate_size"),
        "shared_gate": True,
        "windows": windows_of(raw, types) if flag(raw, "use_sliding_window") else (),
    }


def _qwen3_moe(raw: Raw) -> Raw:
    return {
        **_qwen_dense(raw),
        **biased(raw),
        "qk_norm": "head",
        "norm_topk_prob": flag(raw, "norm_topk_prob"),
        "windows": windows_of(raw) if flag(raw, "use_sliding_window") else (),
    }


def _qwen_dense(raw: Raw) -> Raw:
    step, only = whole(raw, "decoder_sparse_step"), raw["mlp_only_layers"] or []
    if not isinstance(only, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in only):
        raise ValueError(f"mlp_only_layers={shown(only)}: expected a list of whole numbers")
    named = set(only)
    dense = tuple(i for i in range(layers_of(raw)) if i in named or (i + 1) % step)
    return {
        "intermediate_size": whole(raw, "moe_intermediate_size"),
        "dense_layers": dense,
        "dense_intermediate_size": whole(raw, "intermediate_size") if dense else 0,
    }


_BOTH: Raw = {
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
_QWEN2: Raw = {
    "intermediate_size": 5632,
    "num_key_value_heads": 16,
    "max_window_layers": 28,
    "qkv_bias": True,
    "shared_expert_intermediate_size": 5632,
}
_QWEN3: Raw = {"intermediate_size": 6144, "num_key_value_heads": 4}
FAMILIES = {
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, shared="shared_expert", defaults=_BOTH | _QWEN2),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, defaults=_BOTH | _QWEN3),
}
