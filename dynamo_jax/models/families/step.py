"""Step-3.7: more heads in windows, gated heads, norms that multiply by one more than their weights, clamped experts in
the last layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    by_type,
    check_slides,
    dense_types,
    flag,
    layer_types,
    layers_of,
    mixture,
    names_of_mlp,
    number,
    per_layer,
    sigmoid_router,
    whole,
    whole_or_none,
    zero_centred,
)
from dynamo_jax.models.specs import Dense, Grouped, LayerSpec, Mixture


def _step3p5(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    if flag(raw, "mlp_bias"):
        raise ValueError("mlp_bias is not supported for step3p5")
    mixers, dense = _mixers(raw, rope), dense_types(raw, 3)
    routed, beside = (_limits(raw, key) for key in ("swiglu_limits", "swiglu_limits_shared"))
    scale = number(raw, "moe_router_scaling_factor")
    router = sigmoid_router(scale)
    shared = whole(raw, "share_expert_dim")

    def channel(layer: int) -> Dense | Mixture:
        if layer in dense:
            return Dense(dense_intermediate_size=whole(raw, "intermediate_size"), swiglu_clamp=beside[layer])
        clamps: Raw = {"swiglu_clamp": routed[layer], "shared_swiglu_clamp": beside[layer]}
        return mixture(raw, router, "moe_intermediate_size", shared_intermediate_size=shared, **clamps)

    return tuple(LayerSpec(mixer=mixer, channel=channel(i)) for i, mixer in enumerate(mixers))


def _mixers(raw: Raw, rope: Rotary) -> list[Grouped]:
    types = layer_types(raw, [FULL] * layers_of(raw))
    check_slides(raw, types)
    scale = whole_or_none(raw, "query_pre_attn_scalar") or whole(raw, "head_dim")
    more: Raw = {"qk_norm": "head", "gating": "per-head", "attention_scale": scale**-0.5}
    heads = whole_or_none(raw, "num_sliding_attention_heads") or whole(raw, "num_attention_heads")
    _agrees(raw, types, heads)
    mixers = by_type(raw, rope, types, **more, **biased(raw))
    return [dataclasses.replace(m, num_attention_heads=heads) if m.window else m for m in mixers]


def _agrees(raw: Raw, types: list[str], heads: int) -> None:
    """ValueError unless ``per_layer_config``, where there is one, says no more than that windows have ``heads``."""
    want = {str(i): {"num_attention_heads": heads} for i, of in enumerate(types) if of == SLIDING}
    if raw.get("per_layer_config") is not None and raw["per_layer_config"] != want:
        raise ValueError(f"per_layer_config={shown(raw['per_layer_config'])}: expected {shown(want)}")


def _limits(raw: Raw, key: str) -> list[float]:
    """What a layer's activations stay within, 0 where nothing limits them."""
    found = per_layer(raw, key, "a number or null")
    return [0.0 if one is None else one for one in found or [None] * layers_of(raw)]


_OLDER = {  # names of published files
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
}


def _newer(raw: Raw) -> Raw:
    """The keys that transformers writes, from those of published files: lists there go on for the layers that predict
    further tokens, rotary parameters are a number a layer, and the sparse layers are a list."""
    raw = {_OLDER.get(key, key): value for key, value in raw.items()}
    count, extra = layers_of(raw), whole_or_none(raw, "num_nextn_predict_layers", 0)
    raw = {key: _cut(value, count, extra) for key, value in raw.items()}
    if isinstance(other := raw.get("attention_other_setting"), dict) and "num_attention_heads" in other:
        raw.setdefault("num_sliding_attention_heads", other["num_attention_heads"])
    sparse = raw.get("moe_layers_enum")
    if sparse is not None and raw.get("mlp_layer_types") is None:
        if not isinstance(sparse, str | list):
            raise ValueError(f"moe_layers_enum={shown(sparse)}: expected the sparse layers")
        named = {str(i).strip() for i in (sparse.split(",") if isinstance(sparse, str) else sparse)}
        raw["mlp_layer_types"] = ["sparse" if str(i) in named else "dense" for i in range(count)]
    return raw if raw.get("rope_parameters") is not None else raw | _rotary(raw, count)


def _cut(value: Any, count: int, extra: int) -> Any:
    return value[:count] if isinstance(value, list) and len(value) == count + extra else value


def _rotary(raw: Raw, count: int) -> Raw:
    """``rope_parameters`` by type from numbers for each layer, of which those of one type agree."""
    types, found = layer_types(raw, [FULL] * count), {}
    for key in ("rope_theta", "partial_rotary_factors"):
        if isinstance(raw.get(key), list) and len(raw[key]) != count:
            raise ValueError(f"{key}={shown(raw[key])}: expected a number for each of {count} layers")
    for of in set(types):
        at = {"rope_theta": raw.get("rope_theta", 10000.0), "partial_rotary_factor": raw.get("partial_rotary_factors")}
        layers = [i for i in range(count) if types[i] == of]
        own = [{key: v[i] if isinstance(v, list) else v for key, v in at.items()} for i in layers]
        if any(one != own[0] for one in own):
            raise ValueError(f"rope_theta and partial_rotary_factors: expected the same numbers for all {of}")
        found[of] = {key: value for key, value in own[0].items() if value is not None}
    if isinstance(raw.get("rope_scaling"), dict) and FULL in found:
        found[FULL] |= raw["rope_scaling"]
    return {"rope_parameters": found, "rope_scaling": None, "rope_theta": None, "partial_rotary_factors": None}


_NAMES = {
    "router": "moe.gate.weight",
    "router_correction": "moe.router_bias",
    **names_of_mlp("shared", "share_expert"),
}
_DEFAULTS: Raw = {
    **{"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 11264, "rms_norm_eps": 1e-5},
    **{"sliding_window": None, "share_expert_dim": 1280, "moe_router_scaling_factor": 1.0, "mlp_bias": False},
}
FAMILIES = {
    "step3p5": Family(
        "Step3p7ForConditionalGeneration",
        _step3p5,
        _NAMES,
        moe="moe",
        experts="stacked",
        top=zero_centred,
        experts_key="n_routed_experts",
        defaults=_DEFAULTS,
        rope={FULL: {}, SLIDING: {}},
        partial=True,
        by_type=True,
        newer=_newer,
    ),
}
