"""The model families that are known, and a config.json of one of them as a ``ModelConfig``.

Only facts about file formats stand in this room. A key that would make the model compute something that the
decoder cannot is an error, not ignored.
"""

from __future__ import annotations

import dataclasses

from dynamo_jax.models.config import ModelConfig, RopeScaling
from dynamo_jax.models.families import deepseek, gpt_oss, granite, mixtral, olmoe, phimoe, qwen
from dynamo_jax.models.families.family import Family, Raw
from dynamo_jax.models.rotary import ROPE_TYPES

LINEAGES = (mixtral, olmoe, qwen, deepseek, gpt_oss, granite, phimoe)
FAMILIES: dict[str, Family] = {name: family for lineage in LINEAGES for name, family in lineage.FAMILIES.items()}
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
