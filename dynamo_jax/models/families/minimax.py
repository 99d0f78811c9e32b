"""MiniMax-M2: sigmoid routing, norms of the whole queries and keys, half of each head turned."""

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
    whole,
    whole_or_none,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _minimax_m2(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    size = whole_or_none(raw, "head_dim") or whole(raw, "hidden_size") // whole(raw, "num_attention_heads")
    turned = whole(raw, "rotary_dim", high=size) if raw.get("rotary_dim") is not None else size
    mixer = grouped(raw, rope, share=turned / size, qk_norm="vector")
    return stack(raw, mixer, mixture(raw, Router(routing="sigmoid", choice_bias=True, norm_topk_prob=True)))


_NAMES = SPARSE_NAMES | {"router_correction": f"{SPARSE}.e_score_correction_bias"}
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
}
