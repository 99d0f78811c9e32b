"""The model families that are known, and a config.json of one of them as a ``ModelConfig``.

Only facts about file formats stand in this room. A key that would make the model compute something that the
decoder cannot is an error, not ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dynamo_jax.files import shown
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families import (
    afmoe,
    deepseek,
    ernie,
    exaone,
    gemma,
    glm,
    gpt_oss,
    granite,
    hunyuan,
    kimi_linear,
    laguna,
    lfm2,
    ling,
    mellum,
    mimo,
    minimax,
    mixtral,
    olmoe,
    phimoe,
    qwen,
    qwen_delta,
    step,
)
from dynamo_jax.models.families.family import COMMON, FULL, SLIDING, Family, Raw, flag, number, whole
from dynamo_jax.models.specs import TINY, Rope, RopeScaling, check_number

LINEAGES = (
    *(mixtral, olmoe, qwen, deepseek, gpt_oss, granite, phimoe, glm, hunyuan, minimax, qwen_delta),
    *(ernie, mellum, exaone, mimo, laguna, afmoe, gemma, lfm2, step, kimi_linear, ling),
)
FAMILIES: dict[str, Family] = {name: family for lineage in LINEAGES for name, family in lineage.FAMILIES.items()}
TEXT_PARTS = ("text_config", "llm_config", "language_config")
WRAPPERS = (  # models of more than text, whose text part is read
    *("kimi_k25", "qwen3_vl_moe", "qwen3_5_moe", "mistral3", "minimax_m3_vl", "glm4v_moe", "gemma4", "step3p7"),
    *("interns1", "intern_s1", "interns2", "ernie4_5_vl_moe"),
)
_SIZES = ("vocab_size", "hidden_size", "max_position_embeddings")
_EXPERTS = (  # names of one number; a family writes one of them
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
)
_NULL_IS_A_VALUE = {  # elsewhere null is as good as no key
    *("head_dim", "num_key_value_heads", "sliding_window", "clip_qkv", "q_lora_rank", "n_group", "topk_group"),
    *("n_shared_experts", "first_k_dense_replace", "mlp_only_layers", "norm_topk_prob", "rope_interleave"),
    *("mlp_layer_types", "layer_types", "max_window_layers", "attention_value_scale"),
    *("hidden_size_per_layer_input", "final_logit_softcapping"),
}
_ROPE_KEYS = {  # type -> keys that it needs, and others that it knows
    "linear": (("factor",), ()),
    "ntk_alpha": (("alpha",), ()),
    "proportional": ((), ("factor", "partial_rotary_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "mscale", "attention_factor"),
    ),
    "longrope": (("short_factor",), ("factor", "original_max_position_embeddings", "attention_factor")),
}


def config_from(raw: Raw) -> ModelConfig:
    """The decoder's configuration from the contents of a config.json.

    A key that is left out means what it means in ``transformers``. ValueError, which names the key: a size that is
    missing, a value of another kind or out of its range, what the decoder cannot compute.
    """
    raw = text_part(raw)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"unknown model_type {shown(family)}; known: {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    given = {key: value for key, value in known.newer(raw).items() if value is not None or key in _NULL_IS_A_VALUE}
    raw = COMMON | known.defaults | given
    if raw["hidden_act"] not in ("silu", "swigluoai"):  # the clamped one, which other keys ask for
        raise ValueError(f"hidden_act {shown(raw['hidden_act'])} is not supported; only 'silu'")
    turns = {of: _rope(raw, known, of) for of in _types(raw, known)}
    sizes: Raw = {name: whole(raw, name) for name in _SIZES}
    length = sizes["max_position_embeddings"]
    raw["num_experts"] = _experts(given, known)

    limit, why = known.limit(raw)
    for _, scaling, _ in turns.values():
        if scaling.rope_type == "longrope" and scaling.original_max_position_embeddings:
            limit, why = scaling.original_max_position_embeddings, "past them other frequencies hold for all"
    if limit < length:
        sizes |= {"max_position_embeddings": limit, "capped": f"{why}; config.json says {length:,}"}

    def rope(dim: int, share: float | None = None, of: str = "", **own: Any) -> Rope:
        if of not in turns:
            raise ValueError(f"rope_parameters: missing key {of}")
        theta, scaling, partial = turns[of]
        if known.by_type and scaling.rope_type != "default" and share is not None:
            share = 1.0  # only of what is not scaled families turn a part by default
        if limit < length and scaling.rope_type != "default" and not scaling.original_max_position_embeddings:
            scaling = dataclasses.replace(scaling, original_max_position_embeddings=length)
        turned = dim if share is None else int(dim * (share if partial is None else partial))
        return Rope(dim=turned, rope_theta=theta, scaling=scaling, **own)

    layers = known.layers(raw, rope)
    top: Raw = {
        "rms_norm_eps": number(raw, known.eps_key, high=1.0),
        "initializer_range": number(raw, "initializer_range", 0.0),
        "tie_word_embeddings": flag(raw, "tie_word_embeddings"),
    }
    return ModelConfig(**sizes, family=family, layers=layers, **(top | known.top(raw)))


def text_part(raw: Raw) -> Raw:
    """The configuration of the language model in that of a model of more than text; any other as it is.

    ValueError: there is no such part.
    """
    kind = raw.get("model_type")
    for key in TEXT_PARTS:
        if isinstance(part := raw.get(key), dict):
            outer = {name: raw[name] for name in ("tie_word_embeddings",) if name in raw and name not in part}
            return outer | part
    if isinstance(kind, str) and kind in WRAPPERS:
        raise ValueError(f"model_type {kind!r} has no text part ({', '.join(TEXT_PARTS)})")
    return raw


def _experts(given: Raw, known: Family) -> int:
    """How many experts a layer has, by whichever of its names."""
    names = [name for name in _EXPERTS if name in given]
    for name in names[1:]:
        if given[name] != given[names[0]]:
            raise ValueError(
                f"{names[0]}={shown(given[names[0]])} and {name}={shown(given[name])} contradict each other"
            )
    return whole(given, known.experts_key if known.experts_key in names or not names else names[0])


def _given_rope(raw: Raw, known: Family) -> Raw:
    """The older ``rope_scaling``, or ``rope_parameters``, or the family's own."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key, {}), dict):
            raise ValueError(f"{key}={shown(raw[key])}: expected an object")
    return raw.get("rope_scaling") or raw.get("rope_parameters", known.rope)


