"""Continuations that share a context are as likely as by themselves."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import SIZES, decoder_config

from dynamo_jax.evaluation.contexts import scored
from dynamo_jax.evaluation.likelihood import Pair, likelihoods
from dynamo_jax.models.decoder import Decoder, parameters
from dynamo_jax.models.stacked import stacked
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.generate import LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compilation")

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DELTA = {
    "delta_layers": (0,),
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CASES = {
    "grouped": SIZES | {"windows": (0, 5), "attention_sinks": True},
    "latent": SIZES | LATENT,
    "a delta net": SIZES | DELTA,
}


def questions(vocabulary, limit, seed=0):
    """Contexts and answers, lengths from one token to all positions."""
    rng = np.random.default_rng(seed)
    lengths = [(1, (1, 7, 2)), (9, (1, 1)), (limit - 3, (4, 1)), (5, (2,))]
    return [
        Pair(context, rng.integers(0, vocabulary, length).tolist())
        for size, answers in lengths
        for context in [rng.integers(0, vocabulary, size).tolist()]
        for length in answers
    ]


def one_by_one(model, asked):
    return [likelihoods(model, [pair], together=1)[0] for pair in asked]


def compare(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.nats == pytest.approx(other.nats, abs=1e-4) and one[1:] == other[1:]


@pytest.mark.parametrize(
    ("case", "in_loops"),
    [("grouped", True), pytest.param("latent", False, marks=pytest.mark.slow), ("a delta net", False)],
)
def test_they_are_as_likely_as_by_themselves(case, in_loops):
    decoder = Decoder(decoder_config(**CASES[case]), rngs=nnx.Rngs(0))
    config = decoder.config
    model = LanguageModel(config=config, parameters=parameters(decoder))
    asked = questions(config.vocab_size, config.max_position_embeddings)
    (logits,), _ = decoder(jnp.asarray([asked[0].context]))
    asked.append(Pair(asked[0].context, [int(logits[-1].argmax())]))
    expected = one_by_one(model, asked)
    assert expected[-1].greedy and not expected[0].greedy
    if in_loops:
        model = dataclasses.replace(model, parameters=stacked(config, model.parameters))
    compare(likelihoods(model, asked, together=40), expected)


def test_a_quantized_model_is_asked_the_same_way(quantized):
    _, state = serving.init(quantized, 1)
    held = quantized.device_parameters(jnp.float32)
    model = LanguageModel(config=quantized.config, parameters=held, state=state)
    asked = questions(1000, 60)
    compare(likelihoods(model, asked, together=256), one_by_one(model, asked))


def test_a_context_runs_once(monkeypatch):
    """So do contexts that must be cut, or stand alone, by the other way."""
    decoder = Decoder(decoder_config(**SIZES), rngs=nnx.Rngs(0))
    model = LanguageModel(config=decoder.config, parameters=parameters(decoder))
    given = []

    def watched(model, groups, together):
        given.extend(groups)
        return scored(model, groups, together)

    monkeypatch.setattr("dynamo_jax.evaluation.likelihood.scored", watched)
    long = list(range(32))
    asked = [
        Pair([1, 2], [3]),
        Pair([1, 2], [4, 5]),
        Pair([7], [8]),
        Pair(long, [1]),
        Pair(long, [2, 3]),
        Pair(long, [2]),
    ]
    found = likelihoods(model, asked)
    assert [(g.context, g.continuations) for g in given] == [([1, 2], [[3], [4, 5]]), (long, [[1], [2]])]
    assert [one.cut for one in found] == [0, 0, 0, 0, 1, 0]


def test_nothing_compiles_once_each_length_was_met(compilations):
    decoder = Decoder(decoder_config(**SIZES), rngs=nnx.Rngs(0))
    model = LanguageModel(config=decoder.config, parameters=parameters(decoder))
    likelihoods(model, questions(50, 32), together=256)
    with compilations() as count:
        likelihoods(model, questions(50, 32, seed=1), together=256)
    assert count.compiled == 0
