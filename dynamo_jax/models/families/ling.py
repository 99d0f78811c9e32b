"""Ling 2.0 and Ring 2.0 (Ring-1T): grouped attention with one matrix for queries, keys and values, half of each head
turned; DeepSeek-V3's experts and router. Ling 3.0: five layers with Kimi's delta attention, then one with gated latent
attention; the same experts.

``transformers`` has no Ling 2.0. Source: the models' own modeling file (BailingMoeV2ForCausalLM, github.com/
inclusionAI/Ling-V2), whose configuration says ``bailing_moe`` as the first Ling does, which is another model. Where
servers know a key that the file does not read (``rotary_dim``, ``moe_shared_expert_intermediate_size``), it counts.
"""

from __future__ import annotations

import dataclasses

from dynamo_jax.files import shown
from dynamo_jax.models.families.deepseek import latent
from dynamo_jax.models.families.family import (
    FULL,
    LINEAR,
    Family,
    Raw,
    Rotary,
    corrected,
    dense_types,
    first_dense,
    flag,
    grouped,
    layer_types,
    layers_of,
    mixture,
    mixture_with_shared,
    number,
    share_turned,
    stack,
    whole,
    whole_or_none,
)
from dynamo_jax.models.families.kimi_linear import names_of_delta, renamed
from dynamo_jax.models.specs import NUMBER_LIMIT, TINY, KimiDelta, LayerSpec, Mixer


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


def _bailing_hybrid(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    kinds: dict[str, Mixer] = {
        FULL: latent(raw, rope, True, gating="per-head"),
        LINEAR: KimiDelta(
            linear_num_heads=whole(raw, "num_attention_heads"),
            linear_head_dim=whole(raw, "linear_head_dim"),
            linear_conv_kernel_dim=whole(raw, "short_conv_kernel_size"),
            low_rank=False,
            decay_limit=-number(raw, "kda_lower_bound", -NUMBER_LIMIT, -TINY) if flag(raw, "kda_safe_gate") else 0.0,
        ),
    }
    period = whole(raw, "layer_group_size")
    default = [LINEAR if (i + 1) % period else FULL for i in range(layers_of(raw))]
    mixers = [kinds[of] for of in layer_types(raw, default, (LINEAR, FULL))]
    dense = dense_types(raw, whole(raw, "first_k_dense_replace", 0))
    return stack(raw, mixers, mixture_with_shared(raw, corrected(raw)), dense=dense)


def _newer(raw: Raw) -> Raw:
    """transformers writes the rotary size of latent attention as ``head_dim``, and the other under another name."""
    raw = renamed(raw)
    return raw if "linear_head_dim" in raw else raw | {"linear_head_dim": raw.get("head_dim", 128)}


_MODULE = "attention"
_LATENT = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
_OURS = ("q_down", "q_down_norm", "q_up", "kv_down", "kv_norm", "kv_up")
_HYBRID_NAMES = {
    "embed": "word_embeddings.weight",
    **names_of_delta(_MODULE),
    **{f"attention.{ours}": f"{_MODULE}.{theirs}.weight" for ours, theirs in zip(_OURS, _LATENT)},
    **{
        "attention.q_down_bias": f"{_MODULE}.q_a_proj.bias",
        "attention.kv_down_bias": f"{_MODULE}.kv_a_proj_with_mqa.bias",
    },
    **{"attention.decay": f"{_MODULE}.f_proj.weight", "attention.gate": f"{_MODULE}.g_proj.weight"},
    **{"attention.o": f"{_MODULE}.dense.weight", "attention.o_bias": f"{_MODULE}.dense.bias"},
    "router_correction": "mlp.gate.expert_bias",
}
_HYBRID: Raw = {
    **{"intermediate_size": 6144, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "q_lora_rank": None},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 6e6},
    **{"short_conv_kernel_size": 4, "kda_safe_gate": True, "kda_lower_bound": -5.0, "layer_types": None},
    **{"layer_group_size": 6, "first_k_dense_replace": 2, "mlp_layer_types": None, "n_shared_experts": 1},
    **{"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
FAMILIES = {
    "bailing_moe_v2": _FAMILY,
    "bailing_moe": _FAMILY,
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM", _bailing_hybrid, _HYBRID_NAMES, defaults=_HYBRID, newer=_newer
    ),
}
