"""Hugging Face checkpoint folders in and out: config.json, model.safetensors, tokenizer.json.

One table gives each parameter's name there, its layout and its shape; all mismatches are
reported together. Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters, with_parameters

FAMILIES = {"olmoe": "OlmoeForCausalLM"}

# ours -> (theirs, transposed); {e} stands for each expert, stacked on a new first axis here.
LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", False),
    "attention.q": ("self_attn.q_proj.weight", True),
    "attention.k": ("self_attn.k_proj.weight", True),
    "attention.v": ("self_attn.v_proj.weight", True),
    "attention.o": ("self_attn.o_proj.weight", True),
    "attention.q_norm": ("self_attn.q_norm.weight", False),
    "attention.k_norm": ("self_attn.k_norm.weight", False),
    "experts_norm": ("post_attention_layernorm.weight", False),
    "router": ("mlp.gate.weight", True),
    "gate": ("mlp.experts.{e}.gate_proj.weight", False),
    "up": ("mlp.experts.{e}.up_proj.weight", False),
    "down": ("mlp.experts.{e}.down_proj.weight", True),
}
TOP_NAMES = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def checkpoint_names(config: ModelConfig) -> Iterator[tuple[str, list[str], bool]]:
    """(our name, their names, transposed) of every parameter; several names mean one for each expert."""
    for ours, theirs in TOP_NAMES.items():
        if ours != "head" or not config.tie_word_embeddings:
            yield ours, [theirs], False
    for layer in range(config.num_hidden_layers):
        for ours, (theirs, transposed) in LAYER_NAMES.items():
            if ours.endswith(("q_norm", "k_norm")) and not config.use_qk_norm:
                continue
            experts = range(config.num_experts) if "{e}" in theirs else range(1)
            names = [f"model.layers.{layer}.{theirs.format(e=e)}" for e in experts]
            yield f"layers.{layer}.{ours}", names, transposed


def load_config(folder: Path) -> ModelConfig:
    raw = _read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{folder / 'config.json'}: unknown model_type {family!r}; known: {', '.join(FAMILIES)}")
    if scaling := raw.get("rope_scaling"):
        raise ValueError(f"{folder / 'config.json'}: rope_scaling {scaling} is not supported")
    for key, only in (("hidden_act", "silu"), ("attention_bias", False)):  # else it would compute something else
        if raw.get(key, only) != only:
            raise ValueError(f"{folder / 'config.json'}: {key} {raw[key]!r} is not supported; only {only!r}")
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder / 'config.json'}: rope_type {rope['rope_type']!r} is not supported")
    raw.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    fields = ModelConfig.__dataclass_fields__
    try:
        return ModelConfig(**{k: v for k, v in raw.items() if k in fields and k != "use_qk_norm"})
    except TypeError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception on any damage
        raise ValueError(f"{path}: not a tokenizer: {error}") from error


def load_checkpoint(folder: Path) -> Decoder:
    """The model in ``folder``, parameters in the dtype of the file (float32 or bfloat16)."""
    folder = Path(folder)
    config = load_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file: {error}") from error
    names = list(checkpoint_names(config))
    if missing := [n for _, theirs, _ in names for n in theirs if n not in tensors]:
        raise ValueError(f"{path}: {len(missing)} tensors missing, the first is {missing[0]}")
    arrays = {}
    for ours, theirs, transposed in names:
        parts = [tensors[n].swapaxes(0, 1) if transposed else tensors[n] for n in theirs]
        arrays[ours] = jnp.asarray(np.stack(parts) if "experts" in theirs[0] else parts[0])
    try:
        return with_parameters(config, arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_checkpoint(folder: Path, model: Decoder, tokenizer: Path, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Write ``model`` as a Hugging Face folder with weights in ``dtype`` and a copy of the tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = parameters(model)
    tensors = {}
    for ours, theirs, transposed in checkpoint_names(model.config):
        value = np.asarray(arrays[ours]).astype(dtype)
        for name, part in zip(theirs, value if "experts" in theirs[0] else [value]):
            tensors[name] = np.ascontiguousarray(part.swapaxes(0, 1) if transposed else part)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "model_type": "olmoe",
        "architectures": [FAMILIES["olmoe"]],
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
        "dtype": np.dtype(dtype).name,
    }
    del config["use_qk_norm"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer != folder / "tokenizer.json":
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value
