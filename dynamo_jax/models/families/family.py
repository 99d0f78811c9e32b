"""What sets a family of models apart, and words that several families share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dynamo_jax.files import shown
from dynamo_jax.models.specs import (
    LAYERS_LIMIT,
    NUMBER_LIMIT,
    ROPE_TYPES,
    TINY,
    WHOLE_LIMIT,
    Dense,
    Grouped,
    Latent,
    LayerSpec,
    Mixer,
    Mixture,
    Rope,
    Router,
    check_divides,
    check_flag,
    check_number,
)

Raw = dict[str, Any]  # what a config.json holds
SPARSE = "block_sparse_moe"
PARTS = ("gate", "up", "down")
SPARSE_NAMES = {"router": f"{SPARSE}.gate.weight"}
W123 = "w1 w3 w2"  # gate, up and down
# Behind the name of a tensor that has an axis of length one more, the first; of two such rows, the first being ours;
# of an array of one axis between others of length one; of one whose axes are not the other way round, as elsewhere.
ROW, FIRST, MIDDLE, PLAIN = "[0]", "[0 of 2]", "[0, 0, :, 0]", "[plain]"
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
PLAIN_ROPES = tuple(kind for kind in ROPE_TYPES if kind not in ("ntk_alpha", "proportional"))
COMMON: Raw = {  # keys that are left out mean the same in every family
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "head_dim": None,
    "num_key_value_heads": None,
    "attention_bias": False,
    "rope_theta": 10000.0,
}


Rotary = Callable[..., Rope]  # a Rope with the base, the scaling and the share of a head that a config.json names:
# takes dim, the share of it that is turned where none is named (else all are), the type of layer that it is of where a
# family has one for each, and the rest


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart. layers: of its config.json, all keys of which have a value. names: what its files call
    parameters where that is not ``names.NAMES``'s. moe: its name for the mixture module. experts: how expert weights
    lie in the file (``formats/expert_files.py``). top: what its config.json means for the decoder as a whole.
    limit: positions past which the decoder computes something else than the model, and what, for a reader.
    defaults: what a key means that its config.json leaves out, where that is not ``COMMON``'s; they are those of
    ``transformers``, and sizes have none. rope: the rotary scaling of a config.json that names none. short_mscale:
    whether that key of the rotary scaling is the factor of cosines and sines. partial: whether a part of a head may be
    turned. by_type: whether rotary parameters, and ``rope``, are an object for each type of layer. eps_key:
    of what norms add to mean squares. newer: the keys that transformers writes from those of published files.
    respelled: pieces of tensors' names that some files have, and what others, and ``names``, have there.
    by_prefix: the family that tells names instead, where a file's tensors begin with this. beside: a pattern of a
    layer's tensors that belong to more than text, though other families read their like. alone: the prefix under whose
    names transformers takes what is read of a file without the rest of it; empty: its own."""

    architecture: str
    layers: Callable[[Raw, Rotary], tuple[LayerSpec, ...]]
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    moe: str = "mlp"
    experts: str = "gate_proj up_proj down_proj"
    top: Callable[[Raw], Raw] = lambda _: {}
    limit: Callable[[Raw], tuple[int, str]] = lambda _: (WHOLE_LIMIT, "")
    experts_key: str = "num_experts"
    defaults: Raw = dataclasses.field(default_factory=dict)
    rope: Raw = dataclasses.field(default_factory=dict)
    rope_types: tuple[str, ...] = PLAIN_ROPES
    short_mscale: bool = False
    partial: bool = False
    by_type: bool = False
    eps_key: str = "rms_norm_eps"
    respelled: dict[str, str] = dataclasses.field(default_factory=dict)
    newer: Callable[[Raw], Raw] = lambda raw: raw
    by_prefix: dict[str, Family] = dataclasses.field(default_factory=dict)
    beside: str = ""
    alone: str = ""


def names_of_mlp(ours: str, theirs: str) -> dict[str, str]:
    """Of a gated MLP's three projections."""
    return {f"{ours}.{part}": f"{theirs}.{part}_proj.weight" for part in PARTS}


