"""GraniteMoE: multipliers of embeddings, residuals and logits; softmax over the chosen experts."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS6, SPARSE, Family, Raw, biased


def _granitemoe(raw: Raw) -> Raw:
    scales = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return {
        **biased(raw),
        **{name: raw[name] for name in scales if raw.get(name) is not None},
        "routing": "topk_softmax",
        "attention_scale": raw.get("attention_multiplier", 1.0),
    }


FAMILIES = {
    "granitemoe": Family("GraniteMoeForCausalLM", _granitemoe, SPARSE, "router.layer", "concatenated", defaults=EPS6),
}
