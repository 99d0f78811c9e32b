"""What a checkpoint calls its tensors, family by family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.table import FAMILIES
from dynamo_jax.models.formats.expert_files import ExpertTensors

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PARTS = ("gate", "up", "down")
NAMES = {  # of a layer's parameters, but the routed experts' weights and biases, in most families
    "attention_norm.scale": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "experts_norm.scale": "post_attention_layernorm.weight",
    "experts_norm.bias": "post_attention_layernorm.bias",
    **{f"attention.{part}": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    **{f"attention.{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm.weight" for part in "qk"},
    "attention.sinks": "self_attn.sinks",
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
    **{f"dense.{part}": f"mlp.{part}_proj.weight" for part in _PARTS},
    **{f"shared.{part}": f"mlp.shared_experts.{part}_proj.weight" for part in _PARTS},
    "shared_gate": "mlp.shared_expert_gate.weight",
}
TURNED = {  # files have (outputs, inputs), and these parameters the other way round
    *("router", "shared_gate", "dense.down", "shared.down"),
    *(f"attention.{part}" for part in ("q", "k", "v", "o", "q_down", "q_up", "kv_down", "kv_up")),
    *(f"attention.{part}" for part in ("qkvz", "ba", "qkv", "z", "b", "a", "out")),
}
_MOE = r"(mlp|block_sparse_moe)\."
# Tensors of one layer of any family, by the part of the name that follows the layer's number, and the keys of
# config.json by which a model has them.
_KEYS = {
    r"self_attn\.(q|k|v|o|q_a|kv_a)_proj(_with_mqa)?\.bias": "attention_bias or qkv_bias",
    r"self_attn\.(q_a_proj|q_a_layernorm|q_b_proj)\.weight": "q_lora_rank",
    r"self_attn\.(kv_a_proj_with_mqa|kv_a_layernorm|kv_b_proj)\.weight": "kv_lora_rank",
    r"self_attn\.q_proj\.weight": "q_lora_rank",
    r"self_attn\.(sinks|[qkvo]_proj\.weight|[qk]_norm\.(weight|bias))": "model_type",
    r"linear_attn\..*": "layer_types, or model_type",
    r"(input|post_attention)_layernorm\.bias": "model_type",
    _MOE + r"shared_experts\..*": "n_shared_experts",
    _MOE + r"shared_expert(_gate)?\..*": "shared_expert_intermediate_size",
    _MOE + r"experts\.\d+\.\w+\.weight": "the number of experts, or which layers are dense",
    _MOE + r"experts\..*": "model_type",
    _MOE + r"((input|output)_linear|gate|router(\.layer)?)\.(weight|bias|e_score_correction_bias)": (
        "model_type, or which layers are dense"
    ),
    _MOE + r"(gate|up|down)_proj\.(weight|bias)": "which layers are dense",
}
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.*)", re.DOTALL)


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
    if name == "lm_head.bias":
        return "lm_head_bias"
    if name == "model.norm.bias":
        return "model_type"
    if not (match := _LAYER.fullmatch(name)):
        return ""
    layer, rest = int(match[1]), match[2]
    key = next((key for pattern, key in _KEYS.items() if re.fullmatch(pattern, rest, re.DOTALL)), "")
    if not key or config.num_hidden_layers <= layer < config.num_hidden_layers + extra:
        return ""
    return "num_hidden_layers" if layer >= config.num_hidden_layers else key


def names_of(config: ModelConfig) -> dict[str, str]:
    """What the files of the configuration's family call the parameters of a layer, apart from the layer's prefix."""
    return NAMES | FAMILIES[config.family].names


def expert_names(config: ModelConfig, layer: int) -> ExpertTensors:
    """Where the file holds the routed experts of one layer. ``layer`` counts all layers."""
    family = FAMILIES[config.family]
    prefix = f"model.layers.{layer}.{family.moe}"
    if family.experts == "concatenated":
        return ExpertTensors("concatenated", (f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight"))
    if family.experts == "interleaved":
        return ExpertTensors("interleaved", (f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"))
    return ExpertTensors("split", tuple(f"{prefix}.experts.{{e}}.{part}.weight" for part in family.experts.split()))
