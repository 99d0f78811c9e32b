"""The model families that are known: each one's config.json as a ``ModelConfig``, and its names of tensors.

Only facts about file formats stand here. A key that would make the model compute something that the
decoder cannot is an error, not ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from dynamo_jax.models.config import ModelConfig, RopeScaling
from dynamo_jax.models.rotary import ROPE_TYPES

Raw = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart. moe: its name for the mixture module. experts: how expert weights lie in the
    file (``expert_files.py``). fields: what its config.json means beyond the keys that all families share."""

    architecture: str
    fields: Callable[[Raw], Raw]
    moe: str = "mlp"
    router: str = "gate"
    experts: str = "gate_proj up_proj down_proj"
    shared: str = "shared_experts"
    defaults: Raw = dataclasses.field(default_factory=dict)


def _olmoe(raw: Raw) -> Raw:
    return {"qk_norm": "vector", "clip_qkv": raw.get("clip_qkv"), **_biased(raw)}


def _mixtral(raw: Raw) -> Raw:
    return {"norm_topk_prob": True, "windows": _windows(raw, raw.get("sliding_window"))}


def _phimoe(raw: Raw) -> Raw:
    return {
        **_biased(raw),
        "windows": _windows(raw, raw.get("sliding_window")),
        "layer_norm": True,
        "routing": "sparsemixer",
        "router_jitter_noise": raw.get("router_jitter_noise", 0.01),
        "head_bias": raw.get("lm_head_bias", False),
    }


def _granitemoe(raw: Raw) -> Raw:
    scales = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return {
        **_biased(raw),
        **{name: raw[name] for name in scales if raw.get(name) is not None},
        "routing": "topk_softmax",
        "attention_scale": raw.get("attention_multiplier", 1.0),
    }


def _qwen2_moe(raw: Raw) -> Raw:
    layers, last = range(raw.get("num_hidden_layers", 0)), raw.get("max_window_layers", 28)
    sliding = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    slides = raw.get("layer_types") or ["full" if i % 2 or i >= last else "sliding" for i in layers]
    return {
        **_qwen_dense(raw),
        "qkv_bias": raw.get("qkv_bias", True),
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "shared_intermediate_size": raw.get("shared_expert_intermediate_size", 0),
        "shared_gate": True,
        "windows": _windows(raw, sliding, [t.startswith("sliding") for t in slides]),
    }


def _qwen3_moe(raw: Raw) -> Raw:
    sliding = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    return {
        **_qwen_dense(raw),
        **_biased(raw),
        "qk_norm": "head",
        "norm_topk_prob": raw.get("norm_topk_prob", False),
        "windows": _windows(raw, sliding),
    }


def _qwen_dense(raw: Raw) -> Raw:
    step, only = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    dense = tuple(i for i in range(raw.get("num_hidden_layers", 0)) if i in only or (i + 1) % step)
    return {
        "intermediate_size": raw.get("moe_intermediate_size"),
        "dense_layers": dense,
        "dense_intermediate_size": raw.get("intermediate_size", 0) if dense else 0,
    }


def _deepseek(raw: Raw) -> Raw:
    dense = tuple(range(raw.get("first_k_dense_replace") or 0))
    return {
        "intermediate_size": raw.get("moe_intermediate_size"),
        "num_experts": raw.get("n_routed_experts"),
        "dense_layers": dense,
        "dense_intermediate_size": raw.get("intermediate_size", 0) if dense else 0,
        "shared_intermediate_size": (raw.get("n_shared_experts") or 0) * (raw.get("moe_intermediate_size") or 0),
        "routed_scaling_factor": raw.get("routed_scaling_factor", 1.0),
        "head_dim": (raw.get("qk_nope_head_dim") or 0) + (raw.get("qk_rope_head_dim") or 0),
        "num_key_value_heads": raw.get("num_attention_heads"),
        **{name: raw.get(name) or 0 for name in _LATENT},
        **_biased(raw),
    }


