"""What a layer of a decoder is made of: one small frozen dataclass for each kind of part.

    LayerSpec(
        mixer=Grouped(num_attention_heads=32, num_key_value_heads=4, head_dim=128, rope=Rope(dim=128)),
        channel=Mixture(num_experts=128, num_experts_per_tok=8, intermediate_size=768),
    )

A mixer lets tokens see each other, a channel part works on each token alone. Layers are alike, and run one program,
when their specifications are equal. Names are those of Hugging Face's config.json where several families share one;
``families/`` makes specifications from a checkpoint's own file. A zero or empty field means that there is no such part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dynamo_jax.files import shown

ROUTINGS = ("softmax", "topk_softmax", "sigmoid", "sparsemixer")
QK_NORMS = ("none", "vector", "head", "turned")
GATINGS = ("none", "per-head", "per-element")
GATE_FUNCTIONS = ("sigmoid", "softplus")
NORMS = ("before", "both")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "ntk_alpha", "proportional")
HIDDEN_ACTS = ("silu", "gelu_pytorch_tanh")
WHOLE_LIMIT = 2**31 - 1
LAYERS_LIMIT = 10_000
TINY, NUMBER_LIMIT = 1e-12, 1e6  # a constant outside of these is a mistake; products of a few stay finite in float32


_AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_experts_per_tok", "max_position_embeddings", "dense_intermediate_size"),
    *("kv_lora_rank", "qk_nope_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "linear_num_heads", "linear_head_dim", "conv_L_cache", "channels"),
)
_RANGES = {  # of float fields; others are not negative and at most NUMBER_LIMIT
    "rms_norm_eps": (TINY, 1.0),
    "rope_theta": (1.001, 1e30),  # 1 has no logarithm to divide by
    "clip_qkv": (TINY, NUMBER_LIMIT),
    "router_jitter_noise": (0.0, 1.0),
    "attention_value_scale": (TINY, NUMBER_LIMIT),
    "alpha": (1.0, NUMBER_LIMIT),
    "partial_rotary_factor": (TINY, 1.0),
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


def check_divides(name: str, value: int, whole: int) -> None:
    """ValueError that names the key unless ``whole`` is a multiple of ``value``."""
    if value < 1 or whole % value:
        raise ValueError(f"{name}={value} does not divide {whole}")


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """ValueError that names the key unless ``value`` is one of those known."""
    if value not in known:
        raise ValueError(f"{name}={shown(value)}; known: {', '.join(known)}")


def check_fields(config: Any) -> None:
    """Each field of a dataclass by its annotation, and numbers by their range."""
    for field in dataclasses.fields(config):
        name, value, kind = field.name, getattr(config, field.name), str(field.type)
        low, high = _RANGES.get(name, (0.0, NUMBER_LIMIT))
        if kind == "int":
            check_number(name, value, low=int(name in _AT_LEAST_ONE))
        elif kind == "bool":
            check_flag(name, value)
        elif kind == "float" or (kind == "float | None" and value is not None):
            check_number(name, value, low, high, whole=False)
        elif kind in ("tuple[float, ...]", "tuple[int, ...]"):
            if not isinstance(value, tuple):
                raise ValueError(f"{name}={shown(value)}: expected a list of numbers")
            of_floats = kind == "tuple[float, ...]"
            for member in value:
                if of_floats:
                    check_number(f"{name}: a member", member, TINY, NUMBER_LIMIT, whole=False)
                else:
                    check_number(f"{name}: a member", member)
        elif kind == "str" and not isinstance(value, str):
            raise ValueError(f"{name}={shown(value)}: expected {kind}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched; ``rope_type`` says which of the other fields count."""

    rope_type: str = "default"  # of ROPE_TYPES
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
    alpha: float = 1.0  # ntk_alpha: the base grows by a power of it
    partial_rotary_factor: float = 1.0  # proportional: the share of frequencies that are not zero

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {shown(self.rope_type)} is not supported; known: {', '.join(ROPE_TYPES)}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} is not below {self.high_freq_factor}, the high one"
            )
        if self.rope_type == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} is below {self.beta_slow}, beta_slow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions. dim: numbers of a head that are turned, its first ones; the rest stay as they are.
    rope_interleave: neighbours are turned against each other, not the two halves."""

    dim: int
    rope_theta: float = 10000.0
    rope_interleave: bool = False
    scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % 2 or not self.dim:
            raise ValueError(f"head_dim={self.dim}: expected an even number, since rotary positions turn pairs")
        scaling = self.scaling
        if scaling.rope_type == "longrope" and len(scaling.short_factor) != self.dim // 2:
            raise ValueError(f"short_factor has {len(scaling.short_factor)} entries for {self.dim // 2} frequencies")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """Grouped-query attention (``mixers/grouped.py``). window: newest positions that a token sees, 0 for all.

    gating: of outputs, by a projection of its own. output_gate: beside each head's query there is a gate, whose sigmoid
    multiplies the head's output. attention_k_eq_v: values are what keys are made of. v_norm: each head's values are
    divided by their root mean square. fused_projections: queries, keys and values are made by one matrix.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope | None
    window: int = 0
    v_head_dim: int = 0  # 0: head_dim
    qk_norm: str = "none"  # over whole query and key vectors, over each head, or over each head when it is turned
    clip_qkv: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    attention_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    attention_sinks: bool = False
    attention_value_scale: float = 1.0
    attention_k_eq_v: bool = False
    v_norm: bool = False
    gating: str = "none"
    gate_function: str = "sigmoid"
    output_gate: bool = False
    fused_projections: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)
        check_known("qk_norm", self.qk_norm, QK_NORMS)
        check_known("gating", self.gating, GATINGS)
        if self.attention_k_eq_v and self.qkv_bias:
            raise ValueError("attention_k_eq_v is not supported with biases of queries, keys and values")
        if self.fused_projections and (self.attention_k_eq_v or self.output_gate):
            raise ValueError("fused_projections are not supported with attention_k_eq_v or output_gate")
        check_known("gate_function", self.gate_function, GATE_FUNCTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Latent attention: keys and values from one low-rank vector (``mixers/latent.py``; arXiv 2405.04434, section
    2.1). qk_rope_head_dim: numbers of a key that all heads share; rope turns them, or None does not. gating: of
    outputs, by a projection of its own."""

    num_attention_heads: int
    kv_lora_rank: int
    q_lora_rank: int = 0  # 0: queries straight from the stream
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope | None
    window: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    gating: str = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("v_head_dim", self.v_head_dim, low=1)
        check_known("gating", self.gating, GATINGS)
        if self.rope and self.rope.dim != self.qk_rope_head_dim:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim}, of which rope turns {self.rope.dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """The gated delta net (``mixers/delta.py``; arXiv 2412.06464). linear_conv_kernel_dim: tokens that its convolution
    sees, the newest one too; fused_projections: queries, keys, values and z in one matrix, b and a in another."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    fused_projections: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_divides("linear_num_key_heads", self.linear_num_key_heads, self.linear_num_value_heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiDelta:
    """Kimi's delta attention (``mixers/kimi_delta.py``; arXiv 2510.26692). low_rank: what decays and gates are made of
    goes through ``linear_head_dim`` numbers; decay_limit: no decay is below minus it, by a sigmoid; 0: a softplus,
    without a limit."""

    linear_num_heads: int
    linear_head_dim: int
    linear_conv_kernel_dim: int = 4
    low_rank: bool = True
    decay_limit: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConv:
    """A short convolution between gates (``mixers/short_conv.py``). conv_L_cache: tokens that it sees, the newest one
    too; channels: of the stream."""

    channels: int
    conv_L_cache: int = 3
    conv_bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """How a token's experts and gates are chosen (``routing.py``). choice_bias: added to the scores by which experts
    are chosen, not to their gates. norm_floor: added to the sum by which gates are divided.
    own_norm: the router reads the stream, normed with a weight of its own and divided by the root of its size;
    expert_scale: each expert's gates are multiplied by a number of its own."""

    routing: str = "softmax"
    norm_topk_prob: bool = False
    norm_floor: float = 0.0
    choice_bias: bool = False
    router_logit_softcapping: float = 0.0
    own_norm: bool = False
    expert_scale: bool = False
    n_group: int = 0
    topk_group: int = 0
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    router_jitter_noise: float = 0.01  # sparsemixer's threshold

    def __post_init__(self) -> None:
        check_fields(self)
        check_known("routing", self.routing, ROUTINGS)
        if self.n_group and not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is not in 1..{self.n_group}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A gated MLP that every token goes through."""

    dense_intermediate_size: int
    hidden_act: str = "silu"
    swiglu_limit: float = 0.0  # as a mixture's
    swiglu_alpha: float = 1.702
    swiglu_clamp: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_known("hidden_act", self.hidden_act, HIDDEN_ACTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Routed experts of ``intermediate_size`` channels, with a shared one beside them or not. own_norms: the routed
    ones have a norm before and after them, and so has the shared one."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    router: Router = Router()
    expert_bias: bool = False
    swiglu_limit: float = 0.0  # 0: SiLU(gate) * up
    swiglu_alpha: float = 1.702
    swiglu_clamp: float = 0.0  # both factors stay within it; 0: no such limit
    shared_swiglu_clamp: float = 0.0
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    hidden_act: str = "silu"  # of gates, where swiglu_limit says nothing else
    own_norms: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_known("hidden_act", self.hidden_act, HIDDEN_ACTS)
        if self.own_norms and not self.shared_intermediate_size:
            raise ValueError("own_norms: there is no shared expert")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is not in 1..{self.num_experts}")
        router = self.router
        if router.n_group:
            check_divides("n_group", router.n_group, self.num_experts)
            if router.topk_group * (self.num_experts // router.n_group) < self.num_experts_per_tok:
                raise ValueError(f"{router.topk_group} groups have fewer than {self.num_experts_per_tok} experts")
        if self.swiglu_limit and self.swiglu_clamp:
            raise ValueError("swiglu_limit and swiglu_clamp contradict each other")
        if router.routing == "sparsemixer" and self.num_experts_per_tok != 2:
            raise ValueError(f"sparsemixer routing chooses 2 experts, not {self.num_experts_per_tok}")

    @property
    def shared(self) -> Dense:
        """The shared expert, as a dense part."""
        return Dense(
            dense_intermediate_size=self.shared_intermediate_size,
            hidden_act=self.hidden_act,
            swiglu_limit=self.swiglu_limit,
            swiglu_alpha=self.swiglu_alpha,
            swiglu_clamp=self.shared_swiglu_clamp,
        )


Mixer = Grouped | Latent | DeltaNet | KimiDelta | ShortConv
Channel = Dense | Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A residual block: a mixer, then a channel part, each behind a norm, or between two. layer_scalar: the stream is
    multiplied by a number at its end."""

    mixer: Mixer
    channel: Channel
    norms: str = "before"
    layer_scalar: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_known("norms", self.norms, NORMS)

    @property
    def adds(self) -> bool:
        """Whether what the experts give is added to the stream as it is, but for a factor."""
        apart = isinstance(self.channel, Mixture) and self.channel.own_norms
        return self.norms == "before" and not self.layer_scalar and not apart

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the names of the parts' kinds."""
        parts = {name: getattr(self, name) for name in ("mixer", "channel")}
        return dataclasses.asdict(self) | {
            name: {"kind": type(part).__name__} | dataclasses.asdict(part) for name, part in parts.items()
        }
