"""MiMo-V2: windows with sinks, twice the key/value heads and another rotary base; values smaller than keys."""

from __future__ import annotations

import dataclasses

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    by_type,
    corrected,
    dense_types,
    flag,
    layer_types,
    layers_of,
    mixture,
    number,
    stack,
    whole,
)
from dynamo_jax.models.specs import Grouped, LayerSpec


def _mimo_v2_flash(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    count = layers_of(raw)
    types = layer_types(raw, [FULL if i == 0 or (i + 1) % 6 == 0 else SLIDING for i in range(count)])
    if raw.get("sliding_window_size") is not None:  # of tokens before the query's own
        raw = raw | {"sliding_window": whole(raw, "sliding_window_size") + 1}
    dense = dense_types(raw)
    _agrees(raw, "hybrid_layer_pattern", [int(t == SLIDING) for t in types])
    _agrees(raw, "moe_layer_freq", [int(i not in dense) for i in range(count)])
    scale = 1.0 if raw["attention_value_scale"] is None else number(raw, "attention_value_scale")
    sizes = {"v_head_dim": whole(raw, "v_head_dim"), "attention_value_scale": scale}
    mixers = by_type(raw, rope, types, 0.334, qkv_bias=flag(raw, "attention_bias"), **sizes)
    experts = mixture(raw, corrected(raw), "moe_intermediate_size")
    return stack(raw, [_windowed(mixer) if mixer.window else mixer for mixer in mixers], experts, dense=dense)


def _windowed(mixer: Grouped) -> Grouped:
    return dataclasses.replace(mixer, num_key_value_heads=2 * mixer.num_key_value_heads, attention_sinks=True)


def _agrees(raw: Raw, key: str, want: list[int]) -> None:
    """ValueError unless an older key, where there is one, says what the decoder takes."""
    if raw.get(key) is not None and raw[key] != want:
        raise ValueError(f"{key}={shown(raw[key])}: expected {shown(want)}, as layer_types and mlp_layer_types say")


_DEFAULTS: Raw = {
    **{"num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "intermediate_size": 16384},
    **{"rms_norm_eps": 1e-5, "sliding_window": 129, "attention_value_scale": 0.707},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
}
_ROPE: Raw = {FULL: {"rope_theta": 5e6}, SLIDING: {"rope_theta": 1e4}}
FAMILIES = {
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        _mimo_v2_flash,
        {"attention.sinks": "self_attn.attention_sink_bias"},
        experts_key="n_routed_experts",
        defaults=_DEFAULTS,
        rope=_ROPE,
        partial=True,
        by_type=True,
    ),
}
