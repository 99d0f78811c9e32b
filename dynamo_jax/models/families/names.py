"""What a checkpoint calls its tensors, family by family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.table import FAMILIES
from dynamo_jax.models.formats.expert_files import ExpertTensors

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MOE = r"(mlp|block_sparse_moe)\."
# Tensors of one layer of any family, by the part of the name that follows the layer's number, and the keys of
# config.json by which a model has them.
_KEYS = {
    r"self_attn\.(q|k|v|o|q_a|kv_a)_proj(_with_mqa)?\.bias": "attention_bias or qkv_bias",
    r"self_attn\.(q_a_proj|q_a_layernorm|q_b_proj)\.weight": "q_lora_rank",
    r"self_attn\.(kv_a_proj_with_mqa|kv_a_layernorm|kv_b_proj)\.weight": "kv_lora_rank",
    r"self_attn\.q_proj\.weight": "q_lora_rank",
    r"self_attn\.(sinks|[qkvo]_proj\.weight|[qk]_norm\.(weight|bias))": "model_type",
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


def tensor_names(config: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """(our name, the file's name, transposed) of every parameter but the routed experts' weights and biases."""
    yield "embed", EMBED, False
    for layer in range(config.num_hidden_layers):
        for ours, theirs, transposed in layer_tensor_names(config, layer):
            yield f"layers.{layer}.{ours}", f"model.layers.{layer}.{theirs}", transposed
    yield from ((f"norm.{a}", f"model.norm.{b}", False) for a, b in _norm(config))
    if not config.tie_word_embeddings:
        yield "head", HEAD, False
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


def expert_names(config: ModelConfig, layer: int) -> ExpertTensors:
    """Where the file holds the routed experts of one layer. ``layer`` counts all layers."""
    family = FAMILIES[config.family]
    prefix = f"model.layers.{layer}.{family.moe}"
    if family.experts == "concatenated":
        return ExpertTensors("concatenated", (f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight"))
    if family.experts == "interleaved":
        return ExpertTensors("interleaved", (f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"))
    return ExpertTensors("split", tuple(f"{prefix}.experts.{{e}}.{part}.weight" for part in family.experts.split()))


def fused_names(config: ModelConfig, layer: int) -> tuple[str, str]:
    """Where a file may hold them all together, gate and up in the first tensor and down in the second, though the
    family has a tensor for each."""
    prefix = f"model.layers.{layer}.{FAMILIES[config.family].moe}.experts"
    return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
