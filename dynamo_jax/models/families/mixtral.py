"""Mixtral: gates of the chosen experts sum to one, sliding windows."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    SPARSE,
    SPARSE_NAMES,
    W123,
    Family,
    Raw,
    Rotary,
    grouped,
    mixture,
    stack,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _mixtral(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    return stack(raw, grouped(raw, rope), mixture(raw, Router(norm_topk_prob=True)), windows_of(raw))


_DEFAULTS: Raw = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        SPARSE_NAMES,
        SPARSE,
        W123,
        experts_key="num_local_experts",
        defaults=_DEFAULTS,
    ),
}
