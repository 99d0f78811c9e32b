"""gpt-oss: attention sinks, biased experts with a clamped SwiGLU, MXFP4 or bfloat16 files."""

from __future__ import annotations

from dynamo_jax.models.families.family import (
    FULL,
    SLIDING,
    Family,
    Raw,
    Rotary,
    biased,
    check_slides,
    grouped,
    layer_types,
    layers_of,
    mixture,
    number,
    stack,
    windows_of,
)
from dynamo_jax.models.specs import LayerSpec, Router


def _gpt_oss(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    types = layer_types(raw, [FULL if i % 2 else SLIDING for i in range(layers_of(raw))])
    check_slides(raw, types)
    experts = mixture(
        raw,
        Router(routing="topk_softmax", router_bias=True),
        expert_bias=True,
        swiglu_limit=number(raw, "swiglu_limit"),
        swiglu_alpha=number(raw, "swiglu_alpha"),
    )
    return stack(raw, grouped(raw, rope, attention_sinks=True, **biased(raw)), experts, windows_of(raw, types))


_DEFAULTS: Raw = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
}
_ROPE: Raw = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
FAMILIES = {
    "gpt_oss": Family(
        "GptOssForCausalLM",
        _gpt_oss,
        {"router": "mlp.router.weight", "router_bias": "mlp.router.bias"},
        experts="interleaved",
        experts_key="num_local_experts",
        defaults=_DEFAULTS,
        rope=_ROPE,
    ),
}
