"""What a checkpoint calls its tensors, family by family."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Container, Iterable
from typing import Any

import numpy as np

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.family import FIRST, MIDDLE, PARTS, PLAIN, ROW, Family, names_of_mlp
from dynamo_jax.models.families.table import FAMILIES
from dynamo_jax.models.formats.expert_files import ExpertTensors

PREFIXES = (  # of a decoder's tensors and of its head, alone or inside a model of more than text
    ("model.", ""),
    ("model.language_model.", ""),
    ("language_model.model.", "language_model."),
    ("language_model.", ""),
    ("model.text_model.", ""),
)
NAMES = {  # of a layer's parameters, but the routed experts' weights and biases, in most families
    **{"embed": "embed_tokens.weight", "norm.scale": "norm.weight", "norm.bias": "norm.bias"},  # of the decoder
    "attention_norm.scale": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "experts_norm.scale": "post_attention_layernorm.weight",
    "experts_norm.bias": "post_attention_layernorm.bias",
    **{f"attention.{part}": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    **{f"attention.{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm.weight" for part in "qk"},
    "attention.sinks": "self_attn.sinks",
    "attention.gate": "self_attn.g_proj.weight",
    "attention.q_down": "self_attn.q_a_proj.weight",
    "attention.q_down_bias": "self_attn.q_a_proj.bias",
    "attention.q_down_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_down_bias": "self_attn.kv_a_proj_with_mqa.bias",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
    **{f"attention.{part}": f"linear_attn.in_proj_{part}.weight" for part in ("qkvz", "ba", "qkv", "z", "b", "a")},
    "attention.conv": "linear_attn.conv1d.weight",
    "attention.a_log": "linear_attn.A_log",
    "attention.dt_bias": "linear_attn.dt_bias",
    "attention.gated_norm": "linear_attn.norm.weight",
    "attention.out": "linear_attn.out_proj.weight",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.bias",
    "router_correction": "mlp.gate.e_score_correction_bias",
    **names_of_mlp("dense", "mlp"),
    **names_of_mlp("shared", "mlp.shared_experts"),
    "shared_gate": "mlp.shared_expert_gate.weight",
}
_TURNED = {  # files have (outputs, inputs), and these parameters the other way round
    *("router", "shared_gate", "dense.down", "shared.down"),
    *(f"attention.{part}" for part in ("q", "k", "v", "o", "gate", "q_down", "q_up", "kv_down", "kv_up")),
    *(f"attention.{part}" for part in ("qkvz", "ba", "qkv", "z", "b", "a", "in_proj", "out")),
    *(f"attention.{part}" for part in ("decay", "decay_down", "decay_up", "gate_down", "gate_up")),
}


class Filed(enum.Enum):
    """How an array of ours lies in a file: as it is, with its axes the other way round, as the only row of a matrix,
    between axes of length one, or as the first of two rows, of which the other is not read."""

    PLAIN = 0
    TURNED = 1
    ROW = 2
    MIDDLE = 3
    FIRST = 4

    def to_file(self, array: np.ndarray, beside: np.ndarray | None = None) -> np.ndarray:
        """beside: the tensor that has the row that is not read; without one, there are zeros."""
        if self is Filed.FIRST:
            return np.stack([array, np.zeros_like(array) if beside is None else beside[1].astype(array.dtype)])
        return array.T if self is Filed.TURNED else array.reshape(self.shape(array.shape))

    def from_file(self, array: np.ndarray) -> np.ndarray:
        if self is Filed.MIDDLE:
            return array[0, 0, :, 0]
        return array.T if self is Filed.TURNED else array[0] if self in (Filed.ROW, Filed.FIRST) else array

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the array in the file."""
        if self is Filed.MIDDLE:
            return (1, 1, *shape, 1)
        rows = {Filed.ROW: (1,), Filed.FIRST: (2,)}
        return shape[::-1] if self is Filed.TURNED else (*rows.get(self, ()), *shape)


_MARKS = {ROW: Filed.ROW, FIRST: Filed.FIRST, MIDDLE: Filed.MIDDLE, PLAIN: Filed.PLAIN}
_MOE = r"(mlp|block_sparse_moe|feed_forward)\."
# Tensors of one layer of any family, by the part of the name that follows the layer's number, and the keys of
# config.json by which a model has them.
_KEYS = {
    r"self_attn\.(q|k|v|o|q_a|kv_a)_proj(_with_mqa)?\.bias": "attention_bias or qkv_bias",
    r"self_attn\.(q_a_proj|q_a_layernorm|q_b_proj)\.weight": "q_lora_rank",
    r"self_attn\.(kv_a_proj_with_mqa|kv_a_layernorm|kv_b_proj)\.weight": "kv_lora_rank",
    r"self_attn\.q_proj\.weight": "q_lora_rank",
    r"self_attn\.(sinks|[qkvo]_proj\.weight|[qk]_norm\.(weight|bias))": "model_type",
    r"attention\.(query_key_value|dense)\.bias": "use_qkv_bias or use_bias",
    r"attention\.(query|key)_layernorm\.weight": "use_qk_norm",
    r"attention\.(query_key_value|dense)\.weight": "model_type",
    r"mlp\.gate\.expert_bias": "moe_router_enable_expert_bias, or which layers are dense",
    r"self_attn\.(g|gate)_proj\.weight": "model_type",
    r"(linear_attn|conv)\..*": "layer_types, or model_type",
    r"(self_attn|attention)\.([qkv]_conv1d|o_norm|b_proj|f_proj|[fg]_[ab]_proj|A_log|dt_bias)(\.weight)?": (
        "layer_types, or model_type"
    ),
    r"(input|post_attention)_layernorm\.bias": "model_type",
    r"(pre|post)_(mlp|feedforward)_layernorm(_[12])?\.weight": "model_type",
    r"(router|experts|moe|share_expert)\..*": "model_type, or which layers are dense",
    _MOE + r"shared_experts\..*": "n_shared_experts",
    _MOE + r"shared_expert(_gate)?\..*": "shared_expert_intermediate_size",
    _MOE + r"experts\.\d+\.\w+\.weight": "the number of experts, or which layers are dense",
    _MOE + r"experts\..*": "model_type",
    _MOE + r"((input|output)_linear|gate|router(\.layer)?)\.(weight|bias|e_score_correction_bias)": (
        "model_type, or which layers are dense"
    ),
    _MOE + r"(gate|up|down)_proj\.(weight|bias)": "which layers are dense",
}
_LAYER = re.compile(r"layers\.(\d{1,9})\.(.*)", re.DOTALL)