_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _deepseek_v2(raw: Raw) -> Raw:
    method = raw.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {method!r} is not supported; known: greedy, group_limited_greedy")
    if raw.get("norm_topk_prob") or raw.get("mlp_bias"):
        raise ValueError("norm_topk_prob and mlp_bias are not supported for deepseek_v2")
    limited = method == "group_limited_greedy"
    groups = {"n_group": raw.get("n_group") or 0, "topk_group": raw.get("topk_group") or 0} if limited else {}
    return {**_deepseek(raw), **groups, "rope_interleave": True}


def _deepseek_v3(raw: Raw) -> Raw:
    return {
        **_deepseek(raw),
        "routing": "sigmoid",
        "norm_topk_prob": raw.get("norm_topk_prob", True),
        "n_group": raw.get("n_group") or 0,
        "topk_group": raw.get("topk_group") or 0,
        "rope_interleave": raw.get("rope_interleave", True),
    }


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
        "windows": _windows(raw, raw.get("sliding_window", 128), [t == "sliding_attention" for t in types]),
    }


def _biased(raw: Raw) -> Raw:
    return {"qkv_bias": raw.get("attention_bias", False), "output_bias": raw.get("attention_bias", False)}


def _windows(raw: Raw, window: int | None, slides: list[bool] | None = None) -> tuple[int, ...]:
    if not window:
        return ()
    slides = slides or [True] * raw.get("num_hidden_layers", 0)
    return tuple(window if s else 0 for s in slides) if any(slides) else ()


_W123 = "w1 w3 w2"
_SPARSE = "block_sparse_moe"
_EPS5, _EPS6 = {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}
FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM", _mixtral, _SPARSE, experts=_W123, defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5}
    ),
    "olmoe": Family("OlmoeForCausalLM", _olmoe, defaults=_EPS5),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, shared="shared_expert", defaults=_EPS6),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, defaults=_EPS6),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _deepseek_v2, defaults=_EPS6),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, defaults=_EPS6),
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, router="router", experts="interleaved", defaults=_EPS5),
    "granitemoe": Family("GraniteMoeForCausalLM", _granitemoe, _SPARSE, "router.layer", "concatenated", defaults=_EPS6),
    "phimoe": Family(
        "PhimoeForCausalLM", _phimoe, _SPARSE, experts=_W123, defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5}
    ),
}

_SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "num_experts", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "initializer_range", "norm_topk_prob"),
)


