"""Qwen3-Next and the text models of Qwen3.5 to 3.8 MoE: three layers with a gated delta net, then one with attention.

Attention has a gate beside each query, and turns a quarter of each head. Norms multiply by 1 + weight. Positions of
pictures (``mrope_section``) are those of text where there is only text, so the keys for them are not read.
"""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    FULL,
    LINEAR,
    Family,
    Raw,
    Rotary,
    biased,
    grouped,
    layer_types,
    layers_of,
    stack,
    whole,
    zero_centred,
)
from dynamo_jax.models.families.qwen import SHARED, beside_shared, dense_by_step, softmax_router
from dynamo_jax.models.specs import DeltaNet, LayerSpec, Mixer, Router

_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)


def _qwen3_next(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    experts = beside_shared(raw, softmax_router(raw))
    return stack(raw, _mixers(raw, rope, fused=True), experts, dense=dense_by_step(raw))


def _qwen3_5_moe(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    return stack(raw, _mixers(raw, rope, fused=False), beside_shared(raw, Router(norm_topk_prob=True)))


def _mixers(raw: Raw, rope: Rotary, fused: bool) -> list[Mixer]:
    """Each layer's, by ``layer_types``, or attention in each ``full_attention_interval``-th."""
    interval = whole(raw, "full_attention_interval")
    default = [LINEAR if (i + 1) % interval else FULL for i in range(layers_of(raw))]
    kinds: dict[str, Mixer] = {
        FULL: grouped(raw, rope, share=0.25, qk_norm="head", output_gate=True, **biased(raw)),
        LINEAR: DeltaNet(fused_projections=fused, **{key: whole(raw, key) for key in _SIZES}),
    }
    return [kinds[kind] for kind in layer_types(raw, default, (LINEAR, FULL))]


_BOTH: Raw = {
    "num_key_value_heads": 2,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "shared_expert_intermediate_size": 512,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_NEXT: Raw = {"intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": True}

FAMILIES = {
    name: Family(architecture, layers, SHARED, top=zero_centred, defaults=_BOTH | own, partial=True)
    for name, architecture, layers, own in (
        ("qwen3_next", "Qwen3NextForCausalLM", _qwen3_next, _NEXT),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _qwen3_5_moe, {}),
    )
}
