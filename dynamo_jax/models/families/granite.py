"""GraniteMoE: multipliers of embeddings, residuals and logits; softmax over the chosen experts."""

from __future__ import annotations

from dynamo_jax.models.families.family import SPARSE, Family, Raw, Rotary, biased, grouped, mixture, number, stack
from dynamo_jax.models.specs import LayerSpec, Router

_SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def _granitemoe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    mixer = grouped(raw, rope, attention_scale=number(raw, "attention_multiplier"), **biased(raw))
    return stack(raw, mixer, mixture(raw, Router(routing="topk_softmax")))


def _scales(raw: Raw) -> Raw:
    return {name: number(raw, name) for name in _SCALES}


_DEFAULTS: Raw = {"rms_norm_eps": 1e-6, **dict.fromkeys((*_SCALES, "attention_multiplier"), 1.0)}
FAMILIES = {
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        _granitemoe,
        {"router": f"{SPARSE}.router.layer.weight"},
        SPARSE,
        "concatenated",
        _scales,
        experts_key="num_local_experts",
        defaults=_DEFAULTS,
    ),
}
