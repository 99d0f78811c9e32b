"""The decoder's configuration: what a mixture-of-experts decoder of any known family can be told.

Names are those of Hugging Face's config.json where several families share one; ``families/`` fills
it from a checkpoint's own file. It is hashable, so that it can be a static argument of ``jax.jit``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from dynamo_jax.files import shown

ROUTINGS = ("softmax", "topk_softmax", "sigmoid", "sparsemixer")
QK_NORMS = ("none", "vector", "head")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
WHOLE_LIMIT = 2**31 - 1
LAYERS_LIMIT = 10_000
TINY, NUMBER_LIMIT = 1e-12, 1e6  # a constant outside of these is a mistake; products of a few stay finite in float32


_AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_experts", "num_experts_per_tok", "max_position_embeddings"),
)
_MOST = {"num_hidden_layers": LAYERS_LIMIT}  # other whole numbers: what an int32 holds
_RANGES = {  # of float fields; others are not negative and at most NUMBER_LIMIT
    "rms_norm_eps": (TINY, 1.0),
    "rope_theta": (1.001, 1e30),  # 1 has no logarithm to divide by
    "clip_qkv": (TINY, NUMBER_LIMIT),
    "router_jitter_noise": (0.0, 1.0),
    **dict.fromkeys(("routed_scaling_factor", "swiglu_alpha"), (TINY, NUMBER_LIMIT)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (TINY, NUMBER_LIMIT)),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (TINY, NUMBER_LIMIT)),
    **dict.fromkeys(("beta_fast", "beta_slow"), (TINY, NUMBER_LIMIT)),
}


def check_number(name: str, value: Any, low: float = 0, high: float = WHOLE_LIMIT, whole: bool = True) -> None:
    """ValueError that names the key unless ``value`` is a number from ``low`` to ``high``, which NaN is not."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and low <= value <= high:
        return
    kind = "whole number" if whole else "number"
    if number and value > high:
        expected = f"a {kind} of at most {high:,}"
    elif low == 0:
        expected = f"a {kind}, 0 or more"
    else:
        expected = f"a {kind} of {low:g} or more" if number and value > 0 else f"a positive {kind}"
    raise ValueError(f"{name}={shown(value)}: expected {expected}")


def check_flag(name: str, value: Any) -> None:
    """ValueError that names the key unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}: expected true or false")


def _check_fields(config: Any) -> None:
    """Each field of a dataclass by its annotation, and numbers by their range."""
    for field in dataclasses.fields(config):
        name, value, kind = field.name, getattr(config, field.name), str(field.type)
        low, high = _RANGES.get(name, (0.0, NUMBER_LIMIT))
        if kind == "int":
            check_number(name, value, low=int(name in _AT_LEAST_ONE), high=_MOST.get(name, WHOLE_LIMIT))
        elif kind == "bool":
            check_flag(name, value)
        elif kind == "float" or (kind == "float | None" and value is not None):
            check_number(name, value, low, high, whole=False)
        elif kind.startswith("tuple["):
            if not isinstance(value, tuple):
                raise ValueError(f"{name}={shown(value)}: expected a list of numbers")
            of_floats = kind == "tuple[float, ...]"
            for member in value:
                if of_floats:
                    check_number(f"{name}: a member", member, TINY, NUMBER_LIMIT, whole=False)
                else:
                    check_number(f"{name}: a member", member)
        elif kind in ("str", "RopeScaling") and not isinstance(value, {"str": str}.get(kind, RopeScaling)):
            raise ValueError(f"{name}={shown(value)}: expected {kind}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched; ``rope_type`` says which of the other fields count."""

    rope_type: str = "default"  # default | linear | llama3 | yarn | longrope
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0  # multiplies cosines and sines; 0: as the type derives it
    short_factor: tuple[float, ...] = ()  # longrope: one divisor a frequency

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {shown(self.rope_type)} is not supported; known: {', '.join(ROPE_TYPES)}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} is not below {self.high_freq_factor}, the high one"
            )
        if self.rope_type == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} is below {self.beta_slow}, beta_slow")