def zero_centred(_: Raw) -> Raw:
    """``Family.top`` of a model whose norms multiply by 1 + weight."""
    return {"zero_centred_norms": True}


def grouped(raw: Raw, rope: Rotary, share: float = 1.0, **own: Any) -> Grouped:
    """Grouped-query attention by the keys that families share. share: of a head that is turned where none is named;
    own: what else the family says."""
    heads, size = whole(raw, "num_attention_heads"), whole_or_none(raw, "head_dim")
    if not size:
        check_divides("num_attention_heads", heads, whole(raw, "hidden_size"))
        size = whole(raw, "hidden_size") // heads
    own.setdefault("num_key_value_heads", whole_or_none(raw, "num_key_value_heads") or heads)
    return Grouped(num_attention_heads=heads, head_dim=size, rope=rope(dim=size, share=share), **own)


def share_turned(raw: Raw) -> float:
    """Of a head, by ``rotary_dim``."""
    size = whole_or_none(raw, "head_dim") or whole(raw, "hidden_size") // whole(raw, "num_attention_heads")
    return whole(raw, "rotary_dim", high=size) / size if raw.get("rotary_dim") is not None else 1.0


def by_type(raw: Raw, rope: Rotary, types: list[str], share: float = 1.0, **own: Any) -> list[Grouped]:
    """``grouped`` for each layer, with the rotary positions of its type, and a window where its type has one."""
    windows = windows_of(raw, types)
    found = {of: grouped(raw, functools.partial(rope, of=of), share, **own) for of in set(types)}
    return [dataclasses.replace(found[of], window=w) for of, w in zip(types, windows)]


def unturned(mixer: Grouped, window: int, turned: bool = False) -> Grouped:
    """The mixer with a window, and without positions where there is none, unless ``turned``."""
    return dataclasses.replace(mixer, window=window, rope=mixer.rope if window or turned else None)


def mixture(
    raw: Raw, router: Router, size: str = "intermediate_size", chosen: str = "num_experts_per_tok", **own: Any
) -> Mixture:
    """Routed experts by the keys that families share. size, chosen: the keys of an expert's channels and of a token's
    experts."""
    return Mixture(
        num_experts=whole(raw, "num_experts"),
        num_experts_per_tok=whole(raw, chosen),
        intermediate_size=whole(raw, size),
        router=router,
        **own,
    )


def corrected(raw: Raw) -> Router:
    """DeepSeek-V3's router by its keys: sigmoid scores, chosen with a correction, from the best groups."""
    return Router(
        routing="sigmoid",
        choice_bias=True,
        norm_topk_prob=flag(raw, "norm_topk_prob"),
        n_group=whole_or_none(raw, "n_group"),
        topk_group=whole_or_none(raw, "topk_group"),
        routed_scaling_factor=number(raw, "routed_scaling_factor"),
    )


def sigmoid_router(scale: float = 1.0, **own: Any) -> Router:
    """Sigmoid scores, chosen with a correction, whose gates sum to ``scale``."""
    return Router(routing="sigmoid", choice_bias=True, norm_topk_prob=True, routed_scaling_factor=scale, **own)


def first_dense(raw: Raw) -> range:
    """The dense layers before those with experts, by ``first_k_dense_replace``."""
    first, layers = whole_or_none(raw, "first_k_dense_replace", 0), layers_of(raw)
    if first >= layers:
        raise ValueError(f"first_k_dense_replace={first}: of {layers} layers none would have experts to quantize")
    return range(first)


def dense_types(raw: Raw, first: int = 1) -> set[int]:
    """The dense layers by ``mlp_layer_types``, or else the ``first`` ones."""
    types = per_layer(raw, "mlp_layer_types", "dense or sparse", ("dense", "sparse").__contains__)
    if types is None:
        return set(range(min(first, layers_of(raw))))
    return {i for i, kind in enumerate(types) if kind == "dense"}


def mixture_with_shared(raw: Raw, router: Router, key: str = "n_shared_experts", **own: Any) -> Mixture:
    """``mixture`` with as many shared experts as ``key`` says, of as many channels as routed ones, as one."""
    shared = whole_or_none(raw, key, 0) * whole(raw, "moe_intermediate_size")
    return mixture(raw, router, "moe_intermediate_size", shared_intermediate_size=shared, **own)


