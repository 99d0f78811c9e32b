"""Hunyuan-A13B: a shared expert of the routed ones' size, heads turned before their norms. Hy3: DeepSeek-V3's router
and experts under names of its own, norms of each head's queries and keys."""

from __future__ import annotations

from typing import Any

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    PLAIN_ROPES,
    Family,
    Raw,
    Rotary,
    biased,
    dense_types,
    flag,
    grouped,
    mixture,
    mixture_with_shared,
    names_of_mlp,
    number,
    sigmoid_router,
    stack,
    whole,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _hunyuan_v1_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    raw = raw | {"moe_topk": _same(raw, "moe_topk")}
    shared = whole(raw, "intermediate_size")
    experts = mixture(raw, Router(norm_topk_prob=True), chosen="moe_topk", shared_intermediate_size=shared)
    return stack(raw, grouped(raw, rope, qk_norm="turned", **biased(raw)), experts)


def _same(raw: Raw, key: str) -> Any:
    """The number under a key that may hold one for each layer."""
    found = raw.get(key)
    if isinstance(found, list) and found and all(one == found[0] for one in found):
        return found[0]
    if isinstance(found, list):
        raise ValueError(f"{key}={shown(found)}: expected the same number for each layer")
    return found


def _hy_v3(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    if flag(raw, "mlp_bias"):
        raise ValueError("mlp_bias is not supported for hy_v3")
    scale = number(raw, "router_scaling_factor")
    router = sigmoid_router(scale)
    experts = mixture_with_shared(raw, router, "num_shared_experts")
    return stack(raw, grouped(raw, rope, qk_norm="head", **biased(raw)), experts, dense=dense_types(raw))


_SHARED = names_of_mlp("shared", "mlp.shared_mlp")
_V1_NAMES = {
    **_SHARED,
    "router": "mlp.gate.wg.weight",
    "attention.q_norm": "self_attn.query_layernorm.weight",
    "attention.k_norm": "self_attn.key_layernorm.weight",
}
_NAMES = {**_SHARED, "router": "mlp.router.gate.weight", "router_correction": "mlp.expert_bias"}
_DEFAULTS: Raw = {
    "intermediate_size": 13312,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.006,
    "rms_norm_eps": 1e-5,
    "rope_theta": 11158840.0,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "mlp_layer_types": None,
    "mlp_bias": False,
}
FAMILIES = {
    "hy_v3": Family("HYV3ForCausalLM", _hy_v3, _NAMES, defaults=_DEFAULTS),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM",
        _hunyuan_v1_moe,
        _V1_NAMES,
        defaults={"rms_norm_eps": 1e-5},
        rope_types=(*PLAIN_ROPES, "ntk_alpha"),
    ),
}
