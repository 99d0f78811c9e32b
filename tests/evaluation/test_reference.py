"""How far predictions are from a reference's: in memory, layer by layer, and from a file."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax.evaluation import reference as module
from dynamo_jax.evaluation.evaluate import evaluate
from dynamo_jax.evaluation.perplexity import EvalConfig
from dynamo_jax.evaluation.reference import Apart, divergences, exact_states, likeliest, read_references
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.experts import piece_counts
from dynamo_jax.models.huggingface import Source
from dynamo_jax.models.loss import Head, next_token_changes, top_token_changes, top_tokens
from dynamo_jax.models.sources import DecoderSource

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = decoder_config(
    vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, dense_layers=(0,),
    dense_intermediate_size=48,
)  # fmt: skip
SHORT = EvalConfig(window=64, limit=3, batch_size=2, adaptation_windows=1)


def heads(rng, vocabulary=11):
    return [Head(jnp.asarray(rng.normal(size=(vocabulary, 6)), jnp.float32), None, cap) for cap in (0.0, 5.0)]


def test_changes_are_those_of_sums_in_float64():
    rng = np.random.default_rng(0)
    reference, own = heads(rng)
    exact, hidden = (jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32) for _ in range(2))
    targets = rng.integers(0, 11, (2, 5))
    p = scipy.special.log_softmax(np.asarray(exact, np.float64) @ np.asarray(reference.weights, np.float64).T, -1)
    logits = np.asarray(hidden, np.float64) @ np.asarray(own.weights, np.float64).T
    q = scipy.special.log_softmax(np.tanh(logits / 5) * 5, -1)
    apart, agrees, more = next_token_changes(exact, hidden, reference, own, jnp.asarray(targets))
    np.testing.assert_allclose(apart, scipy.special.rel_entr(np.exp(p), np.exp(q)).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(agrees, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(more, np.take_along_axis(p - q, targets[..., None], -1)[..., 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_likeliest_tokens_bound_the_divergence_from_below(count):
    rng = np.random.default_rng(count)
    reference, own = heads(rng)
    exact, hidden = (jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32) for _ in range(2))
    targets = jnp.asarray(rng.integers(0, 11, (2, 5)))
    whole, agrees, more = next_token_changes(exact, hidden, reference, own, targets)
    nll = -jnp.take_along_axis(
        reference.log_probabilities(exact.reshape(-1, 6)).reshape(2, 5, 11), targets[..., None], 2
    )
    part, same, less = top_token_changes(*top_tokens(exact, reference, count), nll[..., 0], hidden, own, targets)
    assert (part <= whole + 1e-5).all() and (part >= 0).all()
    if count == 10:  # the others are one token
        np.testing.assert_allclose(part, whole, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(agrees, same)
    np.testing.assert_allclose(more, less, rtol=1e-4, atol=1e-5)


def test_a_model_read_layer_by_layer_is_the_model(shallow, shallow_folder):
    decoder, _ = shallow
    windows = np.random.default_rng(0).integers(0, 200, (5, 33))
    for source in (DecoderSource(decoder), Source(shallow_folder)):
        found = exact_states(source, windows, batch_size=2)
        hidden, routings = decoder.hidden_states(jnp.asarray(windows[:, :-1]))
        np.testing.assert_allclose(found.hidden, hidden, rtol=1e-3, atol=1e-3)
        counts = piece_counts(routings, 5, decoder.config.num_experts, 128)
        np.testing.assert_allclose(found.counts, counts)
        assert found.expert_weights == decoder.config.num_expert_weights


def test_dense_layers_are_read_too():
    decoder = Decoder(SMALL, rngs=nnx.Rngs(0))
    windows = np.random.default_rng(0).integers(0, 64, (2, 17))
    found = exact_states(DecoderSource(decoder), windows)
    np.testing.assert_allclose(
        found.hidden, decoder.hidden_states(jnp.asarray(windows[:, :-1]))[0], rtol=1e-4, atol=1e-5
    )
    assert found.counts.shape[2] == 2


def test_statistics_are_of_tokens_and_errors_of_windows():
    rng = np.random.default_rng(0)
    each, more = rng.exponential(size=(6, 50)), rng.normal(0.1, 0.2, (6, 50))
    found = divergences(Apart(each, each < 1, more))
    assert (found.mean, found.largest) == (pytest.approx(each.mean()), each.max())
    assert (found.median, found.p999) == (np.quantile(each, 0.5), np.quantile(each, 0.999))
    assert found.standard_error == pytest.approx(each.mean(axis=1).std(ddof=1) / math.sqrt(6))
    assert found.ratio == pytest.approx(math.exp(more.mean())) and found.agreement == (each < 1).mean()
    assert divergences(Apart(each[:1], each[:1] < 1, more[:1])).standard_error is None


def test_rows_say_how_far_they_are_and_a_file_says_nearly_the_same(shallow, quantized, texts, tmp_path, monkeypatch):
    given = {"novel": {"verse": texts["verse"]}, "config": SHORT}
    wide = dataclasses.replace(quantized.plan, widths=np.full_like(quantized.plan.widths, 8))
    rows, _ = evaluate(quantized, **given, reference=shallow[0])
    assert [row.variant for row in rows] == ["reference", "baseline", "auto"]
    assert rows[0].divergence is None and rows[1].reference == "reference"
    coarse = rows[1].divergence
    assert coarse.ratio == pytest.approx(math.exp(rows[1].nll - rows[0].nll), rel=1e-5)
    assert 0 < coarse.median < coarse.p90 < coarse.p99 <= coarse.p999 <= coarse.largest and 0 < coarse.agreement < 1
    own = dataclasses.replace(quantized, plan=wide)
    (_, near), _ = evaluate(own, **given, variants=("baseline",), reference=DecoderSource(shallow[0]))
    assert near.divergence.mean < coarse.mean / 20 and near.divergence.agreement > coarse.agreement
    for kept, bound in ((module.LIKELIEST, 0.2), (4, 1.0)):
        monkeypatch.setattr(module, "LIKELIEST", kept)
        file = tmp_path / f"{kept}.safetensors"
        (first, one), _ = evaluate(
            quantized, **given, variants=("baseline",), reference=shallow[0], reference_logits=file
        )
        monkeypatch.setattr(module, "exact_states", None)  # it is not run again
        (again, other), _ = evaluate(quantized, **given, variants=("baseline",), reference_logits=file)
        monkeypatch.undo()
        assert one.divergence.mean == pytest.approx(coarse.mean)
        assert (again.nll, again.bytes_per_token) == (first.nll, first.bytes_per_token)
        assert coarse.mean * (1 - bound) <= other.divergence.mean <= coarse.mean * (1 + 1e-4)
        assert other.divergence.ratio == pytest.approx(coarse.ratio, rel=1e-5)


def test_what_is_no_reference_is_named(shallow, quantized, texts, tmp_path):
    given = {"novel": {"verse": texts["verse"]}, "config": SHORT, "variants": ("baseline",)}
    with pytest.raises(ValueError, match=r"missing: no such file, and no reference to write it from"):
        evaluate(quantized, **given, reference_logits=tmp_path / "missing")
    other = Decoder(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="reference: of a vocabulary of 64 tokens, where the model has"):
        evaluate(quantized, **given, reference=other)
    file = tmp_path / "file"
    evaluate(quantized, **given, reference=shallow[0], reference_logits=file)
    windows = {"verse": np.zeros((3, 65), np.int32)}
    with pytest.raises(ValueError, match="has not the windows of verse"):
        read_references(file, windows, shallow[0].config.vocab_size)
    with pytest.raises(ValueError, match="of a vocabulary of"):
        read_references(file, windows, 7)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        evaluate(quantized, **given, reference_logits=file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        evaluate(quantized, **given, reference_logits=file)


def test_the_part_that_a_file_keeps_is_that_of_all_batches(shallow):
    windows = np.random.default_rng(1).integers(0, 200, (5, 17))
    exact = exact_states(DecoderSource(shallow[0]), windows)
    kept = likeliest(exact, batch_size=2)
    logits = exact.head.log_probabilities(jnp.asarray(exact.hidden.reshape(-1, exact.hidden.shape[-1])))
    np.testing.assert_array_equal(kept.tokens[..., 0].reshape(-1), logits.argmax(axis=-1))
    values = jax.lax.top_k(logits, kept.values.shape[-1])[0]
    np.testing.assert_allclose(kept.values.reshape(values.shape), values, rtol=1e-5)
