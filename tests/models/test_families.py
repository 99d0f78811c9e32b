"""Every known family against transformers: the same logits and the same experts from the same files."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import FAMILY_MODELS

from dynamo_jax.models.families.table import FAMILIES, LINEAGES, config_from
from dynamo_jax.models.huggingface import load_config, load_decoder, parameter_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(0).integers(3, 61, (3, 20))
MASK = np.ones((3, 20), bool)
MASK[1, :6] = False  # padding before
MASK[2, 15:] = False  # and after
ROUTERS = ("topkrouter", "v1gate", "choicerouter", "textrouter")  # ends of the names of their classes


def run_theirs(model):
    """Logits and chosen experts, layer by layer."""
    chosen = []
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith(ROUTERS)]
    hooks = [m.register_forward_hook(lambda m, i, out: chosen.append(out[2].numpy())) for m in routers]
    positions = torch.tensor(np.maximum(MASK.cumsum(axis=1) - 1, 0))
    with torch.no_grad():
        out = model(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK).long(), position_ids=positions)
    for hook in hooks:
        hook.remove()
    return out.logits.numpy(), chosen


def assert_same(model, folder):
    logits, routings = load_decoder(folder)(jnp.asarray(TOKENS), jnp.asarray(MASK))
    want, chosen = run_theirs(model)
    np.testing.assert_allclose(np.asarray(logits)[MASK], want[MASK], atol=1e-4 * np.abs(want).max(), rtol=0)
    assert len(routings) == len(chosen) > 0
    for ours, theirs in zip(routings, chosen):
        seen = MASK.reshape(-1)
        np.testing.assert_array_equal(np.sort(ours.experts)[seen], np.sort(theirs.reshape(len(seen), -1))[seen])


def yarn(**more):
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                "original_max_position_embeddings": 16, **more}}  # fmt: skip


LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 2.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0], "short_mscale": 1.2, "long_mscale": 1.3,
        "original_max_position_embeddings": 32,
    }
}  # fmt: skip


def of_types(full, sliding):
    return {
        "rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": sliding["rope_parameters"]}
    }


TIED = ("mixtral", "phimoe")  # without and with a bias of the head; the others' tied head is mixtral's
OWN = list(FAMILY_MODELS)  # others are tested under another name or inside a wrapper
FIRST = {next(iter(lineage.FAMILIES)) for lineage in LINEAGES}
SLOW = [
    ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_num_shared_experts": 0, **yarn()}),
    ("hunyuan_v1_moe", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}}),
    ("mellum", {"mlp_layer_types": ["dense", "sparse", "sparse"], **of_types(yarn(), LINEAR)}),
    ("gemma4_text", {"attention_k_eq_v": False, "final_logit_softcapping": None, "layer_types": None}),
    (
        "laguna",
        {"gating": "per-element", "layer_types": None, "moe_router_logit_softcapping": 0.0, "attention_bias": True},
    ),
    ("laguna", of_types(yarn(partial_rotary_factor=0.5), LINEAR)),
    ("mimo_v2_flash", {"layer_types": None, "attention_value_scale": None, **of_types(yarn(), LINEAR)}),
    ("afmoe", {"layer_types": None, "global_attn_every_n_layers": 2, "mup_enabled": False, "attention_bias": True}),
    ("lfm2_moe", {"use_expert_bias": False, "conv_L_cache": 4, "norm_topk_prob": False}),
    ("exaone_moe", {"layer_types": None, "sliding_window_pattern": 2, "n_group": 1, "topk_group": 1}),
    ("kimi_linear", {"q_lora_rank": 12, "attention_bias": True, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    ("bailing_hybrid", {"kda_safe_gate": False, "q_lora_rank": None, "short_conv_kernel_size": 3}),
    ("bailing_hybrid", {"attention_bias": True, "kda_lower_bound": -2.0, "n_group": 1, "topk_group": 1, **yarn()}),
]
VARIETIES = [
    *(pytest.param(family, {}, marks=[] if family in FIRST else [pytest.mark.slow]) for family in OWN),
    *(
        pytest.param(family, {"tie_word_embeddings": True}, marks=[] if family in TIED else [pytest.mark.slow])
        for family in OWN
    ),
    ("glm4_moe", {"use_qk_norm": False, "partial_rotary_factor": 0.25}),
    ("minimax_m2", {"rotary_dim": None}),
    ("bailing_moe_v2", {"moe_router_enable_expert_bias": False, "use_qk_norm": False, "use_qkv_bias": False}),
    pytest.param(
        "bailing_moe_v2",
        {"num_shared_experts": 0, "first_k_dense_replace": 0, "num_experts_per_tok": 1, "head_dim": None},
        marks=pytest.mark.slow,
    ),
    pytest.param("bailing_moe_v2", yarn(partial_rotary_factor=0.5), marks=pytest.mark.slow),
    pytest.param(
        "qwen3_next",
        {"layer_types": None, "full_attention_interval": 2, "attention_bias": True, "mlp_only_layers": []},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "qwen3_5_moe_text", {"linear_num_key_heads": 4, **yarn(partial_rotary_factor=0.5)}, marks=pytest.mark.slow
    ),
    ("mixtral", {"sliding_window": None, **LLAMA3}),
    ("mixtral", LINEAR),
    ("qwen2_moe", {"use_sliding_window": False, "decoder_sparse_step": 2, "mlp_only_layers": [], **yarn()}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": False, **yarn(attention_factor=1.1)}),
    ("deepseek_v2", yarn(mscale=0.707, mscale_all_dim=0.707)),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True}),
    ("deepseek_v3", yarn(mscale=0.7, mscale_all_dim=1.0)),
    ("deepseek_v3", {"rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}, "attention_bias": False}),
    ("granitemoe", LINEAR | {"attention_bias": True}),
    ("granitemoe", LLAMA3),
    ("olmoe", LLAMA3 | {"attention_bias": True}),
    ("phimoe", LONGROPE | {"attention_bias": False, "lm_head_bias": False}),
    *(pytest.param(family, changes, marks=pytest.mark.slow) for family, changes in SLOW),
]


@pytest.mark.parametrize(
    ("family", "changes"), VARIETIES, ids=lambda v: v if isinstance(v, str) else ",".join(v) or "-"
)
def test_a_checkpoint_of_transformers_has_its_logits_and_experts_here(family_model, family, changes, tmp_path):
    model = family_model(family, **changes)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    assert_same(model, tmp_path)


def test_the_smallest_models_still_have_every_part(families):
    """The parity above would say nothing about a window that no sequence outgrows or a family left out."""
    wrapped = {"qwen3_vl_moe_text", "glm4v_moe_text", "minimax_m3_vl_text", "step3p5", "ernie4_5_vl_moe_text"}
    renamed = {"kimi_k2", "ernie4_5_moe_vl", "bailing_moe"}  # tested under another name
    assert set(families) | wrapped | renamed == set(FAMILIES)


def to_mxfp4(weight):
    """(rows, columns) floats to blocks and scales, as published gpt-oss files have them; some values of each code."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(axis=-1))).astype(int) - 2
    scaled = groups / np.exp2(exponent)[..., None]
    codes = np.abs(scaled[..., None] - table).argmin(axis=-1).astype(np.uint8)
    blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
    value = table[codes] * np.exp2(exponent)[..., None]
    return blocks, (exponent + 127).astype(np.uint8), value.reshape(weight.shape).astype(np.float32)


