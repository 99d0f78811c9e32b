"""Hugging Face checkpoints: the same logits as transformers, in both directions, and errors that name the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import decoder_config

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.families.names import expert_names
from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.formats.expert_files import expert_shapes
from dynamo_jax.models.formats.tensor_files import write_tensors
from dynamo_jax.models.huggingface import (
    load_config,
    load_decoder,
    parameter_shapes,
    save_checkpoint,
    side_files,
    tensor_names,
)
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.storage.bundles import read_bundle

pytestmark = pytest.mark.usefixtures("quick_compilation")

SENTENCES = [
    "The kernel allocates a page for each buffer, and frees it when the last reader is gone.",
    "Im Anfang war das Wort, und das Wort war bei Gott; 12 + 30 = 42.",
]


def reference_logits(folder, tokens):
    model = transformers.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(tokens)), output_router_logits=True)
    return out.logits.numpy(), [r.numpy() for r in out.router_logits]


def assert_same(folder, tokens):
    model = load_decoder(folder)
    logits, routings = model(jnp.asarray(tokens))
    want, router = reference_logits(folder, tokens)
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    for ours, theirs in zip(routings, router):
        k = ours.experts.shape[1]
        np.testing.assert_array_equal(np.sort(ours.experts), np.sort(np.argsort(-theirs, axis=1, kind="stable")[:, :k]))


def test_the_bundled_model_has_the_logits_of_transformers():
    tokenizer = load_tokenizer(BUNDLED)
    ids = [tokenizer.encode(s).ids for s in SENTENCES]
    length = min(map(len, ids))
    assert_same(BUNDLED, np.array([i[:length] for i in ids]))


VARIETIES = {
    "tied, normalized": {"tie_word_embeddings": True, "norm_topk_prob": True},
    "untied, as in OLMoE-1B-7B": {"tie_word_embeddings": False, "norm_topk_prob": False},
    "all heads have keys": {"num_key_value_heads": 4},
    "clipped, other theta": {"clip_qkv": 0.05, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "every expert": {"num_experts_per_tok": 6},
}


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_model_that_transformers_saved_has_its_logits_here(variety, tmp_path):
    torch.manual_seed(0)
    values = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    config = transformers.OlmoeConfig(**{**values, **VARIETIES[variety]})
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    assert_same(tmp_path, np.random.default_rng(0).integers(0, 61, (2, 40)))


SMALL = decoder_config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    initializer_range=0.2,
)


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path, Decoder(SMALL, rngs=nnx.Rngs(0)), BUNDLED / "tokenizer.json", dtype=np.float32)
    return tmp_path


def test_a_model_that_we_saved_has_its_logits_in_transformers(saved):
    assert_same(saved, np.random.default_rng(1).integers(0, 61, (2, 20)))


def test_transformers_misses_no_weight_and_finds_none_too_many(saved):
    _, info = transformers.OlmoeForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] - {"lm_head.weight"} and not info["unexpected_keys"]


def damage_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "family": (lambda f: damage_config(f, model_type="gpt2"), "config.json: unknown model_type 'gpt2'; known: mixtral"),
    "rotary scaling": (lambda f: damage_config(f, rope_scaling={"type": "dynamic"}), "rope_type 'dynamic'"),
    "attention bias": (
        lambda f: damage_config(f, attention_bias=True),
        "missing, the first is model.layers.0.self_attn",
    ),
    "value": (lambda f: damage_config(f, num_hidden_layers="2"), "num_hidden_layers='2': expected a positive whole"),
    "quantized": (
        lambda f: damage_config(f, quantization_config={"quant_method": "quanto"}),
        r"weights quantized by quanto are not read; known: fp8",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "model.safetensors: damaged or truncated"),
    "no layer": (lambda f: damage_config(f, num_hidden_layers=3), "tensors missing, the first is model.layers.2"),
    "shape": (lambda f: damage_config(f, intermediate_size=8), "config.json asks for"),
}


def rewrite(folder, change):
    """Pass the tensors of the folder's one file through ``change``."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def shard(folder, places):
    """An index, and the folder's one file under the shard's name."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = safetensors.numpy.load_file(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors") | places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def not_a_number(tensors):
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = np.nan


def whole_numbers(tensors):
    tensors["model.layers.1.mlp.gate.weight"] = np.zeros((4, 32), np.int32)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES |= {
    "missing shard": (lambda f: shard(f, {"x": "b.safetensors"}), r"b\.safetensors: no such file"),
    "tensor not in its shard": (
        lambda f: shard(f, {"model.x": "a.safetensors"}),
        r"a\.safetensors: holds no tensor model\.x, which .*index\.json places there",
    ),
    "index of nothing": (index_of_nothing, "index.json: weight_map"),
    "index outside": (lambda f: shard(f, {"x": "../secret.safetensors"}), "index.json: weight_map"),
    "shape in words": (
        lambda f: damage_config(f, intermediate_size=8),
        r"model\.safetensors: model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight is \(16, 32\), config",
    ),
    "NaN": (
        lambda f: rewrite(f, not_a_number),
        r"model\.safetensors: model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight holds NaN",
    ),
    "integers": (lambda f: rewrite(f, whole_numbers), r"model\.layers\.1\.mlp\.gate\.weight is I32, expected a float"),
    "pickle": (pickled, r"pytorch_model\.bin: a pickle can run any code when it is read"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_an_error_that_names_the_file(saved, case):
    change, message = DAMAGES[case]
    change(saved)
    with pytest.raises(ValueError, match=message):
        load_decoder(saved)


def test_a_hundred_gigabytes_are_described_from_headers_alone(tmp_path):
    """OLMoE-1B-7B's shapes with more layers and experts; holes in the files in place of the weights."""
    raw = {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 60, "num_attention_heads": 16, "num_experts": 128, "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    config = config_from(raw)
    shapes = parameter_shapes(config)
    named = {theirs: filed.shape(shapes[ours]) for ours, theirs, filed in tensor_names(config)}
    for layer in config.moe_layers:
        named |= expert_shapes(config, expert_names(config, layer))
    places = {}
    for number in range(60):
        header, offset = {}, 0
        for name in list(named)[number::60]:
            size = 2 * int(np.prod(named[name]))
            header[name] = {"dtype": "BF16", "shape": named[name], "data_offsets": [offset, offset + size]}
            places[name], offset = f"{number}.safetensors", offset + size
        text = json.dumps(header).encode()
        with open(tmp_path / f"{number}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    command = [sys.executable, "-m", "dynamo_jax", "inspect", "--model", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    size = int(next(line for line in out.splitlines() if line.startswith("bytes")).split()[1].replace(",", ""))
    assert size > 95e9 and "60 layers x 128, top 8" in out and "23,040 expert tensors" in out


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_the_bundled_tokenizer_returns_any_text(text):
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.replace("<|endoftext|>", "")


def test_the_bundled_model_is_what_its_card_promises():
    config = load_config(BUNDLED)
    assert config.num_experts >= 16 and config.num_experts_per_tok >= 2 and 4 <= config.num_hidden_layers <= 8
    assert (BUNDLED / "model.safetensors").stat().st_size <= 40_000_000
    tensors = safetensors.numpy.load_file(BUNDLED / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"bfloat16"}
    assert config.vocab_size == load_tokenizer(BUNDLED).get_vocab_size()
    card = (BUNDLED / "README.md").read_text()
    assert "bits per byte" in card and "xz" in card


@pytest.mark.parametrize(("name", "taken"), [("tool use", True), ("Größe", True), ("a\nb", False), ("a\\b", False)])
def test_templates_have_names_that_a_result_can_hold(tmp_path, name, taken):
    path = tmp_path / "additional_chat_templates" / f"{name}.jinja"
    path.parent.mkdir()
    path.write_text("{{ messages }}")
    if taken:
        assert list(side_files(tmp_path)) == [f"additional_chat_templates/{name}.jinja"]
    else:
        with pytest.raises(ValueError, match="a name with a backslash or signs that cannot be printed"):
            side_files(tmp_path)


@pytest.mark.slow
def test_experts_of_several_dtypes_are_read_as_float32(small_folder, tmp_path):
    """Where one projection of one expert is float16 in a bfloat16 file."""
    folder = tmp_path / "mixed"
    shutil.copytree(small_folder, folder)
    tensors = read_bundle(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    write_tensors(folder / "model.safetensors", tensors)
    tokens = jnp.arange(3, 23).reshape(1, 20)
    logits = [jax.jit(load_decoder(f))(tokens)[0] for f in (small_folder, folder)]
    np.testing.assert_allclose(*logits, atol=1e-3 * np.abs(logits[0]).max(), rtol=0)
    small = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=32, bits=3.5, quantizer="rtn")
    quantize_folder(folder, tmp_path / "out", {"words": " ".join(f"w{3 + i % 50}" for i in range(200))}, small)
