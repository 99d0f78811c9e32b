"""Laguna: heads and rotary positions of their own in windows, a gate for each head's output."""

from __future__ import annotations

import dataclasses
from typing import Any

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    by_type,
    dense_types,
    flag,
    layer_types,
    layers_of,
    mixture,
    names_of_mlp,
    number,
    per_layer,
    sigmoid_router,
    stack,
    whole,
)
from dynamo_jax.models.specs import LayerSpec, check_number


def _laguna(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    if flag(raw, "moe_apply_router_weight_on_input"):
        raise ValueError("moe_apply_router_weight_on_input is not supported")
    types = layer_types(raw, [FULL] * layers_of(raw))
    gates: Raw = {"gating": _gating(raw["gating"]), "gate_function": "softplus"}
    mixers = by_type(raw, rope, types, qk_norm="head", **gates, **biased(raw))
    limit = number(raw, "moe_router_logit_softcapping", 0.0)
    router = sigmoid_router(number(raw, "moe_routed_scaling_factor"), router_logit_softcapping=limit)
    shared = whole(raw, "shared_expert_intermediate_size")
    experts = mixture(raw, router, "moe_intermediate_size", shared_intermediate_size=shared)
    own = [dataclasses.replace(m, num_attention_heads=heads) for m, heads in zip(mixers, _heads(raw))]
    return stack(raw, own, experts, dense=dense_types(raw))


def _gating(found: Any) -> str:
    if found is True or found in ("per-head", "per-element"):
        return "per-head" if found is True else found
    raise ValueError(f"gating={shown(found)}: expected true, 'per-head' or 'per-element'")


def _heads(raw: Raw) -> list[int]:
    key = "num_attention_heads_per_layer"
    found = per_layer(raw, key, "a number")
    if found is None:
        return [whole(raw, "num_attention_heads")] * layers_of(raw)
    for heads in found:
        check_number(f"{key}: a member", heads, 1)
    return found


_DEFAULTS: Raw = {
    **{"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "rms_norm_eps": 1e-6},
    **{"sliding_window": 512, "gating": True, "shared_expert_intermediate_size": 512},
    **{"moe_routed_scaling_factor": 1.0, "moe_router_logit_softcapping": 0.0},
    "moe_apply_router_weight_on_input": False,
}
_ROPE: Raw = {FULL: {"rope_theta": 500000.0, "partial_rotary_factor": 0.5}, SLIDING: {"rope_theta": 10000.0}}
_NAMES = {
    "router_correction": "mlp.experts.e_score_correction_bias",
    **names_of_mlp("shared", "mlp.shared_expert"),
}
FAMILIES = {
    "laguna": Family("LagunaForCausalLM", _laguna, _NAMES, defaults=_DEFAULTS, rope=_ROPE, partial=True, by_type=True),
}
