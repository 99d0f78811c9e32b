"""Models whose weights another tool packed have the logits of what these weights mean; experts lie as they may lie."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import stored
import torch

from dynamo_jax.models.decoder import parameters, with_parameters
from dynamo_jax.models.huggingface import Source, describe, load_decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 12))
MODELS = {
    "qwen3_moe": {"hidden_size": 96, "intermediate_size": 64, "moe_intermediate_size": 64, "num_experts": 4},
    "deepseek_v3": {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 2},
    "bailing_moe_v2": {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "n_group": 2},
}


@pytest.fixture(scope="module")
def model_folders(family_model, tmp_path_factory):
    """bfloat16 models of few layers, one a family."""
    folders = {}
    for family, changes in MODELS.items():
        folders[family] = tmp_path_factory.mktemp(family)
        model = family_model(family, num_hidden_layers=2, **changes).to(torch.bfloat16)
        model.save_pretrained(folders[family])
    return folders


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewritten(folder, out, tensors, **config):
    """The folder with other tensors, and more in its config.json."""
    out.mkdir()
    stored.write_file(out / "model.safetensors", tensors)
    raw = json.loads((folder / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(raw))
    return out


def packed_folders(folder, tmp_path, make, config, wanted=r"self_attn.*_proj\.weight|mlp\..*_proj\.weight"):
    """A model with its projections packed, and the same with the values that these mean, in bfloat16."""
    as_packed, as_values = {}, {}
    for name, array in tensors_of(folder).items():
        if re.search(wanted, name):
            made = make(array.astype(np.float32))
            as_packed |= {name.removesuffix("weight") + leaf: a for leaf, a in made.tensors.items()}
            as_values[name] = made.value
        else:
            as_packed[name] = as_values[name] = array
    assert len(as_values) < len(as_packed)
    one = rewritten(folder, tmp_path / "packed", as_packed, quantization_config=config)
    return one, rewritten(folder, tmp_path / "values", as_values)


RUNS = {}


def logits(folder):
    """Compiled once for each configuration."""
    model = load_decoder(folder)
    if model.config not in RUNS:
        config = model.config
        RUNS[config] = jax.jit(lambda arrays: with_parameters(config, arrays)(jnp.asarray(TOKENS))[0])
    return np.asarray(RUNS[model.config](parameters(model)))


def assert_alike(one, other):
    got, want = logits(one), logits(other)
    assert np.isfinite(want).all() and want.std() > 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", stored.FORMATS)
def test_a_packed_model_has_the_logits_of_its_values(name, model_folders, tmp_path):
    fmt = stored.FORMATS[name]
    packed, values = packed_folders(model_folders["qwen3_moe"], tmp_path, fmt.make, fmt.config)
    assert_alike(packed, values)
    assert describe(packed)["source"].startswith(f"experts: {fmt.words}, ")
    assert describe(values)["source"] == "experts: bfloat16, 16.00 bits a weight"
    assert Source(packed).other_bytes() == Source(values).other_bytes(), "the rest is floats when it is held"


def test_deepseek_in_fp8_has_the_logits_of_its_values(model_folders, tmp_path):
    """As published, but for the size of blocks; one of a layer's projections has blocks that do not fill it."""
    config = stored.FP8 | {"weight_block_size": [16, 16], "scale_fmt": "float", "fmt": "e4m3"}
    packed, values = packed_folders(
        model_folders["deepseek_v3"], tmp_path, lambda w: stored.fp8(w, (16, 16)), config, r"_proj(_with_mqa)?\.weight"
    )
    assert "FP8 in blocks of 16 x 16" in describe(packed)["source"]
    assert_alike(packed, values)


def test_ring_in_fp8_has_the_logits_of_its_values(model_folders, tmp_path):
    """Queries, keys and values are one matrix of 128 rows, and no block ends where the queries do."""
    packed, values = packed_folders(
        *(model_folders["bailing_moe_v2"], tmp_path, lambda w: stored.fp8(w, (24, 20))),
        stored.FP8 | {"weight_block_size": [24, 20]},
        r"_proj\.weight|\.(query_key_value|dense)\.weight",
    )
    assert "model.layers.0.attention.query_key_value.weight" in Source(packed).files.packed
    assert "FP8 in blocks of 24 x 20" in describe(packed)["source"]
    assert_alike(packed, values)


