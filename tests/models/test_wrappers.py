"""Models of more than text: their text part is read, the rest is named. ERNIE 4.5 VL has experts of images, too."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import CORRECTED, DELTA, LATENT, SMALL

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.huggingface import Source, describe, load_config, load_decoder
from dynamo_jax.models.rotary import angles
from dynamo_jax.storage.export import export

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
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "ernie4_5_vl_moe_text",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": [24, 16],
            "moe_num_experts": 6,
            "moe_k": 2,
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        },
    ),
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


ERNIE = "ernie4_5_vl_moe"
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 20))
FLAT = {
    "model_type": "ernie4_5_moe_vl", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "moe_num_experts": [6, 6], "moe_intermediate_size": [24, 16], "moe_k": 2,
    "moe_num_shared_experts": 2, "moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1, "moe_gate": "topk", "moe_use_aux_free": True, "moe_capacity": [64, 64, 64],
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_3d": True, "freq_allocation": 20, "use_rmsnorm": True,
    "use_bias": False, "hidden_act": "silu", "tie_word_embeddings": True, "vision_config": {"depth": 1},
}  # fmt: skip


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.float().numpy()


def logits(folder):
    return np.asarray(jax.jit(load_decoder(folder))(jnp.asarray(TOKENS))[0])


def tensors_of(folder):
    return {n: a for f in folder.glob("*.safetensors") for n, a in safetensors.numpy.load_file(f).items()}


def test_both_layouts_of_tensors_and_both_kinds_of_keys_are_one_model(tmp_path):
    model = made(ERNIE, tmp_path / "published")
    model.save_pretrained(tmp_path / "held", save_original_format=False)
    names = [set(tensors_of(tmp_path / kind)) for kind in ("published", "held")]
    assert "model.layers.1.mlp.gate.weight_1" in names[0]
    assert "model.language_model.layers.1.mlp.text_moe.experts.gate_up_proj" in names[1]
    want = logits(tmp_path / "published")
    np.testing.assert_allclose(want, logits_of(model), atol=1e-4 * np.abs(want).max(), rtol=0)
    np.testing.assert_array_equal(logits(tmp_path / "held"), want)
    config = load_config(tmp_path / "published")
    flat = config_from(FLAT)
    assert dataclasses.replace(flat, family=config.family) == config
    (tmp_path / "published" / "config.json").write_text(json.dumps(FLAT))
    np.testing.assert_array_equal(logits(tmp_path / "published"), want)


def test_what_images_need_is_not_read_and_named(tmp_path):
    made(ERNIE, tmp_path)
    unread = Source(tmp_path).unread
    assert "model.layers.1.mlp.experts.6.gate_proj.weight" in unread
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" not in unread
    tops = {name.split(".")[1] for name in unread}
    assert tops == {"layers", "resampler_model", "vision_model"}
    tensors = tensors_of(tmp_path)
    tensors["model.layers.0.mlp.gate.weight"] = np.ones((32, 6), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds model\.layers\.0\.mlp\.gate\.weight"):
        Source(tmp_path)


def test_rotary_positions_of_three_axes_are_one_position_for_text():
    """Of the published sizes: the halves of a head's first 88 numbers belong to height and width, by turns."""
    config = transformers.AutoConfig.for_model(
        f"{ERNIE}_text", rope_parameters={"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]}
    )
    rotary = transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeTextRotaryEmbedding(config)
    at = torch.arange(0, 4000, 37)[None]
    cos, sin = rotary(torch.zeros(1), at[None].expand(3, -1, -1))
    (ours,) = angles(config_from(config.to_dict()), jnp.asarray(at.numpy()))
    for theirs, own in ((cos, ours.cos), (sin, ours.sin)):
        np.testing.assert_allclose(np.repeat(own, 2, axis=-1), theirs.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_num_experts": [6, 4]}, "moe_num_experts=.6, 4.: only as many of text as of images"),
        ({"moe_layer_start_index": [1, 1, 1]}, "moe_layer_start_index=.1, 1, 1.: expected two whole numbers"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size=24: expected a list of two"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act='sigmoid' is not supported"),
        ({"use_bias": True}, "use_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported; known: default"),
    ],
)
def test_keys_that_would_change_what_is_computed_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from(FLAT | changes)


@pytest.mark.parametrize("kind", [pytest.param("qwen3_vl_moe", marks=pytest.mark.slow), "mistral3"])
def test_experts_that_were_in_two_tensors_a_layer_are_so_in_an_export(tokenizer_file, kind, tmp_path):
    """Which transformers looks for alone; they are turned in Qwen3-VL's files."""
    model = made(kind, tmp_path / "hub")
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_of(tmp_path / "hub"))
    (tmp_path / "hub" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    text = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(3, 61, 200))
    settings = QuantizeConfig(
        unseen_windows=0, bits=5.8, group_size=8, channel_block=8, window=24, calibration_windows=2, batch_size=2
    )
    quantize_folder(tmp_path / "hub", tmp_path / "quantized", {"words": text}, settings)
    export(tmp_path / "quantized", tmp_path / "out")
    want = logits_of(type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval())
    np.testing.assert_allclose(logits(tmp_path / "out"), want, atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("published", [True, False])
def test_an_export_has_our_logits_in_transformers_with_and_without_the_rest(tokenizer_file, published, tmp_path):
    """With the rest of the source also the experts of images, their router and its correction are as they were."""
    model = made(ERNIE, tmp_path / "hub").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub", save_original_format=published)
    (tmp_path / "hub" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    text = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(3, 61, 200))
    settings = QuantizeConfig(
        unseen_windows=0, bits=5.8, group_size=8, channel_block=8, window=24, calibration_windows=2, batch_size=2
    )
    quantize_folder(tmp_path / "hub", tmp_path / "quantized", {"words": text}, settings)
    for out, source in (("without", None), ("with", tmp_path / "hub")):
        export(tmp_path / "quantized", tmp_path / out, source=source)
        read = type(model).from_pretrained(tmp_path / out, dtype=torch.float32).eval()
        want = logits_of(read)
        np.testing.assert_allclose(logits(tmp_path / out), want, atol=1e-4 * np.abs(want).max(), rtol=0)
    before, after = model.state_dict(), read.state_dict()
    of_images = [name for name in before if "vision" in name or "resampler" in name]
    assert len(of_images) > 20
    for name in of_images:
        np.testing.assert_array_equal(after[name].numpy(), before[name].float().numpy(), err_msg=name)
