"""Qwen2-MoE, Qwen3-MoE and the text part of Qwen3-VL: dense layers among sparse ones, a gated shared expert in the
oldest."""

from __future__ import annotations

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    flag,
    grouped,
    layer_types,
    layers_of,
    mixture,
    names_of_mlp,
    stack,
    whole,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec, Mixture, Router


def _qwen2_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    last = whole(raw, "max_window_layers", 0)
    default = [FULL if i % 2 or i >= last else SLIDING for i in range(layers_of(raw))]
    types = layer_types(raw, default)
    windows = windows_of(raw, types) if flag(raw, "use_sliding_window") else ()
    experts = beside_shared(raw, softmax_router(raw))
    return stack(raw, grouped(raw, rope, qkv_bias=flag(raw, "qkv_bias")), experts, windows, dense_by_step(raw))


def _qwen3_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    windows = windows_of(raw) if flag(raw, "use_sliding_window") else ()
    experts = mixture(raw, softmax_router(raw), "moe_intermediate_size")
    return stack(raw, grouped(raw, rope, qk_norm="head", **biased(raw)), experts, windows, dense_by_step(raw))


def _qwen3_vl_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    experts = mixture(raw, Router(norm_topk_prob=True), "moe_intermediate_size")
    return stack(raw, grouped(raw, rope, qk_norm="head", **biased(raw)), experts, dense=dense_by_step(raw))


def beside_shared(raw: Raw, router: Router) -> Mixture:
    """Routed experts beside a shared one that has a gate."""
    shared = whole(raw, "shared_expert_intermediate_size")
    return mixture(raw, router, "moe_intermediate_size", shared_intermediate_size=shared, shared_gate=True)


def softmax_router(raw: Raw) -> Router:
    return Router(norm_topk_prob=flag(raw, "norm_topk_prob"))


def dense_by_step(raw: Raw) -> set[int]:
    """The dense layers: those named, and all but each ``decoder_sparse_step``-th."""
    step, only = whole(raw, "decoder_sparse_step"), raw["mlp_only_layers"] or []
    if not isinstance(only, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in only):
        raise ValueError(f"mlp_only_layers={shown(only)}: expected a list of whole numbers")
    return {i for i in range(layers_of(raw)) if i in set(only) or (i + 1) % step}


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
_VISION: Raw = {"num_key_value_heads": 16, "rope_theta": 500000.0, "tie_word_embeddings": True}
SHARED = names_of_mlp("shared", "mlp.shared_expert")
FAMILIES = {
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, SHARED, defaults=_BOTH | _QWEN2),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, defaults=_BOTH | _QWEN3),
    "qwen3_vl_moe_text": Family("Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe, defaults=_BOTH | _QWEN2 | _VISION),
}