def test_gpt_oss_in_mxfp4_has_the_logits_of_its_dequantized_weights(family_model, tmp_path):
    model = family_model("gpt_oss", hidden_size=32, intermediate_size=64)
    model.save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, value = to_mxfp4(np.ascontiguousarray(tensors.pop(name).swapaxes(1, 2)))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        state[name].copy_(torch.tensor(value.swapaxes(1, 2)))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(model, tmp_path)
    read = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    np.testing.assert_allclose(run_theirs(read)[0], run_theirs(model)[0], atol=1e-5)


def test_the_older_keys_of_rotary_scaling_mean_the_same(family_model, tmp_path):
    family_model("qwen3_moe", **yarn()).save_pretrained(tmp_path)
    new = load_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    old = raw | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    assert config_from(old) == new


def test_kimi_k2_is_deepseek_v3_by_another_name(family_model, tmp_path):
    model = family_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same(model, tmp_path)


def test_published_keys_of_step_mean_what_transformers_makes_of_them():
    older = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "head_dim": 8,
        "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "sliding_window": 7,
        "moe_num_experts": 6, "moe_top_k": 2, "num_attention_heads": 4, "num_attention_groups": 2,
        "share_expert_dims": 20, "moe_layers_enum": "1,2,3", "swiglu_limits": [0.0, 0.0, 7.0, 7.0],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6},
        "rope_theta": [5e6, 10000.0, 10000.0, 5e6], "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
        "rope_scaling": LLAMA3["rope_parameters"] | {"rope_theta": 5e6},
    }  # fmt: skip
    newer = transformers.AutoConfig.for_model("step3p5", **older).to_dict()
    config = config_from(older | {"model_type": "step3p5"})
    assert config == config_from(newer)
    assert [layer.mixer.rope.dim for layer in config.layers] == [4, 8, 8]
    assert [getattr(layer.channel, "swiglu_clamp", None) for layer in config.layers] == [0.0, 0.0, 7.0]


