"""Kimi-Linear: Kimi's delta attention in most layers, latent attention without positions in the others.

Experts, router and dense first layers are DeepSeek-V3's under names of their own.
"""

from __future__ import annotations

from typing import Any

from dynamo_jax.files import shown
from dynamo_jax.models.families.deepseek import latent
from dynamo_jax.models.families.family import (
    FULL,
    LINEAR,
    MIDDLE,
    PARTS,
    SPARSE,
    W123,
    Family,
    Raw,
    Rotary,
    corrected,
    dense_types,
    layer_types,
    layers_of,
    mixture_with_shared,
    names_of_mlp,
    stack,
    whole,
)
from dynamo_jax.models.specs import KimiDelta, LayerSpec, Mixer


def _kimi_linear(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{key}={shown(raw[key])} is not supported; only {only}")
    kinds: dict[str, Mixer] = {
        FULL: latent(raw, None),
        LINEAR: KimiDelta(
            linear_num_heads=whole(raw, "linear_num_heads"),
            linear_head_dim=whole(raw, "linear_head_dim"),
            linear_conv_kernel_dim=whole(raw, "linear_conv_kernel_dim"),
        ),
    }
    default = [LINEAR if i % 4 or not i else FULL for i in range(layers_of(raw))]
    mixers = [kinds[of] for of in layer_types(raw, default, (LINEAR, FULL))]
    dense = dense_types(raw, whole(raw, "first_k_dense_replace", 0))
    return stack(raw, mixers, mixture_with_shared(raw, corrected(raw)), dense=dense)


_RENAMED = {  # two names of one key
    **{"model_max_length": "max_position_embeddings", "moe_renormalize": "norm_topk_prob"},
    **{"num_expert_group": "n_group", "num_experts_per_token": "num_experts_per_tok"},
    "num_shared_experts": "n_shared_experts",
}
_OF_LINEAR = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"} | {
    "short_conv_kernel_size": "linear_conv_kernel_dim"
}


def renamed(raw: Raw) -> Raw:
    """With DeepSeek's names of the keys."""
    for theirs, ours in _RENAMED.items():
        if theirs in raw and ours in raw and raw[theirs] != raw[ours]:
            said = f"{theirs}={shown(raw[theirs])} and {ours}={shown(raw[ours])}"
            raise ValueError(f"{said} contradict each other")
    return {_RENAMED.get(key, key): value for key, value in raw.items()}


def _newer(raw: Raw) -> Raw:
    """With transformers' keys for the layers, in the place of those of published files."""
    raw = renamed(raw)
    given = raw.get("linear_attn_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"linear_attn_config={shown(given)}: expected an object")
    raw |= {ours: given[theirs] for theirs, ours in _OF_LINEAR.items() if theirs in given}
    numbers = {kind: given.get(key) for kind, key in ((FULL, "full_attn_layers"), (LINEAR, "kda_layers"))}
    if raw.get("layer_types") is None and None not in numbers.values():
        raw["layer_types"] = _types(numbers, layers_of(raw))
    return raw


def _types(numbers: dict[str, Any], count: int) -> list[str]:
    """Each layer's, from the numbers of the layers of each type, the first one 1."""
    pairs = [(number, kind) for kind, found in numbers.items() if isinstance(found, list) for number in found]
    of = {number: kind for number, kind in pairs if isinstance(number, int)}
    if len(pairs) != count or of.keys() != set(range(1, count + 1)):
        said = ", ".join(map(shown, numbers.values()))
        raise ValueError(f"full_attn_layers and kda_layers, {said}, do not name each of {count} layers once")
    return [of[i + 1] for i in range(count)]


def names_of_delta(module: str) -> dict[str, str]:
    """Of a layer with Kimi's delta attention."""
    return {
        **{f"attention.{part}": f"{module}.{part}_proj.weight" for part in "qkvb"},
        **{f"attention.{part}_conv": f"{module}.{part}_conv1d.weight" for part in "qkv"},
        **{"attention.a_log": f"{module}.A_log", "attention.dt_bias": f"{module}.dt_bias"},
        "attention.gated_norm": f"{module}.o_norm.weight",
    }


_NAMES = {
    **names_of_delta("self_attn"),
    **{"attention.decay_down": "self_attn.f_a_proj.weight", "attention.decay_up": "self_attn.f_b_proj.weight"},
    **{"attention.gate_down": "self_attn.g_a_proj.weight", "attention.gate_up": "self_attn.g_b_proj.weight"},
    "attention.a_log": f"self_attn.A_log{MIDDLE}",
    **{"router": f"{SPARSE}.gate.weight", "router_correction": f"{SPARSE}.gate.e_score_correction_bias"},
    **names_of_mlp("shared", f"{SPARSE}.shared_experts"),
}
_ONLY = {"mla_use_nope": True, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1}
_DEFAULTS: Raw = {
    **{"intermediate_size": 9216, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "q_lora_rank": None},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4, "layer_types": None},
    **{"first_k_dense_replace": 1, "mlp_layer_types": None, "n_shared_experts": 1, "routed_scaling_factor": 2.446},
    **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
}
FAMILIES = {
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        _kimi_linear,
        _NAMES,
        SPARSE,
        W123,
        defaults=_DEFAULTS,
        newer=_newer,
        respelled={f".{SPARSE}.{part}_proj.": f".mlp.{part}_proj." for part in PARTS},  # as transformers writes them
    ),
}
