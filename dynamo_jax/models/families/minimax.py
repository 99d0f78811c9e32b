"""MiniMax-M2 and M3: sigmoid routing, half of each head turned.

M2 has norms of whole queries and keys. M3 has norms of each head, times 1 + w, clamped SwiGLU everywhere, dense layers,
and layers whose attention is to blocks of keys that an index chooses: it is read up to the length at which these are
all.
"""

from __future__ import annotations

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SPARSE,
    SPARSE_NAMES,
    W123,
    Family,
    Raw,
    Rotary,
    dense_types,
    grouped,
    layers_of,
    mixture,
    names_of_mlp,
    number,
    per_layer,
    share_turned,
    sigmoid_router,
    stack,
    whole,
    whole_or_none,
    zero_centred,
)
from dynamo_jax.models.specs import WHOLE_LIMIT, Dense, LayerSpec


def _minimax_m2(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = grouped(raw, rope, share=share_turned(raw), qk_norm="vector")
    return stack(raw, mixer, mixture(raw, sigmoid_router()))


def _minimax_m3(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = grouped(raw, rope, share=share_turned(raw), qk_norm="head")
    clamped: Raw = {name: number(raw, name) for name in ("swiglu_limit", "swiglu_alpha")}
    scale = number(raw, "routed_scaling_factor")
    router = sigmoid_router(scale)
    shared = whole_or_none(raw, "shared_intermediate_size", 0)
    experts = mixture(raw, router, shared_intermediate_size=shared, **clamped)
    dense = Dense(dense_intermediate_size=whole(raw, "dense_intermediate_size"), **clamped)
    channels = [dense if i in _dense(raw) else experts for i in range(layers_of(raw))]
    return tuple(LayerSpec(mixer=mixer, channel=channel) for channel in channels)


def _dense(raw: Raw) -> set[int]:
    """The dense layers, by ``mlp_layer_types`` or by the published files' ``moe_layer_freq``, a number for each."""
    sparse = None if raw.get("mlp_layer_types") is not None else per_layer(raw, "moe_layer_freq", "0 or 1")
    if sparse is None:
        return dense_types(raw, 0)
    return {i for i, has in enumerate(sparse) if not has}


def _index_limit(raw: Raw) -> tuple[int, str]:
    index = raw.get("sparse_attention_config") or {}
    if not isinstance(index, dict):
        raise ValueError(f"sparse_attention_config={shown(index)}: expected an object")
    types = raw.get("layer_types") or index.get("sparse_attention_freq") or []
    if not isinstance(types, list):
        raise ValueError(f"layer_types={shown(types)}: expected a list")
    if not any(kind not in (FULL, 0) for kind in types):
        return WHOLE_LIMIT, ""
    named = {"index_block_size": "sparse_block_size", "index_topk_blocks": "sparse_topk_blocks"}
    size, blocks = (whole(raw | {ours: index.get(theirs, raw[ours])}, ours) for ours, theirs in named.items())
    return size * blocks, "past them attention is to the blocks of keys that an index chooses (index_topk_blocks)"


_NAMES = SPARSE_NAMES | {"router_correction": f"{SPARSE}.e_score_correction_bias"}
_M3: Raw = {
    **{"num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "rotary_dim": 64},
    **{"dense_intermediate_size": 12288, "shared_intermediate_size": 3072, "routed_scaling_factor": 2.0},
    **{"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "index_block_size": 128, "index_topk_blocks": 16},
    "mlp_layer_types": None,
}
FAMILIES = {
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        _minimax_m2,
        _NAMES,
        SPARSE,
        W123,
        experts_key="num_local_experts",
        defaults={"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e6},
        partial=True,
    ),
    "minimax_m3_vl_text": Family(
        "MiniMaxM3SparseForConditionalGeneration",
        _minimax_m3,
        _NAMES | names_of_mlp("shared", f"{SPARSE}.shared_experts"),
        SPARSE,
        W123,
        top=zero_centred,
        limit=_index_limit,
        experts_key="num_local_experts",
        defaults=_M3,
        partial=True,
    ),
}
