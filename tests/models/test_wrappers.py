"""Models of more than text: their text part is read, the rest is named."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import CORRECTED, DELTA, LATENT, SMALL

from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.huggingface import describe, load_decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = {name: SMALL[name] for name in SMALL if not name.endswith("_token_id")}
SPLIT = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "image_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "deepstack_visual_indexes": [],
}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
# wrapper -> (its class, the type of its text part, the smallest text part)
MODELS = {
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text", SPLIT | SECTIONS),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", DELTA),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", "glm4v_moe_text", CORRECTED | {"head_dim": 16} | SECTIONS),
    "minimax_m3_vl": (
        "MiniMaxM3SparseForConditionalGeneration",
        "minimax_m3_vl_text",
        {
            "intermediate_size": 24,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 16,
            "rotary_dim": 4,
            "partial_rotary_factor": 0.5,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_block_size": 8,
            "index_topk_blocks": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"],
        },
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        "gemma4_text",
        SPLIT
        | {
            "top_k_experts": 2,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "step3p7": (
        "Step3p7ForConditionalGeneration",
        "step3p5",
        SPLIT
        | {
            "n_routed_experts": 6,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "share_expert_dim": 20,
            "num_sliding_attention_heads": 6,
            "moe_router_scaling_factor": 1.5,
            "query_pre_attn_scalar": 5,
            "swiglu_limits": [0.0, None, 0.3],
            "swiglu_limits_shared": [0.3, 0.0, 0.4],
            "rope_theta": [10000.0, 5e6, 10000.0],
            "partial_rotary_factors": [1.0, 0.5, 1.0],
        },
    ),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", "deepseek_v3", LATENT),
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral4", LATENT | {"n_group": 1, "topk_group": 1}),
}


def made(kind, folder):
    """A random model of transformers, and its folder written."""
    name, text, values = MODELS[kind]
    config = transformers.AutoConfig.for_model(
        kind, text_config={"model_type": text, **TEXT, **values}, vision_config=VISION, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "layer_scalar")):
                buffer.add_(torch.rand_like(buffer) * 0.3)
    model.save_pretrained(folder)
    if kind == "kimi_k25":  # transformers 5.24 gives the text part's layers the vision tower's name for them
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        named = {n.replace("model.blocks.", "model.layers."): a for n, a in tensors.items()}
        safetensors.numpy.save_file(named, path)
    return model


@pytest.mark.parametrize(
    "kind", [k if k == "qwen3_vl_moe" else pytest.param(k, marks=pytest.mark.slow) for k in MODELS]
)
def test_the_text_part_has_the_wrappers_logits(kind, tmp_path):
    model, folder = made(kind, tmp_path), tmp_path
    tokens = np.random.default_rng(0).integers(3, 61, (2, 20))
    with torch.no_grad():
        want = model(input_ids=torch.tensor(tokens)).logits.numpy()
    got = load_decoder(folder)(jnp.asarray(tokens))[0]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    assert "tensors that the decoder has no use for (" in describe(folder)["not read"]


def test_a_wrapper_without_a_text_part_is_named():
    with pytest.raises(ValueError, match="model_type 'kimi_k25' has no text part"):
        config_from({"model_type": "kimi_k25", "vision_config": {}})
    raw = {"model_type": "kimi_k25", "text_config": {"model_type": "llama"}}
    with pytest.raises(ValueError, match="unknown model_type 'llama'"):
        config_from(json.loads(json.dumps(raw)))
