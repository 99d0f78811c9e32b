"""The short convolution: biases, and pieces of a text behind a cache with padding wherever it is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax.models.attention import Places
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.mixers import short_conv
from dynamo_jax.models.specs import ShortConv

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = ShortConv(channels=8, conv_L_cache=4, conv_bias=True)


@pytest.fixture(scope="module")
def mixer():
    sizes = {"vocab_size": 9, "num_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}
    config = decoder_config(hidden_size=8, initializer_range=0.5, **sizes, **heads)
    found = short_conv.ShortConvolution(config, SPEC, rngs=nnx.Rngs(0))
    for bias in (found.in_bias, found.conv_bias, found.out_bias):
        bias[...] = jnp.linspace(-1, 1, bias[...].size)
    return found


def places(mask):
    return Places(jnp.zeros(mask.shape, jnp.int32), jnp.zeros(mask.shape, jnp.int32), (), jnp.int32(0), mask)


def test_pieces_behind_a_cache_are_the_whole_whatever_is_padding(mixer):
    rng = np.random.default_rng(0)
    text = rng.normal(size=(2, 9, 8)).astype(np.float32)
    whole, none = mixer(jnp.asarray(text), places(jnp.ones((2, 9), bool)), None)
    assert none is None
    cache = short_conv.empty_cache(SPEC, 2, 0, jnp.float32)
    masks = [np.array(m, bool) for m in ([[0, 1, 1, 0], [1, 1, 1, 0]], [[1], [0]], [[1, 0, 1, 1], [1, 1, 0, 1]])]
    seen, at = [[], []], [0, 0]
    for mask in masks:
        piece = np.full((*mask.shape, 8), 7.0, np.float32)
        for row in range(2):
            count = mask[row].sum()
            piece[row, mask[row]] = text[row, at[row] : at[row] + count]
            at[row] += count
        out, cache = mixer(jnp.asarray(piece), places(jnp.asarray(mask)), cache)
        for row in range(2):
            seen[row].extend(np.asarray(out)[row, mask[row]])
    assert at == [6, 6]
    for row in range(2):
        np.testing.assert_allclose(seen[row], whole[row, :6], atol=1e-5)


def test_biases_are_those_of_transformers(family_model, tmp_path):
    """Without padding, to which transformers 5.24 adds the biases, so that a text would depend on its batch."""
    model = family_model("lfm2_moe", conv_bias=True)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 61, (2, 12))
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    got = load_decoder(tmp_path)(jnp.asarray(tokens))[0]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)
