"""A head of its own that config.json denies goes through quantization and export."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize_folder
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.export import export

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = QuantizeConfig(
    unseen_windows=0,
    bits=5.8,
    group_size=8,
    channel_block=8,
    window=24,
    calibration_windows=2,
    batch_size=2,
    quantizer="rtn",
)


def test_a_head_that_differs_from_tied_embeddings_is_quantized_with_and_exported(
    family_model, tokenizer_file, words, tmp_path
):
    hub = tmp_path / "hub"
    family_model("olmoe", num_hidden_layers=1, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(hub)
    (hub / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    tensors = safetensors.numpy.load_file(hub / "model.safetensors")
    head = tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})
    quantize_folder(hub, tmp_path / "quantized", {"words": words(0)}, SETTINGS)
    quantized = checkpoint.load(tmp_path / "quantized")
    assert not quantized.config.tie_word_embeddings
    export(tmp_path / "quantized", tmp_path / "out")
    model = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), head.astype(np.float32))
