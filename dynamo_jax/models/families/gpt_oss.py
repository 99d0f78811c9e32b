"""gpt-oss: attention sinks, biased experts with a clamped SwiGLU, MXFP4 or bfloat16 files."""

from __future__ import annotations

from dynamo_jax.models.families.family import EPS5, Family, Raw, windows_of


def _gpt_oss(raw: Raw) -> Raw:
    layers = range(raw.get("num_hidden_layers", 0))
    types = raw.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    biased = raw.get("attention_bias", True)
    return {
        "routing": "topk_softmax",
        "router_bias": True,
        "expert_bias": True,
        "swiglu_limit": raw.get("swiglu_limit", 7.0),
        "swiglu_alpha": raw.get("swiglu_alpha", 1.702),
        "attention_sinks": True,
        "qkv_bias": biased,
        "output_bias": biased,
        "head_dim": raw.get("head_dim") or 64,
        "windows": windows_of(raw, raw.get("sliding_window", 128), [t == "sliding_attention" for t in types]),
    }


FAMILIES = {
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, router="router", experts="interleaved", defaults=EPS5),
}
