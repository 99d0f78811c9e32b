"""Hy3: DeepSeek-V3's router and experts under names of its own, norms of each head's queries and keys."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    Family,
    Raw,
    Rotary,
    biased,
    dense_types,
    flag,
    grouped,
    mixture,
    number,
    shared_beside,
    stack,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _hy_v3(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    if flag(raw, "mlp_bias"):
        raise ValueError("mlp_bias is not supported for hy_v3")
    scale = number(raw, "router_scaling_factor")
    router = Router(routing="sigmoid", norm_topk_prob=True, routed_scaling_factor=scale)
    experts = mixture(raw, router, "moe_intermediate_size", **shared_beside(raw, "num_shared_experts"))
    return stack(raw, grouped(raw, rope, qk_norm="head", **biased(raw)), experts, dense=dense_types(raw))


_NAMES = {
    "router": "mlp.router.gate.weight",
    "router_correction": "mlp.expert_bias",
    **{f"shared.{part}": f"mlp.shared_mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
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
FAMILIES = {"hy_v3": Family("HYV3ForCausalLM", _hy_v3, _NAMES, defaults=_DEFAULTS)}
