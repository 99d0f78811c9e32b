"""Write a Hugging Face checkpoint folder with random weights and the shapes of a real model.

    python benchmarks/synthetic_checkpoint.py OUT [--shape olmoe-1b-7b] [--layers 14]

Sharded, bfloat16, a layer a file; the tokenizer is the bundled model's. 14 layers of OLMoE-1B-7B are 12.2 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.families.names import Filed, expert_names
from dynamo_jax.models.families.table import FAMILIES, config_from
from dynamo_jax.models.formats.expert_files import expert_tensors
from dynamo_jax.models.huggingface import parameter_shapes, tensor_names, write_shards
from dynamo_jax.models.tokenizer import TOKENIZER

SHAPES = {
    "small-olmoe": {
        "model_type": "olmoe", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 256,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 48,
        "num_experts_per_tok": 4, "max_position_embeddings": 1024,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
        "norm_topk_prob": True,
    },
}  # fmt: skip


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(ml_dtypes.bfloat16)


def parts(config: ModelConfig, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors of each layer, then those outside the layers. Norms are ones; matrices keep a vector's length."""
    shapes = parameter_shapes(config)
    rng = np.random.default_rng(seed)

    def make(name: str, theirs: str, filed: Filed) -> np.ndarray:
        shape = shapes[name]
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        return random_tensor(rng, filed.shape(shape), 0.02 if "embed" in theirs else shape[0] ** -0.5)

    names = list(tensor_names(config))
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        tensors = {theirs: make(ours, theirs, filed) for ours, theirs, filed in names if ours.startswith(prefix)}
        if layer in config.moe_layers:
            size = (config.intermediate_size, config.hidden_size)
            scales = (size[1] ** -0.5, size[1] ** -0.5, size[0] ** -0.5)
            experts = [tuple(random_tensor(rng, size, s) for s in scales) for _ in range(config.num_experts)]
            tensors |= expert_tensors(expert_names(config, layer), experts, {})
        yield tensors
    yield {theirs: make(ours, theirs, filed) for ours, theirs, filed in names if not ours.startswith("layers.")}


def make_checkpoint(out: Path, shape: str, layers: int | None = None, seed: int = 0) -> ModelConfig:
    raw = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    raw |= {"architectures": [FAMILIES[raw["model_type"]].architecture], "eos_token_id": 0, "bos_token_id": None}
    config = config_from(raw)
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, parts(config, seed), config.num_hidden_layers + 1)
    shutil.copyfile(BUNDLED / TOKENIZER, out / TOKENIZER)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    make_checkpoint(arguments.out, arguments.shape, arguments.layers, arguments.seed)
    size = sum(p.stat().st_size for p in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {size / 1e9:.1f} GB in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
