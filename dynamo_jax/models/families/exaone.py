"""K-EXAONE: DeepSeek-V3's router and experts; windows in most layers, no positions in the others."""

from __future__ import annotations

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    corrected,
    dense_types,
    grouped,
    layer_types,
    layers_of,
    mixture_with_shared,
    stack,
    unturned,
    whole,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec


def _exaone_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    named = raw.get("layer_types") is not None
    types = layer_types(raw, [FULL] * layers_of(raw)) if named else _by_pattern(raw)
    mixer = grouped(raw, rope, qk_norm="head")
    windows = windows_of(raw, types)
    mixers = [unturned(mixer, w, raw["sliding_window"] is None) for w in windows]
    experts = mixture_with_shared(raw, corrected(raw), "num_shared_experts")
    return stack(raw, mixers, experts, dense=dense_types(raw, whole(raw, "first_k_dense_replace", 0)))


def _by_pattern(raw: Raw) -> list[str]:
    pattern, layers = raw["sliding_window_pattern"], range(layers_of(raw))
    if raw["sliding_window"] is None:
        return [FULL for _ in layers]
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        raise ValueError(f"sliding_window_pattern={shown(pattern)}: expected a positive whole number, or layer_types")
    return [SLIDING if (i + 1) % pattern else FULL for i in layers]


_DEFAULTS: Raw = {
    **{"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "intermediate_size": 16384},
    **{"sliding_window": 4096, "sliding_window_pattern": 4, "first_k_dense_replace": 1, "num_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
}
FAMILIES = {
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        _exaone_moe,
        {"router_correction": "mlp.e_score_correction_bias"},
        defaults=_DEFAULTS,
    ),
}