def test_published_keys_of_kimi_linear_mean_what_transformers_makes_of_them():
    older = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "head_dim": 72,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_token": 2, "num_shared_experts": 1, "num_expert_group": 1, "topk_group": 1,
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "model_max_length": 64, "moe_renormalize": True, "first_k_dense_replace": 1,
        "mla_use_nope": True, "moe_router_activation_func": "sigmoid",
        "linear_attn_config": {
            "full_attn_layers": [4], "kda_layers": [1, 2, 3, 5], "head_dim": 8, "num_heads": 2,
            "short_conv_kernel_size": 3,
        },
    }  # fmt: skip
    config = config_from(older | {"model_type": "kimi_linear"})
    assert config == config_from(transformers.AutoConfig.for_model("kimi_linear", **older).to_dict())
    assert [type(layer.mixer).__name__ for layer in config.layers] == [*["KimiDelta"] * 3, "Latent", "KimiDelta"]
    for wrong, message in (
        ({"mla_use_nope": False}, "mla_use_nope=False is not supported; only True"),
        ({"linear_attn_config": 7}, "linear_attn_config=7: expected an object"),
        (
            {"moe_renormalize": False, "norm_topk_prob": True},
            "moe_renormalize=False and norm_topk_prob=True contradict",
        ),
        (
            {"linear_attn_config": older["linear_attn_config"] | {"kda_layers": [1, 2, 3]}},
            r"\[4\], \[1, 2, 3\], do not name each of 5 layers once",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config_from(older | {"model_type": "kimi_linear"} | wrong)


RING = {
    "vocab_size": 157184, "hidden_size": 8192, "intermediate_size": 18432, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_experts": 256,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 4, "num_shared_experts": 1,
    "max_position_embeddings": 65536, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "architectures": ["BailingMoeV2ForCausalLM"],
}  # fmt: skip


def test_rings_model_types_and_names_of_the_turned_part_mean_the_same():
    """Published files say ``bailing_moe``, and a share of a head or, in the largest, a size."""
    half = config_from(RING | {"model_type": "bailing_moe_v2", "partial_rotary_factor": 0.5})
    assert half.layers[0].mixer.rope.dim == 64
    for keys in ({"rotary_dim": 64}, {"rotary_dim": 64, "partial_rotary_factor": 0.5}):
        other = config_from(RING | {"model_type": "bailing_moe", **keys})
        assert dataclasses.replace(other, family=half.family) == half
    with pytest.raises(ValueError, match="rotary_dim=32 and partial_rotary_factor contradict each other"):
        config_from(RING | {"model_type": "bailing_moe", "rotary_dim": 32, "partial_rotary_factor": 0.5})
    narrower = config_from(RING | {"model_type": "bailing_moe", "moe_shared_expert_intermediate_size": 512})
    assert narrower.mixture.shared_intermediate_size == 512


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["BailingMoeForCausalLM"]}, {"use_bias": True}, {"norm_head": True},
        {"score_function": "softmax"}, {"norm_topk_prob": False}, {"use_rmsnorm": False}, {"use_sliding_window": True},
    ],
    ids=str,
)  # fmt: skip
def test_keys_of_ring_that_change_what_is_computed_are_refused(changes):
    (key,) = changes
    with pytest.raises(ValueError, match=f"^{key}=.* is not supported for bailing_moe"):
        config_from(RING | {"model_type": "bailing_moe"} | changes)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("use_qkv_bias", "attention.query_key_value.bias"), ("use_qk_norm", "attention.key_layernorm.weight"),
        ("moe_router_enable_expert_bias", "mlp.gate.expert_bias"),
    ],
)  # fmt: skip
def test_tensors_of_ring_that_its_keys_do_not_ask_for_are_errors(family_model, key, name, tmp_path):
    family_model("bailing_moe_v2").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {key: False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"holds model\.layers\.\d\.{name}, which config.json .*{key}"):
        load_decoder(tmp_path)


