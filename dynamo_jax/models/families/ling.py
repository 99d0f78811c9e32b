"""Ling 2.0 and Ring 2.0 (Ring-1T): grouped attention with one matrix for queries, keys and values, half of each head
turned; DeepSeek-V3's experts and router.

``transformers`` has no such model. Source: the models' own modeling file (BailingMoeV2ForCausalLM, github.com/
inclusionAI/Ling-V2), whose configuration says ``bailing_moe`` as the first Ling does, which is another model. Where
servers know a key that the file does not read (``rotary_dim``, ``moe_shared_expert_intermediate_size``), it counts.
"""

from __future__ import annotations

import dataclasses

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    Family,
    Raw,
    Rotary,
    corrected,
    first_dense,
    flag,
    grouped,
    mixture,
    share_turned,
    stack,
    whole,
    whole_or_none,
)
from dynamo_jax.models.specs import LayerSpec


def _bailing_moe_v2(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    kind, made, turned = raw["model_type"], raw.get("architectures"), share_turned(raw)
    if kind == "bailing_moe" and made != [_ARCHITECTURE]:
        raise ValueError(f"architectures={shown(made)} is not supported for bailing_moe; only {_ARCHITECTURE}")
    for key, only in _ONLY.items():
        if raw[key] != only:
            raise ValueError(f"{key}={shown(raw[key])} is not supported for {kind}; only {shown(only)}")
    mixer = grouped(
        *(raw, rope, turned),
        fused_projections=True,
        qkv_bias=flag(raw, "use_qkv_bias"),
        qk_norm="head" if flag(raw, "use_qk_norm") else "none",
    )
    if mixer.rope and raw.get("rotary_dim") is not None and mixer.rope.dim != raw["rotary_dim"]:
        raise ValueError(f"rotary_dim={raw['rotary_dim']} and partial_rotary_factor contradict each other")
    several = whole(raw, "num_experts_per_tok") > 1  # the gate of a single expert is its score
    router = corrected(raw | {"norm_topk_prob": several})
    router = dataclasses.replace(router, choice_bias=flag(raw, "moe_router_enable_expert_bias"))
    size = _OF_SHARED if raw.get(_OF_SHARED) is not None else "moe_intermediate_size"
    shared = whole_or_none(raw, "num_shared_experts", 0) * whole(raw, size)
    experts = mixture(raw, router, "moe_intermediate_size", shared_intermediate_size=shared)
    return stack(raw, mixer, experts, dense=first_dense(raw))


_ARCHITECTURE, _OF_SHARED = "BailingMoeV2ForCausalLM", "moe_shared_expert_intermediate_size"
_NAMES = {
    "embed": "word_embeddings.weight",
    **{"attention.qkv": "attention.query_key_value.weight", "attention.qkv_bias": "attention.query_key_value.bias"},
    **{"attention.q_norm": "attention.query_layernorm.weight", "attention.k_norm": "attention.key_layernorm.weight"},
    **{"attention.o": "attention.dense.weight", "router_correction": "mlp.gate.expert_bias"},
}
_ONLY: Raw = {  # what the model's own file computes, whatever these keys say
    **{"use_bias": False, "use_rmsnorm": True, "norm_head": False, "use_sliding_window": False},
    **{"score_function": "sigmoid", "norm_topk_prob": True},
}
_DEFAULTS: Raw = _ONLY | {
    **{"intermediate_size": 5120, "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 6e5},
    **{"first_k_dense_replace": 1, "num_shared_experts": 1, "use_qk_norm": True, "use_qkv_bias": False},
    **{"n_group": 8, "topk_group": 4, "routed_scaling_factor": 1.0, "moe_router_enable_expert_bias": True},
}
_FAMILY = Family(_ARCHITECTURE, _bailing_moe_v2, _NAMES, defaults=_DEFAULTS, partial=True)
FAMILIES = {"bailing_moe_v2": _FAMILY, "bailing_moe": _FAMILY}
