"""Ling 3.0: five layers with Kimi's delta attention, then one with gated latent attention; DeepSeek-V3's experts."""

from __future__ import annotations

from dynamo_jax.models.families.deepseek import latent
from dynamo_jax.models.families.family import (
    FULL,
    LINEAR,
    Family,
    Raw,
    Rotary,
    corrected,
    dense_types,
    flag,
    layer_types,
    layers_of,
    mixture_with_shared,
    number,
    stack,
    whole,
)
from dynamo_jax.models.families.kimi_linear import names_of_delta, renamed
from dynamo_jax.models.specs import NUMBER_LIMIT, TINY, KimiDelta, LayerSpec, Mixer


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
_NAMES = {
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
_DEFAULTS: Raw = {
    **{"intermediate_size": 6144, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "q_lora_rank": None},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 6e6},
    **{"short_conv_kernel_size": 4, "kda_safe_gate": True, "kda_lower_bound": -5.0, "layer_types": None},
    **{"layer_group_size": 6, "first_k_dense_replace": 2, "mlp_layer_types": None, "n_shared_experts": 1},
    **{"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
FAMILIES = {
    "bailing_hybrid": Family("BailingHybridForCausalLM", _bailing_hybrid, _NAMES, defaults=_DEFAULTS, newer=_newer),
}