class ExpertSizes(NamedTuple):
    """Of routed experts that are alike, all that plans, budgets and planes need to know of a model."""

    layers: int
    experts: int
    channels: int
    hidden_size: int

    @property
    def weights(self) -> int:
        """Of all experts of all layers: gate, up and down."""
        return self.layers * self.experts * 3 * self.channels * self.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one decoder. A zero or empty field means that the model has no such part.

    ``intermediate_size`` is the channels of one expert. ``windows``: for each layer the number of
    newest positions that its attention sees, 0 for all; empty means 0 everywhere.
    """

    family: str = "olmoe"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    layer_norm: bool = False  # LayerNorm with bias in place of RMS norm
    tie_word_embeddings: bool = False
    head_bias: bool = False
    initializer_range: float = 0.02
    # attention
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    qk_norm: str = "vector"  # over the whole query and key vectors, or over each head
    clip_qkv: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float = 0.0  # 0: 1 / sqrt(query size)
    attention_sinks: bool = False
    windows: tuple[int, ...] = ()
    rope_theta: float = 10000.0
    rope_interleave: bool = False  # neighbours are rotated against each other, not the two halves
    rope_scaling: RopeScaling = RopeScaling()
    # latent attention: keys and values from one low-rank vector (arXiv 2405.04434, section 2.1)
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # routing
    routing: str = "softmax"
    norm_topk_prob: bool = False
    n_group: int = 0
    topk_group: int = 0
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    router_jitter_noise: float = 0.01  # sparsemixer's threshold
    # experts, and what stands beside or in place of them
    expert_bias: bool = False
    swiglu_limit: float = 0.0  # 0: SiLU(gate) * up
    swiglu_alpha: float = 1.702
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_intermediate_size: int = 0
    # scales
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.head_dim:
            _check_divides("num_attention_heads", self.num_attention_heads, self.hidden_size)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_divides("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is not in 1..{self.num_experts}")
        for name, value, known in (("routing", self.routing, ROUTINGS), ("qk_norm", self.qk_norm, QK_NORMS)):
            if value not in known:
                raise ValueError(f"{name}={shown(value)}; known: {', '.join(known)}")
        if self.n_group:
            _check_divides("n_group", self.n_group, self.num_experts)
            if not 1 <= self.topk_group <= self.n_group:
                raise ValueError(f"topk_group={self.topk_group} is not in 1..{self.n_group}")
            if self.topk_group * (self.num_experts // self.n_group) < self.num_experts_per_tok:
                raise ValueError(f"{self.topk_group} groups have fewer than {self.num_experts_per_tok} experts")
        if self.routing == "sparsemixer" and self.num_experts_per_tok != 2:
            raise ValueError(f"sparsemixer routing chooses 2 experts, not {self.num_experts_per_tok}")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_hidden_layers} layers")
        if any(not 0 <= i < self.num_hidden_layers for i in self.dense_layers):
            raise ValueError(f"dense_layers {shown(self.dense_layers)} are not all in 0..{self.num_hidden_layers - 1}")
        if len(set(self.dense_layers)) == self.num_hidden_layers:
            raise ValueError("every layer is dense: there is no expert to quantize")
        self._check_heads()
        self._check_rope()

    def _check_heads(self) -> None:
        if self.kv_lora_rank:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                check_number(name, getattr(self, name), low=1)
        if self.rotary_dim % 2:
            name = "qk_rope_head_dim" if self.kv_lora_rank else "head_dim"
            raise ValueError(f"{name}={self.rotary_dim}: expected an even number, since rotary positions turn pairs")

    def _check_rope(self) -> None:
        scaling, length = self.rope_scaling, self.max_position_embeddings
        if scaling.rope_type != "longrope":
            return
        if len(scaling.short_factor) != self.rotary_dim // 2:
            raise ValueError(
                f"short_factor has {len(scaling.short_factor)} entries for {self.rotary_dim // 2} frequencies"
            )
        if (scaling.original_max_position_embeddings or length) < 2:
            raise ValueError("original_max_position_embeddings=1: expected 2 or more for longrope")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        dense = set(self.dense_layers)
        return tuple(i for i in range(self.num_hidden_layers) if i not in dense)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def expert_sizes(self) -> ExpertSizes:
        return ExpertSizes(self.num_moe_layers, self.num_experts, self.intermediate_size, self.hidden_size)

    @property
    def num_expert_weights(self) -> int:
        """Weights in all routed experts of all layers: gate, up and down."""
        return self.expert_sizes.weights

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check_divides(name: str, value: int, whole: int) -> None:
    if value < 1 or whole % value:
        raise ValueError(f"{name}={value} does not divide {whole}")
