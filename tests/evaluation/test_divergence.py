"""Divergence from the unquantized model, against sums in float64, and what it says of planes that are exact."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dynamo_jax.evaluation.divergence import changed, divergence
from dynamo_jax.evaluation.evaluate import evaluate
from dynamo_jax.evaluation.perplexity import EvalConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHORT = EvalConfig(window=64, limit=3, batch_size=2)


def test_loss_accuracy_and_divergence_are_those_of_sums_in_float64():
    rng = np.random.default_rng(0)
    own, reference = (scipy.special.log_softmax(rng.normal(size=(2, 5, 7)), axis=-1) for _ in range(2))
    tokens = rng.integers(0, 7, (2, 6))
    found = changed(*(jnp.asarray(a, jnp.float32) for a in (own, reference)), jnp.asarray(tokens))
    at = np.take_along_axis(own, tokens[:, 1:, None], axis=-1)[..., 0]
    apart = scipy.special.rel_entr(np.exp(reference), np.exp(own)).sum(axis=-1)
    np.testing.assert_allclose(found.nll, -at.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.divergence, apart.mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found.accuracy, (own.argmax(axis=-1) == tokens[:, 1:]).mean(axis=1, dtype=np.float32))


def test_more_bits_are_nearer_and_the_loss_is_that_of_evaluate(shallow, quantized, texts):
    model, _ = shallow
    wide = dataclasses.replace(quantized.plan, widths=np.full_like(quantized.plan.widths, 8))
    (coarse,) = divergence(model, quantized, {"verse": texts["verse"]}, SHORT)
    (fine,) = divergence(model, dataclasses.replace(quantized, plan=wide), {"verse": texts["verse"]}, SHORT)
    assert 0 < fine.divergence < coarse.divergence / 20
    assert coarse.tokens == 3 * 64 and coarse.standard_error > 0
    whole = EvalConfig(
        window=64, limit=2, batch_size=2, adaptation_windows=1
    )  # rows count what follows the first window
    (row,), _ = evaluate(quantized, novel={"verse": texts["verse"]}, config=whole, variants=("baseline",))
    tail = divergence(model, quantized, {"verse": texts["verse"]}, dataclasses.replace(SHORT, limit=1))[0]
    assert 3 * coarse.nll - tail.nll == pytest.approx(2 * row.nll, rel=1e-5)


def test_a_model_of_another_shape_is_an_error(bundled, quantized, texts):
    with pytest.raises(ValueError, match="another configuration"):
        divergence(bundled[0], quantized, texts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to evaluate"),
        ({"novel": {"a": "x"}, "variants": ("rtn4",)}, "variant rtn4: the model has baseline, auto"),
        ({"novel": {"a": "x"}}, "a: .* tokens, fewer than one window"),
    ],
)
def test_what_cannot_be_evaluated_is_said(quantized, given, said):
    with pytest.raises(ValueError, match=said):
        evaluate(quantized, **given)


def test_an_unquantized_model_needs_a_tokenizer(shallow):
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(shallow[0], novel={"a": "x"})