def fused(tensors, turned=(False, False)):
    """All experts of a layer in two tensors, as transformers 5 has them, or turned as in Qwen3-VL's files."""
    out = dict(tensors)
    prefixes = sorted({name.split("experts.")[0] + "experts." for name in tensors if ".experts." in name})
    for prefix in prefixes:
        experts = len({name.split(".")[5] for name in tensors if name.startswith(prefix)})
        parts = {
            part: np.stack([out.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(experts)])
            for part in ("gate", "up", "down")
        }
        both = np.concatenate([parts["gate"], parts["up"]], axis=1)
        for name, array, turn in (("gate_up_proj", both, turned[0]), ("down_proj", parts["down"], turned[1])):
            out[prefix + name] = np.ascontiguousarray(array.swapaxes(1, 2)) if turn else array
    return out


@pytest.mark.parametrize("turned", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_experts_may_be_fused(turned, model_folders, tmp_path):
    folder = model_folders["qwen3_moe"]
    one = rewritten(folder, tmp_path / "fused", fused(tensors_of(folder), turned))
    assert Source(one).expert_bytes() == Source(folder).expert_bytes() and not Source(one).unread
    assert_alike(one, folder)


@pytest.mark.parametrize("channels", [48, 96], ids=["gate and up are square", "down is square"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_square_tensor_is_turned_if_the_other_one_is(family_model, turned, channels, tmp_path):
    own = MODELS["qwen3_moe"] | {"moe_intermediate_size": channels}
    family_model("qwen3_moe", num_hidden_layers=2, **own).to(torch.bfloat16).save_pretrained(tmp_path / "split")
    one = rewritten(tmp_path / "split", tmp_path / "fused", fused(tensors_of(tmp_path / "split"), (turned, turned)))
    for ours, theirs in zip(Source(one).expert(1, 2), Source(tmp_path / "split").expert(1, 2)):
        np.testing.assert_array_equal(ours, theirs)


def test_fused_experts_in_fp8_have_the_logits_of_their_values(model_folders, tmp_path):
    """Mistral-Small-4's kind: a scale for each expert, and one of activations that is dropped."""
    folder = model_folders["qwen3_moe"]
    as_packed, as_values = {}, {}
    for name, array in fused(tensors_of(folder)).items():
        as_packed[name] = as_values[name] = array
        if ".experts." in name:
            made = [stored.fp8_tensor(w.astype(np.float32), "weight_scale_inv") for w in array]
            as_packed[name] = np.stack([m.tensors["weight"] for m in made])
            as_packed[f"{name}_scale_inv"] = np.stack([m.tensors["weight_scale_inv"] for m in made])
            as_packed[f"{name}_activation_scale"] = np.float32(0.5).reshape(())
            as_values[name] = np.stack([m.value for m in made])
    config = stored.FP8 | {"activation_scheme": "static", "weight_block_size": None}
    packed = rewritten(folder, tmp_path / "packed", as_packed, quantization_config=config)
    assert_alike(packed, rewritten(folder, tmp_path / "values", as_values))
    assert describe(packed)["not read"].startswith("0 tensors")


def test_what_is_not_read_is_counted_by_the_first_part_of_its_name(model_folders, tmp_path):
    folder = model_folders["qwen3_moe"]
    more = ["mtp.fc.weight", "mtp.norm.weight", "model.visual.blocks.0.x", "model.layers.2.eh_proj.weight", "x"]
    one = rewritten(folder, tmp_path / "more", tensors_of(folder) | {n: np.ones(3, np.float32) for n in more})
    want = "5 tensors that the decoder has no use for (mtp: 2, model.layers.2: 1, model.visual: 1, x: 1)"
    assert describe(one)["not read"] == want


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_experts_in_other_floats_are_read_as_they_are(dtype, model_folders, tmp_path):
    folder = model_folders["qwen3_moe"]
    tensors = {name: a.astype(dtype) for name, a in tensors_of(folder).items()}
    source = Source(rewritten(folder, tmp_path / "other", tensors))
    assert all(part.dtype == dtype for part in source.expert(1, 1))
    assert source.expert_format() == np.dtype(dtype).name
