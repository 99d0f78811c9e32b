"""DeepSeek-V2 and DeepSeek-V3: latent attention, groups of experts, shared experts, dense first layers."""

from __future__ import annotations

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import (
    Family,
    Raw,
    Rotary,
    biased,
    flag,
    layers_of,
    mixture,
    number,
    stack,
    whole,
    whole_or_none,
)
from dynamo_jax.models.specs import Latent, LayerSpec, Router


def _deepseek(raw: Raw, rope: Rotary, router: Router, interleave: bool) -> tuple[LayerSpec, ...]:
    channels, layers = whole(raw, "moe_intermediate_size"), layers_of(raw)
    first = whole_or_none(raw, "first_k_dense_replace", 0)
    if first >= layers:
        raise ValueError(f"first_k_dense_replace={first}: of {layers} layers none would have experts to quantize")
    turned = whole(raw, "qk_rope_head_dim")
    if turned % 2:
        raise ValueError(f"qk_rope_head_dim={turned}: expected an even number, since rotary positions turn pairs")
    mixer = Latent(
        num_attention_heads=whole(raw, "num_attention_heads"),
        q_lora_rank=whole_or_none(raw, "q_lora_rank"),
        rope=rope(dim=turned, rope_interleave=interleave),
        kv_lora_rank=whole(raw, "kv_lora_rank"),
        qk_nope_head_dim=whole(raw, "qk_nope_head_dim"),
        v_head_dim=whole(raw, "v_head_dim"),
        **biased(raw),
    )
    shared = whole_or_none(raw, "n_shared_experts", 0) * channels
    experts = mixture(raw, router, "moe_intermediate_size", shared_intermediate_size=shared)
    return stack(raw, mixer, experts, dense=range(first))


def _deepseek_v2(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    method = raw["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {shown(method)} is not supported; known: greedy, group_limited_greedy")
    if flag(raw, "norm_topk_prob") or flag(raw, "mlp_bias"):
        raise ValueError("norm_topk_prob and mlp_bias are not supported for deepseek_v2")
    limited = method == "group_limited_greedy"
    groups: Raw = {name: whole(raw, name) for name in ("n_group", "topk_group")} if limited else {}
    router = Router(routed_scaling_factor=number(raw, "routed_scaling_factor"), **groups)
    return _deepseek(raw, rope, router, True)


def _deepseek_v3(raw: Raw, rope: Rotary) -> tuple[LayerSpec, ...]:
    router = Router(
        routing="sigmoid",
        norm_topk_prob=flag(raw, "norm_topk_prob"),
        n_group=whole_or_none(raw, "n_group"),
        topk_group=whole_or_none(raw, "topk_group"),
        routed_scaling_factor=number(raw, "routed_scaling_factor"),
    )
    return _deepseek(raw, rope, router, flag(raw, "rope_interleave"))


_BOTH: Raw = {
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V2: Raw = {
    "intermediate_size": 11008,
    "first_k_dense_replace": 0,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "mlp_bias": False,
}
_V3: Raw = {
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "rope_interleave": True,
}
_EXPERTS = "n_routed_experts"
FAMILIES = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, experts_key=_EXPERTS, defaults=_BOTH | _V2),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, experts_key=_EXPERTS, defaults=_BOTH | _V3),
}