def extra_layers(raw: dict[str, Any], tensors: Iterable[str]) -> int:
    """How many layers there are beyond the decoder's, for the prediction of further tokens: those that config.json
    promises, or that have the projection which only these have."""
    counts = [raw.get(key) for key in ("num_nextn_predict_layers", "num_mtp_layers")]
    found = sum(name.endswith(".eh_proj.weight") for name in tensors)
    return max([found, *(n for n in counts if isinstance(n, int))])


def key_that_would_read(config: ModelConfig, name: str, extra: int) -> str:
    """What in config.json would have to be otherwise for the decoder to read a tensor that it does not read.

    Empty for tensors that no decoder reads. extra: layers beyond the decoder's that may be there.
    """
    if name == f"{config.head_prefix}lm_head.bias":
        return "lm_head_bias"
    if not name.startswith(config.prefix):
        return ""
    name = name.removeprefix(config.prefix)
    if name == "norm.bias":
        return "model_type"
    if not (match := _LAYER.fullmatch(name)):
        return ""
    layer, rest = int(match[1]), match[2]
    if re.fullmatch(_family(config).beside, rest, re.DOTALL):
        return ""
    key = next((key for pattern, key in _KEYS.items() if re.fullmatch(pattern, rest, re.DOTALL)), "")
    if not key or config.num_hidden_layers <= layer < config.num_hidden_layers + extra:
        return ""
    return "num_hidden_layers" if layer >= config.num_hidden_layers else key


def found_prefixes(config: ModelConfig, tensors: Container[str]) -> tuple[str, str]:
    """Which of ``PREFIXES`` the files have."""
    name, _ = names_of(config)["embed"]
    return next((p for p in PREFIXES if f"{p[0]}{name}" in tensors), PREFIXES[0])


def embed_name(config: ModelConfig) -> str:
    return config.prefix + names_of(config)["embed"][0]


def head_name(config: ModelConfig) -> str:
    return f"{config.head_prefix}lm_head.weight"


def _family(config: ModelConfig) -> Family:
    """What tells the names of tensors that begin with the configuration's prefix."""
    family = FAMILIES[config.family]
    return family.by_prefix.get(config.prefix, family)


def names_alone(config: ModelConfig) -> ModelConfig:
    """The same with the names by which ``transformers`` takes what is read without the rest of a file."""
    return dataclasses.replace(config, prefix=_family(config).alone or config.prefix)


def names_of(config: ModelConfig) -> dict[str, tuple[str, Filed]]:
    """What the files of the configuration's family call the parameters of a layer, apart from the layer's prefix, and
    how they hold them."""
    return {ours: _filed(ours, theirs) for ours, theirs in (NAMES | _family(config).names).items()}


def _filed(ours: str, theirs: str) -> tuple[str, Filed]:
    for mark, filed in _MARKS.items():
        if theirs.endswith(mark):
            return theirs.removesuffix(mark), filed
    return theirs, Filed.TURNED if ours in _TURNED else Filed.PLAIN


def expert_names(config: ModelConfig, layer: int, fused: tuple[bool, ...] = ()) -> ExpertTensors:
    """Where the file holds the routed experts of one layer. ``layer`` counts all layers; fused: as ``Source.fused``
    says of a file."""
    family = _family(config)
    if fused:
        return ExpertTensors("concatenated", fused_names(config, layer), (fused[0], fused[1]))
    prefix = _module(config, layer)
    if family.experts == "concatenated":
        return ExpertTensors("concatenated", (f"{prefix}input_linear.weight", f"{prefix}output_linear.weight"))
    if family.experts == "stacked":
        return ExpertTensors("stacked", tuple(f"{prefix}{part}_proj.weight" for part in PARTS))
    if family.experts == "fused":
        return ExpertTensors("concatenated", fused_names(config, layer))
    if family.experts == "interleaved":
        return ExpertTensors("interleaved", fused_names(config, layer))
    return ExpertTensors("split", tuple(f"{prefix}experts.{{e}}.{part}.weight" for part in family.experts.split()))


def fused_names(config: ModelConfig, layer: int) -> tuple[str, str]:
    """Where a file may hold them all together, gate and up in the first tensor and down in the second, though the
    family has a tensor for each."""
    prefix = f"{_module(config, layer)}experts"
    return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"


def _module(config: ModelConfig, layer: int) -> str:
    """What the names of a layer's mixture module begin with."""
    moe = _family(config).moe
    return f"{config.prefix}layers.{layer}." + (f"{moe}." if moe else "")
