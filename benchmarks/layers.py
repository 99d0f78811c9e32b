"""The layers and models that kernels are measured on: sizes as published, no weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dynamo_jax.models.families.table import config_from

PREFILL = 2048
BATCHES = (128, 256, 512)  # what servers decode at a time
TOKENS = (1, 8, 64, *BATCHES, PREFILL)


class Layer(NamedTuple):
    """One layer of experts. hidden and channels: filled up to multiples of 128."""

    experts: int
    hidden: int
    channels: int
    chosen: int


SHAPES = {
    "mixtral-8x7b": Layer(8, 4096, 14336, 2),
    "olmoe-1b-7b": Layer(64, 2048, 1024, 8),
    "qwen3-30b-a3b": Layer(128, 2048, 768, 8),
    "deepseek-v2-lite": Layer(64, 2048, 1408, 6),
    "gpt-oss-20b": Layer(32, 2944, 2944, 4),  # of 2880 and 2880
    "qwen3.5-35b-a3b": Layer(256, 2048, 512, 8),
}
MODELS = {
    "mixtral-8x7b": config_from({
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1e6,
    }),
    "qwen3-30b-a3b": config_from({
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960, "rope_theta": 1e6,
        "norm_topk_prob": True,
    }),
    "olmoe-1b-7b": config_from({
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    }),
}  # fmt: skip
LARGE = {  # than one chip
    "qwen3-235b-a22b": config_from({
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
        "rope_theta": 1e6, "norm_topk_prob": True,
    }),
    "deepseek-v3": config_from({
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 163840, "rope_theta": 10000.0, "norm_topk_prob": True,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    }),
    "kimi-k2": config_from({
        "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
        "num_key_value_heads": 64, "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 131072, "rope_theta": 50000.0, "norm_topk_prob": True,
        "rope_scaling": {
            "type": "yarn", "factor": 32, "original_max_position_embeddings": 4096, "beta_fast": 1, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    }),
}  # fmt: skip


def sizes_of(layer: Layer, tokens: int) -> np.ndarray:
    """Rows of each expert."""
    rng = np.random.default_rng(0)
    chosen = [rng.choice(layer.experts, layer.chosen, replace=False) for _ in range(tokens)]
    return np.bincount(np.concatenate(chosen), minlength=layer.experts)
