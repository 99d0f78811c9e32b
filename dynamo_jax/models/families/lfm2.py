"""LFM2: short convolutions in most layers, attention in the others."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    FULL,
    W123,
    Family,
    Raw,
    Rotary,
    flag,
    grouped,
    layer_types,
    layers_of,
    mixture,
    number,
    stack,
    whole,
)
from dynamo_jax.models.specs import LayerSpec, Mixer, Router, ShortConv

CONV = "conv"


def _lfm2_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    if raw.get("layer_types") is None:
        raise ValueError("missing key layer_types")
    sizes = {"conv_L_cache": whole(raw, "conv_L_cache"), "channels": whole(raw, "hidden_size")}
    kinds: dict[str, Mixer] = {
        CONV: ShortConv(conv_bias=flag(raw, "conv_bias"), **sizes),
        FULL: grouped(raw, rope, qk_norm="head"),
    }
    router = Router(
        routing="sigmoid",
        choice_bias=flag(raw, "use_expert_bias"),
        norm_topk_prob=flag(raw, "norm_topk_prob"),
        norm_floor=1e-6,
        routed_scaling_factor=number(raw, "routed_scaling_factor"),
    )
    types = layer_types(raw, [FULL] * layers_of(raw), (CONV, FULL))
    dense = range(whole(raw, "num_dense_layers", 0))
    return stack(raw, [kinds[of] for of in types], mixture(raw, router, "moe_intermediate_size"), dense=dense)


def _top(raw: Raw) -> Raw:
    return {"tie_word_embeddings": flag(raw, "tie_embedding")} if "tie_embedding" in raw else {}


_NAMES = {
    "norm.scale": "embedding_norm.weight",
    "attention_norm.scale": "operator_norm.weight",
    "experts_norm.scale": "ffn_norm.weight",
    **{f"attention.{part}_norm": f"self_attn.{part}_layernorm.weight" for part in "qk"},
    "attention.o": "self_attn.out_proj.weight",
    "attention.in_proj": "conv.in_proj.weight",
    "attention.conv": "conv.conv.weight",
    "attention.out": "conv.out_proj.weight",
    "attention.in_bias": "conv.in_proj.bias",
    "attention.conv_bias": "conv.conv.bias",
    "attention.out_bias": "conv.out_proj.bias",
    **{f"dense.{part}": f"feed_forward.{name}.weight" for part, name in zip(("gate", "up", "down"), W123.split())},
    "router": "feed_forward.gate.weight",
    "router_correction": "feed_forward.expert_bias",
}
_DEFAULTS: Raw = {
    **{"num_key_value_heads": 8, "intermediate_size": 7168, "norm_eps": 1e-5, "rope_theta": 1e6},
    **{"conv_bias": False, "conv_L_cache": 3, "num_dense_layers": 2, "tie_word_embeddings": True},
    **{"use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
}
FAMILIES = {
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM", _lfm2_moe, _NAMES, "feed_forward", W123, _top, defaults=_DEFAULTS, eps_key="norm_eps"
    ),
}
