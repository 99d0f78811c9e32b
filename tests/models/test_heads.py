"""A head that config.json ties to the embeddings, and that is in the files all the same."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from dynamo_jax.models import huggingface
from dynamo_jax.models.huggingface import Source, load_config, load_decoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 12))
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(family_model, tmp_path):
    family_model("mixtral", num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def add_head(folder, change):
    """The embeddings, changed, as a head beside them."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[HEAD] = change(tensors[EMBED].copy())
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reference(folder):
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def last_row_negated(embed):
    embed[-1] = -embed[-1]
    return embed


@pytest.mark.parametrize("compared", [1, 100, 10**9])  # numbers at a time: a row, three rows, all
def test_a_head_that_differs_is_the_models_head(folder, monkeypatch, compared):
    monkeypatch.setattr(huggingface, "COMPARED", compared)
    before = reference(folder)
    add_head(folder, last_row_negated)
    want = reference(folder)
    assert np.abs(want - before).max() > 0.1
    decoder = load_decoder(folder)
    assert load_config(folder).tie_word_embeddings and not decoder.config.tie_word_embeddings
    logits = decoder(jnp.asarray(TOKENS))[0]
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max(), rtol=0)
    assert not Source(folder).unread


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_head_of_the_same_values_is_the_embeddings(folder, dtype):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[EMBED] = tensors[EMBED].astype(np.float16).astype(np.float32)  # so that float16 holds the same values
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_head(folder, lambda embed: embed.astype(dtype))
    source = Source(folder)
    assert source.config.tie_word_embeddings and source.unread == [HEAD]


def test_a_head_of_another_shape_is_named(folder):
    add_head(folder, lambda embed: embed[:60])
    with pytest.raises(
        ValueError, match=r"model\.safetensors: lm_head\.weight is \(60, 32\) in F32, config\.json asks"
    ):
        Source(folder)


def test_an_untied_head_must_be_there(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"model\.safetensors: 1 tensors missing, the first is lm_head\.weight"):
        Source(folder)
