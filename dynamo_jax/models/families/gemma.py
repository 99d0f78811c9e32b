"""Gemma 4: a dense MLP beside the experts, each between norms of its own; other heads in layers that see all."""

from __future__ import annotations

import functools
from typing import Any

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
    number,
    stack,
    whole,
    whole_or_none,
)
from dynamo_jax.models.specs import Grouped, LayerSpec, Router


def _gemma4(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    _check(raw)
    count = layers_of(raw)
    types = [*layer_types(raw, [SLIDING if (i + 1) % 6 else FULL for i in range(count)])[:-1], FULL]
    experts = mixture(
        raw,
        Router(norm_topk_prob=True, own_norm=True, expert_scale=True),
        "moe_intermediate_size",
        "top_k_experts",
        shared_intermediate_size=whole(raw, "intermediate_size"),
        hidden_act=raw["hidden_activation"],
        own_norms=True,
    )
    mixers = [_mixer(raw, rope, i, types[i]) for i in range(count)]
    return stack(raw, mixers, experts, norms="both", layer_scalar=True)


def _check(raw: Raw) -> None:
    """ValueError: a part that Gemma's models without experts have."""
    for key in ("enable_moe_block", "hidden_size_per_layer_input"):
        if key not in raw:
            raise ValueError(f"missing key {key}")
    if not flag(raw, "enable_moe_block"):
        raise ValueError("enable_moe_block=False: there is no expert to quantize")
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if whole_or_none(raw, key, 0):
            raise ValueError(f"{key}={raw[key]} is not supported")
    if raw["use_bidirectional_attention"] not in (None, "vision"):
        raise ValueError(f"use_bidirectional_attention={shown(raw['use_bidirectional_attention'])} is not supported")


def _mixer(raw: Raw, rope: Rotary, layer: int, of: str) -> Grouped:
    full = of == FULL
    return grouped(
        raw | _sizes(raw, layer, full),
        functools.partial(rope, of=of),
        window=0 if full else whole(raw, "sliding_window"),
        qk_norm="head",
        v_norm=True,
        attention_k_eq_v=full and flag(raw, "attention_k_eq_v"),
        attention_scale=1.0,
        **biased(raw),
    )


def _sizes(raw: Raw, layer: int, full: bool) -> Raw:
    """Keys of attention that a layer has a value of its own for."""
    own: Any = raw.get("per_layer_config")
    if own is not None:
        found = own.get(str(layer), {}) if isinstance(own, dict) else None
        if not isinstance(found, dict) or found.keys() - {"head_dim", "num_key_value_heads"}:
            raise ValueError(f"per_layer_config={shown(own)}: expected head_dim and num_key_value_heads of layers")
        return found
    if not full:
        return {}
    heads = raw.get("num_global_key_value_heads") if flag(raw, "attention_k_eq_v") else None
    sizes: Raw = {"head_dim": whole(raw, "global_head_dim")}
    return sizes if heads is None else sizes | {"num_key_value_heads": heads}


def _top(raw: Raw) -> Raw:
    cap = raw["final_logit_softcapping"]
    return {
        "embedding_multiplier": whole(raw, "hidden_size") ** 0.5,
        "final_logit_softcapping": 0.0 if cap is None else number(raw, "final_logit_softcapping"),
    }


_NAMES = {
    "attention_post_norm.scale": "post_attention_layernorm.weight",
    "experts_norm.scale": "pre_feedforward_layernorm_2.weight",
    "experts_post_norm.scale": "post_feedforward_layernorm.weight",
    "routed_post_norm.scale": "post_feedforward_layernorm_2.weight",
    "shared_norm.scale": "pre_feedforward_layernorm.weight",
    "shared_post_norm.scale": "post_feedforward_layernorm_1.weight",
    **names_of_mlp("shared", "mlp"),
    "router": "router.proj.weight",
    "router_norm": "router.scale",
    "router_scale": "router.per_expert_scale",
    "layer_scalar": "layer_scalar",
}
_DEFAULTS: Raw = {
    **{"num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": False},
    **{"rms_norm_eps": 1e-6, "sliding_window": 512, "tie_word_embeddings": True, "num_kv_shared_layers": 0},
    **{"hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": None, "intermediate_size": 9216},
    "use_bidirectional_attention": None,
}
_ROPE: Raw = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_theta": 1e4},
}
FAMILIES = {
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        _gemma4,
        _NAMES,
        moe="",
        experts="fused",
        top=_top,
        defaults=_DEFAULTS,
        rope=_ROPE,
        rope_types=("default", "proportional"),
        by_type=True,
    ),
}
