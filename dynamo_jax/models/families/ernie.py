"""ERNIE 4.5: a softmax router whose choice has a bias, neighbours of a head turned against each other."""

from __future__ import annotations

import functools

from dynamo_jax.models.families.family import (
    ROW,
    Family,
    Raw,
    Rotary,
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
    if flag(raw, "use_bias") or number(raw, "moe_norm_min", 0.0) > 1e-6:
        raise ValueError("use_bias, and a moe_norm_min that gates could reach, are not supported for ernie4_5_moe")
    router = Router(norm_topk_prob=True, choice_bias=True)
    experts = mixture_with_shared(raw, router, "moe_num_shared_experts", chosen="moe_k")
    return stack(raw, grouped(raw, functools.partial(rope, rope_interleave=True)), experts, dense=_dense(raw))


def _dense(raw: Raw) -> set[int]:
    first, last = whole(raw, "moe_layer_start_index", 0), whole(raw, "moe_layer_end_index", -1)
    last = layers_of(raw) - 1 if last == -1 else last
    step = whole(raw, "moe_layer_interval")
    return {i for i in range(layers_of(raw)) if (i + 1) % step or not first <= i <= last}


_DEFAULTS: Raw = {
    **{"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
    **{"use_bias": False, "moe_num_shared_experts": 2, "moe_norm_min": 1e-12},
    **{"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
}
FAMILIES = {
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        _ernie4_5_moe,
        {"router_correction": f"mlp.moe_statics.e_score_correction_bias{ROW}"},
        experts_key="moe_num_experts",
        defaults=_DEFAULTS,
    ),
}