def stack(
    raw: Raw,
    mixer: Grouped | Latent | Sequence[Mixer],
    experts: Mixture | Sequence[Mixture],
    windows: tuple[int, ...] = (),
    dense: Collection[int] = (),
    **own: Any,
) -> tuple[LayerSpec, ...]:
    """All layers: alike but for those that are dense, and for the windows of attention, or with a mixer or experts for
    each layer. own: what else a family says of all."""
    channels = Dense(dense_intermediate_size=whole(raw, "intermediate_size")) if dense else None
    count = layers_of(raw)
    if isinstance(mixer, Sequence):
        mixers = list(mixer)
    else:
        of_window: dict[int, Mixer] = {w: dataclasses.replace(mixer, window=w) for w in windows or (0,)}
        mixers = [of_window[w] for w in windows or (0,) * count]
    experts = experts if isinstance(experts, Sequence) else [experts] * count
    return tuple(
        LayerSpec(mixer=mixers[i], channel=channels if channels and i in dense else experts[i], **own)
        for i in range(count)
    )


def whole(raw: Raw, key: str, low: int = 1, high: int = WHOLE_LIMIT) -> int:
    """The whole number under ``key``; ValueError that names the key where there is none."""
    _check_there(raw, key)
    check_number(key, raw[key], low, high)
    return raw[key]


def whole_or_none(raw: Raw, key: str, low: int = 1) -> int:
    """The same, and 0 where there is null."""
    return 0 if raw.get(key) is None else whole(raw, key, low)


def number(raw: Raw, key: str, low: float = TINY, high: float = NUMBER_LIMIT) -> float:
    _check_there(raw, key)
    check_number(key, raw[key], low, high, whole=False)
    return raw[key]


def layers_of(raw: Raw) -> int:
    return whole(raw, "num_hidden_layers", high=LAYERS_LIMIT)


def per_layer(raw: Raw, key: str, members: str, known: Callable[[Any], bool] = lambda _: True) -> list[Any] | None:
    """The list under ``key``, a value for each layer, or None where there is none. members: its values, for a reader;
    known: whether one is such a value."""
    found, count = raw.get(key), layers_of(raw)
    if found is not None and not (isinstance(found, list) and len(found) == count and all(map(known, found))):
        raise ValueError(f"{key}={shown(found)}: expected {members} for each of {count} layers")
    return found


def flag(raw: Raw, key: str) -> bool:
    """Whether the key says true; null says false."""
    if raw.get(key) is None:
        return False
    check_flag(key, raw[key])
    return raw[key]


def _check_there(raw: Raw, key: str) -> None:
    if raw.get(key) is None:
        raise ValueError(f"missing key {key}")


def biased(raw: Raw) -> Raw:
    """Attention's biases, which one key says for all of its projections."""
    return dict.fromkeys(("qkv_bias", "output_bias"), flag(raw, "attention_bias"))


def layer_types(raw: Raw, default: list[str], known: tuple[str, str] = (SLIDING, FULL)) -> list[str]:
    """What each layer's mixer is, from ``layer_types`` or else ``default``; known: the two kinds of the family."""
    types = per_layer(raw, "layer_types", " or ".join(known), known.__contains__)
    return default if types is None else types


def check_slides(raw: Raw, types: list[str]) -> None:
    """ValueError: there are sliding layers, and no window for them."""
    if SLIDING in types and raw["sliding_window"] is None:
        raise ValueError("sliding_window=None: expected a positive whole number, since layers slide")


def windows_of(raw: Raw, types: list[str] | None = None) -> tuple[int, ...]:
    """The window of each layer, 0 where attention sees all; types: of each layer, all sliding by default."""
    if raw.get("sliding_window") is None or (types is not None and SLIDING not in types):
        return (0,) * layers_of(raw)
    window = whole(raw, "sliding_window")
    return tuple(window if t == SLIDING else 0 for t in types or [SLIDING] * layers_of(raw))
