"""Trinity (AFMoE): norms before and after each part, gated outputs, positions in windows alone."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    check_slides,
    flag,
    grouped,
    layer_types,
    layers_of,
    mixture_with_shared,
    number,
    sigmoid_router,
    stack,
    unturned,
    whole,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec


def _afmoe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    count, every = layers_of(raw), whole(raw, "global_attn_every_n_layers")
    types = layer_types(raw, [SLIDING if (i + 1) % every else FULL for i in range(count)])
    mixer = grouped(raw, rope, qk_norm="head", gating="per-element", **biased(raw))
    check_slides(raw, types)
    mixers = [unturned(mixer, window) for window in windows_of(raw, types)]
    scale = number(raw, "route_scale")
    router = sigmoid_router(scale)
    experts = mixture_with_shared(raw, router, "num_shared_experts")
    dense = range(whole(raw, "num_dense_layers", 0))
    return stack(raw, mixers, experts, dense=dense, norms="both")


def _top(raw: Raw) -> Raw:
    return {"embedding_multiplier": whole(raw, "hidden_size") ** 0.5} if flag(raw, "mup_enabled") else {}


_NAMES = {
    "attention.gate": "self_attn.gate_proj.weight",
    "attention_post_norm.scale": "post_attention_layernorm.weight",
    "experts_norm.scale": "pre_mlp_layernorm.weight",
    "experts_post_norm.scale": "post_mlp_layernorm.weight",
    "router": "mlp.router.gate.weight",
    "router_correction": "mlp.expert_bias",
}
_DEFAULTS: Raw = {
    **{"intermediate_size": 6144, "head_dim": 128, "rms_norm_eps": 1e-5, "num_dense_layers": 1},
    **{"num_shared_experts": 2, "route_scale": 1.0, "global_attn_every_n_layers": 4, "sliding_window": 1024},
    "mup_enabled": False,
}
FAMILIES = {"afmoe": Family("AfmoeForCausalLM", _afmoe, _NAMES, top=_top, defaults=_DEFAULTS)}