def _types(raw: Raw, known: Family) -> list[str]:
    """The types of layer that have rotary parameters of their own, or one without a name."""
    rope = _given_rope(raw, known)
    found = [of for of in (FULL, SLIDING) if of in rope]
    if found and not known.by_type:
        raise ValueError(f"rotary parameters of their own for {found[0]} are not supported")
    if known.by_type and not found:
        raise ValueError(f"rope_parameters={shown(rope)}: expected an object for each type of layer")
    return found or [""]


def _rope(raw: Raw, known: Family, of: str) -> tuple[Any, RopeScaling, float | None]:
    """The base, the scaling and the share of a head that is turned, from the older ``rope_scaling`` with
    ``rope_theta``, or ``rope_parameters``. The share is None where none is named. of: the type of layer, where a
    family has rotary parameters for each."""
    rope: Any = _given_rope(raw, known)
    if of and not isinstance(rope := rope[of], dict):
        raise ValueError(f"rope_parameters: {of}={shown(rope)}: expected an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.get("rope_theta", raw["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "dynamic" and "alpha" in rope and "ntk_alpha" in known.rope_types:
        kind = "ntk_alpha"
    if kind not in known.rope_types:
        raise ValueError(f"rope_type {shown(kind)} is not supported; known: {', '.join(known.rope_types)}")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial is not None:
        check_number("partial_rotary_factor", partial, TINY, 1.0, whole=False)
        if partial != 1 and not known.partial and kind != "proportional":
            raise ValueError("partial_rotary_factor is not supported")
    if kind == "default":
        return theta, RopeScaling(), partial
    needed, others = _ROPE_KEYS[kind]
    if absent := [key for key in needed if key not in rope]:
        raise ValueError(f"rope_type {kind!r}: missing key {', '.join(absent)}")
    values = {key: rope[key] for key in (*needed, *others, "mscale_all_dim") if key in rope}
    if "attention_factor" in values:
        number(values, "attention_factor")  # 0 would mean that there is none
    inner, outer = (d.get("original_max_position_embeddings") for d in (rope, raw))
    if None not in (inner, outer) and inner != outer:
        raise ValueError(f"original_max_position_embeddings={shown(outer)} and {shown(inner)} contradict each other")
    original = inner if outer is None else outer
    if original is not None:
        values["original_max_position_embeddings"] = original
        whole(values, "original_max_position_embeddings")
    if kind == "longrope":
        if not isinstance(values["short_factor"], list):
            raise ValueError(f"short_factor={shown(values['short_factor'])}: expected a list of numbers")
        values["short_factor"] = tuple(values["short_factor"])
        if "factor" not in values and original:
            values["factor"] = whole(raw, "max_position_embeddings") / original
        if known.short_mscale:
            values["attention_factor"] = number(rope, "short_mscale")
    return theta, RopeScaling(rope_type=kind, **values), None if kind == "proportional" else partial
