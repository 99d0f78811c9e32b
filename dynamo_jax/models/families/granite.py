"""GraniteMoE: multipliers of embeddings, residuals and logits; softmax over the chosen experts."""

from __future__ import annotations

from dynamo_jax.models.families.family import SPARSE, Family, Raw, biased, number

_SCALES = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def _granitemoe(raw: Raw) -> Raw:
    return {
        **biased(raw),
        **{name: number(raw, name) for name in _SCALES},
        "routing": "topk_softmax",
        "attention_scale": number(raw, "attention_multiplier"),
    }


_DEFAULTS: Raw = {"rms_norm_eps": 1e-6, **dict.fromkeys((*_SCALES, "attention_multiplier"), 1.0)}
FAMILIES = {
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        _granitemoe,
        SPARSE,
        "router.layer",
        "concatenated",
        experts_key="num_local_experts",
        defaults=_DEFAULTS,
    ),
}