def config_from(raw: Raw) -> ModelConfig:
    """The decoder's configuration from the contents of a config.json; ValueError for what it cannot compute."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"unknown model_type {family!r}; known: {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported; only 'silu'")
    known = FAMILIES[family]
    values = {k: raw[k] for k in _SHARED_KEYS if raw.get(k) is not None}
    values.setdefault("num_experts", raw.get("num_local_experts"))
    values.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    values = known.defaults | {"qk_norm": "none", "family": family} | values | known.fields(raw)
    theta, scaling = _rope(raw, family)
    values["rope_scaling"] = scaling
    if theta is not None:
        values["rope_theta"] = theta
    if scaling.rope_type == "longrope":  # past it other frequencies would hold for the whole sequence
        limit = scaling.original_max_position_embeddings or values["max_position_embeddings"]
        values["max_position_embeddings"] = min(limit, values["max_position_embeddings"])
    missing = [f.name for f in dataclasses.fields(ModelConfig) if f.default is f.default_factory]
    if absent := [name for name in missing if values.get(name) is None]:
        raise ValueError(f"missing key {', '.join(absent)}")
    return ModelConfig(**values)


def _rope(raw: Raw, family: str) -> tuple[float | None, RopeScaling]:
    """The base and the scaling, from ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``."""
    rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    if not rope and family == "gpt_oss":
        rope = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    if kind == "default":
        return theta, RopeScaling()
    fields = {f.name for f in dataclasses.fields(RopeScaling)}
    values = {k: v for k, v in rope.items() if k in fields and v is not None} | {"rope_type": kind}
    original = raw.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    if original:
        values["original_max_position_embeddings"] = original
    if kind == "longrope":
        values["short_factor"] = tuple(rope.get("short_factor") or ())
        if "factor" not in values and original:
            values["factor"] = raw.get("max_position_embeddings", original) / original
        if short := rope.get("short_mscale"):
            values["attention_factor"] = short
    return theta, RopeScaling(**values)


def tensor_names(config: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """(our name, the file's name, transposed) of every parameter but the routed experts' weights and biases."""
    yield "embed", "model.embed_tokens.weight", False
    for layer in range(config.num_hidden_layers):
        for ours, theirs, transposed in layer_tensor_names(config, layer):
            yield f"layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}", transposed
    yield from ((f"norm.{a}", f"model.norm.{b}", False) for a, b in _norm(config))
    if not config.tie_word_embeddings:
        yield "head", "lm_head.weight", False
    if config.head_bias:
        yield "head_bias", "lm_head.bias", False


def layer_tensor_names(config: ModelConfig, layer: int) -> Iterator[tuple[str, str, bool]]:
    """As ``tensor_names``, for one layer and without the layer's prefix."""
    c, family = config, FAMILIES[config.family]
    for a, b in _norm(c):
        yield f"attention_norm.{a}", f"input_layernorm.{b}", False
        yield f"experts_norm.{a}", f"post_attention_layernorm.{b}", False
    for ours, theirs in _attention(c):
        weight = theirs.endswith(".weight") and not theirs.endswith("norm.weight")
        yield f"attention.{ours}", f"self_attn.{theirs}", weight
    if layer in c.dense_layers:
        yield from _mlp("dense", "mlp")
        return
    yield "router", f"{family.moe}.{family.router}.weight", True
    if c.router_bias:
        yield "router_bias", f"{family.moe}.{family.router}.bias", False
    if c.routing == "sigmoid":
        yield "router_correction", f"{family.moe}.{family.router}.e_score_correction_bias", False
    if c.shared_intermediate_size:
        yield from _mlp("shared", f"{family.moe}.{family.shared}")
    if c.shared_gate:
        yield "shared_gate", f"{family.moe}.shared_expert_gate.weight", True


def _norm(config: ModelConfig) -> list[tuple[str, str]]:
    return [("scale", "weight"), ("bias", "bias")] if config.layer_norm else [("scale", "weight")]


def _mlp(ours: str, theirs: str) -> Iterator[tuple[str, str, bool]]:
    for part in ("gate", "up", "down"):
        yield f"{ours}.{part}", f"{theirs}.{part}_proj.weight", part == "down"


def _attention(c: ModelConfig) -> Iterator[tuple[str, str]]:
    if c.kv_lora_rank:
        if c.q_lora_rank:
            yield "q_down", "q_a_proj.weight"
            yield "q_norm", "q_a_layernorm.weight"
            if c.qkv_bias:
                yield "q_down_bias", "q_a_proj.bias"
        yield "q", "q_b_proj.weight" if c.q_lora_rank else "q_proj.weight"
        yield "kv_down", "kv_a_proj_with_mqa.weight"
        if c.qkv_bias:
            yield "kv_down_bias", "kv_a_proj_with_mqa.bias"
        yield "kv_norm", "kv_a_layernorm.weight"
        yield "kv_up", "kv_b_proj.weight"
    else:
        for part in "qkv":
            yield part, f"{part}_proj.weight"
            if c.qkv_bias:
                yield f"{part}_bias", f"{part}_proj.bias"
        if c.qk_norm != "none":
            yield "q_norm", "q_norm.weight"
            yield "k_norm", "k_norm.weight"
        if c.attention_sinks:
            yield "sinks", "sinks"
    yield "o", "o_proj.weight"
    if c.output_bias:
        yield "o_bias", "o_proj.bias"
