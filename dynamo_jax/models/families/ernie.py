"""ERNIE 4.5: a softmax router whose choice has a bias, neighbours of a head turned against each other.

ERNIE 4.5 VL has experts of text and of images, each with a router; a token of text goes to those of text alone, and to
the shared ones. Its rotary positions are of three axes, which are one position for text. Published files count the
experts of images on from those of text, under flat keys with a number for each; transformers has keys and tensors of
its own.
"""

from __future__ import annotations

import dataclasses
import functools

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FIRST,
    PLAIN,
    ROW,
    Family,
    Raw,
    Rotary,
    dense_types,
    flag,
    grouped,
    layers_of,
    mixture_with_shared,
    number,
    stack,
    whole,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _ernie4_5_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    return _layers(raw, rope, _dense(raw))


def _layers(raw: Raw, rope: Rotary, dense: set[int]) -> tuple[LayerSpec, ...]:
    if flag(raw, "use_bias") or number(raw, "moe_norm_min", 0.0) > 1e-6:
        raise ValueError("use_bias, and a moe_norm_min that gates could reach, are not supported for ERNIE 4.5")
    router = Router(norm_topk_prob=True, choice_bias=True)
    experts = mixture_with_shared(raw, router, "moe_num_shared_experts", chosen="moe_k")
    return stack(raw, grouped(raw, functools.partial(rope, rope_interleave=True)), experts, dense=dense)


def _dense(raw: Raw) -> set[int]:
    first, last = whole(raw, "moe_layer_start_index", 0), whole(raw, "moe_layer_end_index", -1)
    last = layers_of(raw) - 1 if last == -1 else last
    step = whole(raw, "moe_layer_interval")
    return {i for i in range(layers_of(raw)) if (i + 1) % step or not first <= i <= last}


def _ernie4_5_vl(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    sizes = raw.get("moe_intermediate_size")
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise ValueError(f"moe_intermediate_size={shown(sizes)}: expected a list of two, of text and of images")
    return _layers(raw | {"moe_intermediate_size": sizes[0]}, rope, dense_types(raw))


def _published(raw: Raw) -> Raw:
    """From flat keys, where a list has a number for text and one for images."""
    raw = _FLAT | {key: value for key, value in raw.items() if value is not None}
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise ValueError(f"{key}={shown(raw[key])} is not supported for {raw['model_type']}; only {shown(only)}")
    for key, one in _BOTH.items():
        if isinstance(both := raw.get(key), list):
            if len(both) != 2 or any(type(n) is not int for n in both):
                raise ValueError(f"{key}={shown(both)}: expected two whole numbers, of text and of images")
            raw[key] = one(both)
            if key == "moe_num_experts" and both[0] != both[1]:
                raise ValueError(f"moe_num_experts={both}: only as many of text as of images are supported")
    dense = _dense(raw)
    return raw | {"mlp_layer_types": ["dense" if i in dense else "sparse" for i in range(layers_of(raw))]}


_BOTH = {"moe_num_experts": max, "moe_layer_start_index": min, "moe_layer_end_index": max}
_ONLY: Raw = {
    **{"moe_gate": "topk", "moe_gate_act": "softmax", "moe_norm_gate_logits": True, "moe_use_aux_free": True},
    **{"use_rmsnorm": True, "compression_ratio": 1.0},
}
_DEFAULTS: Raw = {
    **{"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
    **{"use_bias": False, "moe_num_shared_experts": 2, "moe_norm_min": 1e-12},
    **{"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
}
_FLAT: Raw = _DEFAULTS | {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "tie_word_embeddings": False}
_BIAS = "e_score_correction_bias"
_TEXT = Family(
    "Ernie4_5_VLMoeForConditionalGeneration",
    _ernie4_5_vl,
    {"router": "mlp.text_moe.gate.weight", "router_correction": f"mlp.text_moe.gate.moe_statics.{_BIAS}{ROW}"},
    moe="mlp.text_moe",
    experts="fused",
    experts_key="moe_num_experts",
    defaults=_DEFAULTS | {"moe_k": 6, "moe_intermediate_size": [1536, 512], "mlp_layer_types": None},
    rope_types=("default",),
    by_prefix={
        "model.": Family(
            "Ernie4_5_VLMoeForConditionalGeneration",
            _ernie4_5_vl,
            {"router": f"mlp.gate.weight{PLAIN}", "router_correction": f"mlp.moe_statics.{_BIAS}{FIRST}"},
            beside=r"mlp\.experts\.\d+\..*",
            alone="model.language_model.",
        )
    },
)
FAMILIES = {
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        _ernie4_5_moe,
        {"router_correction": f"mlp.moe_statics.{_BIAS}{ROW}"},
        experts_key="moe_num_experts",
        defaults=_DEFAULTS,
    ),
    "ernie4_5_vl_moe_text": _TEXT,
    "ernie4_5_moe_vl": dataclasses.replace(_TEXT, newer=_published, defaults=_FLAT),
}