REFUSED = {
    "unknown model_type 'gpt2'; known: mixtral, olmoe, qwen2_moe": {"model_type": "gpt2"},
    "hidden_act 'gelu' is not supported": {"model_type": "mixtral", "hidden_act": "gelu"},
    "missing key vocab_size": {"model_type": "mixtral"},
    "rope_type 'dynamic' is not supported": {"model_type": "mixtral", "rope_scaling": {"type": "dynamic"}},
    "partial_rotary_factor is not supported": {"model_type": "mixtral", "partial_rotary_factor": 0.5},
    "expected an object for each type of layer": {"model_type": "laguna", "rope_parameters": {"rope_theta": 5.0}},
    "rotary parameters of their own for full_attention": {
        "model_type": "mixtral", "rope_parameters": {"full_attention": {}},
    },
    "moe_layers_enum=5: expected the sparse layers": {
        "model_type": "step3p5", "num_hidden_layers": 3, "moe_layers_enum": 5,
    },
    "kda_lower_bound=0: expected": {
        "model_type": "bailing_hybrid", "kda_lower_bound": 0, "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2,
        "max_position_embeddings": 8, "num_experts": 4, "num_attention_heads": 2,
    },
    "topk_method 'noaux' is not supported": {
        "model_type": "deepseek_v2", "topk_method": "noaux", "vocab_size": 8, "hidden_size": 8,
        "max_position_embeddings": 8, "n_routed_experts": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_decoder_cannot_compute_is_refused(message):
    with pytest.raises(ValueError, match=message):
        config_from(REFUSED[message])


def published(family, billions, experts, **raw):
    return pytest.param({"model_type": family, **raw}, billions, experts, id=f"{family}, {billions} billion")


PUBLISHED = [
    published(
        "mixtral", 46.7, (32, 8), vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=32768, rope_theta=1e6, sliding_window=None,
    ),
    published(
        "olmoe", 6.92, (16, 64), vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        max_position_embeddings=4096, rope_scaling=None, clip_qkv=None,
    ),
    published(
        "qwen2_moe", 14.3, (24, 60), vocab_size=151936, hidden_size=2048, intermediate_size=5632,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        max_position_embeddings=8192, use_sliding_window=False, sliding_window=32768, max_window_layers=21,
    ),
    published(
        "qwen3_moe", 30.5, (48, 128), vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, max_position_embeddings=40960, norm_topk_prob=True,
    ),
    published(
        "qwen3_next", 79.67, (48, 512), vocab_size=151936, hidden_size=2048, intermediate_size=5120,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, num_hidden_layers=48, num_attention_heads=16,
        num_experts=512, num_experts_per_tok=10, max_position_embeddings=262144, rope_theta=1e7,
        partial_rotary_factor=0.25,
    ),
    published(
        "qwen3_5_moe_text", 34.66, (40, 256), vocab_size=248320, hidden_size=2048, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, num_hidden_layers=40, num_attention_heads=16, num_experts=256,
        num_experts_per_tok=8, max_position_embeddings=262144, attn_output_gate=True, mtp_num_hidden_layers=1,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
    ),
    published(
        "deepseek_v2", 15.7, (26, 64), vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy", n_group=1, topk_group=1,
        max_position_embeddings=163840, rope_theta=10000,
        rope_scaling={
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    published(
        "deepseek_v3", 671, (58, 256), vocab_size=129280, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, max_position_embeddings=163840,
    ),
    published(
        "kimi_linear", 49.1, (26, 256), vocab_size=163840, hidden_size=2304, intermediate_size=9216,
        moe_intermediate_size=1024, num_hidden_layers=27, num_attention_heads=32, num_key_value_heads=32, head_dim=72,
        num_experts=256, num_experts_per_token=8, num_shared_experts=1, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, model_max_length=1048576, first_k_dense_replace=1,
    ),
    published(
        "bailing_hybrid", 124, (40, 512), vocab_size=157184, hidden_size=2560, intermediate_size=6144,
        moe_intermediate_size=768, num_hidden_layers=42, num_attention_heads=32, num_experts=512,
        num_experts_per_tok=8, num_shared_experts=1, max_position_embeddings=262144,
    ),
    published(
        "gpt_oss", 20.9, (24, 32), vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        max_position_embeddings=131072, rope_theta=150000,
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
    ),
    published(
        "granitemoe", 1.33, (24, 32), vocab_size=49155, hidden_size=1024, intermediate_size=512, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=8,
        max_position_embeddings=4096, tie_word_embeddings=True, attention_multiplier=0.015625,
    ),
    published(
        "phimoe", 41.9, (32, 16), vocab_size=32064, hidden_size=4096, intermediate_size=6400, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2,
        max_position_embeddings=131072, attention_bias=True, lm_head_bias=True,
        rope_scaling={
            "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "short_mscale": 1.243,
            "long_mscale": 1.243, "original_max_position_embeddings": 4096,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "billions", "experts"), PUBLISHED)
def test_published_models_have_their_published_sizes(raw, billions, experts):
    """From the sizes in their config.json, without a weight."""
    config = config_from(raw)
    total = sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()) + config.num_expert_weights
    assert total / 1e9 == pytest.approx(billions, rel=4e-3)
    assert (config.num_moe_layers, config.num_experts) == experts
