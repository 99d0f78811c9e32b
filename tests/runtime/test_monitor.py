"""The monitor of streams, on routing counts drawn from distributions that are known here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamo_jax.runtime.monitor import HOP, UNKNOWN, decide, start, watch
from dynamo_jax.runtime.signatures import FREEDOM, learn, spans

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS, EXPERTS, TOP_K = 3, 16, 4


def kind(seed, spread=1.0):
    """Routing probabilities (L, E) of one kind of text."""
    weights = np.exp(spread * np.random.default_rng(seed).normal(size=(LAYERS, EXPERTS)))
    return weights / weights.sum(axis=1, keepdims=True)


def text(probability, pieces, tokens, seed):
    """Counts (pieces, L, E) of as many tokens each; stretches of 256 tokens differ from each other a little."""
    rng = np.random.default_rng(seed)
    counts = []
    for piece in range(pieces):
        if piece * tokens % 256 == 0:
            own = probability * np.exp(0.2 * rng.normal(size=probability.shape))
        counts.append([rng.multinomial(tokens * TOP_K, p / p.sum()) for p in own])
    return np.array(counts, np.float64)


A, B, OTHER = kind(0), kind(1), kind(2)


def learned(*windows, **more):
    return learn(list(windows), **more)[0]


SIGNATURES = learned(text(A, 32, 2 * HOP, 10), text(B, 32, 2 * HOP, 11))


@jax.jit
def follow(signatures, counts, tokens):
    """Label and score after each piece (K, L, E)."""

    def one(state, piece):
        state = watch(signatures, state, piece[0][None, None], piece[1][None, None])
        return state, (state.label[0], state.score[0], state.decisions[0])

    return jax.lax.scan(one, start(signatures), (jnp.asarray(counts, jnp.float32), tokens))[1]


def labels(*parts, size=32, signatures=SIGNATURES):
    counts = np.concatenate(parts)
    return np.asarray(follow(signatures, counts, jnp.full(len(counts), float(size)))[0])


def test_a_stream_of_a_known_kind_gets_its_name_and_keeps_it():
    for number, probability in enumerate((A, B)):
        found = labels(text(probability, 400, 32, 20 + number))
        assert (found[:7] == UNKNOWN).all()  # nothing is said before two hops
        assert (found[7:] == number).all()


def test_a_change_is_noticed_within_512_tokens():
    for after, label in ((B, 1), (OTHER, 2)):
        found = labels(text(A, 40, 32, 30), text(after, 40, 32, 31))
        assert (found[7:40] == 0).all() and (found[40 + 512 // 32 :] == label).all()


def test_text_that_takes_turns_does_not_make_the_label_flap():
    turns = [text((A, B)[i % 2], 2, 32, 40 + i) for i in range(60)]
    found = labels(text(A, 40, 32, 39), *turns)
    assert (np.diff(found[8:]) != 0).sum() <= 6


def test_false_alarms_are_as_rare_as_was_asked_for():
    """Of 4,000 decisions; each decision alone may be wrong at ten times the rate, which two in a row then lower."""
    counts = text(A, 4000, HOP, 50)
    two = counts[1:] + counts[:-1]
    found, _ = jax.jit(jax.vmap(lambda c: decide(SIGNATURES, c)))(jnp.asarray(two, jnp.float32))
    assert (np.asarray(found) != 0).mean() < 10 * 1e-5 * HOP
    strict = learned(text(A, 32, 2 * HOP, 10), text(B, 32, 2 * HOP, 11), rate=1e-3)
    often, _ = jax.jit(jax.vmap(lambda c: decide(strict, c)))(jnp.asarray(two, jnp.float32))
    assert (np.asarray(often) != 0).mean() >= (np.asarray(found) != 0).mean()
    assert (strict.limit < SIGNATURES.limit).all()


def test_streams_of_one_batch_do_not_touch_each_other():
    counts = np.stack([text(A, 12, HOP, 60), text(OTHER, 12, HOP, 61)])
    tokens = np.full((2, 12), float(HOP))
    tokens[1, 6:] = 0  # the second request has ended
    counts[1, 6:] = 0
    both = watch(SIGNATURES, start(SIGNATURES, 2), jnp.asarray(counts), jnp.asarray(tokens))
    for row in range(2):
        own = watch(
            SIGNATURES, start(SIGNATURES), jnp.asarray(counts[row : row + 1]), jnp.asarray(tokens[row : row + 1])
        )
        for one, two in zip(own, both):
            np.testing.assert_allclose(one[0], two[row], rtol=1e-5)
    assert both.label.tolist() == [0, 2] and both.decisions.tolist() == [11, 5]


def test_pieces_of_any_size_give_the_same_counts():
    whole = text(A, 8, HOP, 70)
    cut = np.zeros((8 * HOP, LAYERS, EXPERTS))
    cut[::HOP] = whole  # all of a hop's counts with its first token, then one token at a time
    state = watch(SIGNATURES, start(SIGNATURES), jnp.asarray(whole)[None], jnp.full((1, 8), float(HOP)))
    slow = watch(SIGNATURES, start(SIGNATURES), jnp.asarray(cut)[None], jnp.ones((1, 8 * HOP)))
    for one, two in zip(state, slow):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    nothing = watch(SIGNATURES, state, jnp.zeros((1, 3, LAYERS, EXPERTS)), jnp.zeros((1, 3)))
    for one, two in zip(state, nothing):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("windows", [1, 2])
def test_too_few_windows_set_no_limit_and_then_nothing_is_novel(windows):
    signatures = learned(text(A, windows, 2 * HOP, 80), text(B, windows, 2 * HOP, 81))
    assert np.isinf(signatures.limit).all()
    assert (labels(text(B, 100, 32, 82), signatures=signatures)[7:] == 1).all()
    assert (labels(text(OTHER, 100, 32, 83), signatures=signatures)[7:] < 2).all()


@pytest.mark.parametrize("windows", [1, 2])
def test_a_dataset_with_few_windows_is_taken_to_scatter_as_the_others_do(windows):
    signatures = learned(text(A, 32, 2 * HOP, 80), text(B, windows, 2 * HOP, 81))
    assert np.isfinite(signatures.limit).all()
    assert (labels(text(B, 100, 32, 82), signatures=signatures)[7:] == 1).all()
    assert (labels(text(OTHER, 100, 32, 83), signatures=signatures)[7:] == 2).all()


def test_one_known_dataset_is_told_from_novel_text():
    signatures = learned(text(A, 32, 2 * HOP, 90))
    assert (labels(text(A, 100, 32, 91), signatures=signatures)[7:] == 0).all()
    assert (labels(text(OTHER, 100, 32, 92), signatures=signatures)[7:] == 1).all()


def test_one_repeated_token_is_novel_and_a_silent_layer_is_an_error():
    counts = np.zeros((40, LAYERS, EXPERTS))
    counts[:, :, :TOP_K] = 32
    assert (labels(counts)[7:] == 2).all()
    silent = text(A, 4, HOP, 95)
    silent[:, 1] = 0
    with pytest.raises(ValueError, match="no tokens in a layer"):
        learn([silent])


def test_windows_are_put_together_to_what_the_monitor_looks_at():
    windows = np.arange(7.0).reshape(7, 1, 1)
    assert spans(windows, 2)[:, 0, 0].tolist() == [1, 5, 9]
    assert spans(windows, 9)[:, 0, 0].tolist() == [21]


def test_the_limit_needs_a_few_windows_of_all_datasets_together():
    few = FREEDOM // 2 + 1  # of each of two: one of each says nothing of scatter
    assert np.isfinite(learned(text(A, few, 2 * HOP, 80), text(B, few, 2 * HOP, 81)).limit).all()
    assert np.isinf(learned(text(A, few, 2 * HOP, 80), text(B, few - 1, 2 * HOP, 81)).limit).all()


@pytest.mark.parametrize("at", [0, 10, 20])
def test_a_foreign_stretch_is_found_and_blinds_nobody(at):
    """Three eighths of both datasets are of a third kind; it stays novel, the rest stays known."""
    windows = [text(A, 32, 2 * HOP, 10), text(B, 32, 2 * HOP, 11)]
    for own in windows:
        own[at : at + 12] = text(OTHER, 12, 2 * HOP, 12)
    signatures, kept = learn(windows)
    for main in kept:
        assert np.flatnonzero(~main).tolist() == list(range(at, at + 12))
    for number, probability in enumerate((A, B)):
        assert (labels(text(probability, 400, 32, 20 + number), signatures=signatures)[7:] == number).all()
    assert (labels(text(OTHER, 100, 32, 22), signatures=signatures)[7:] == 2).all()


def test_text_of_one_kind_loses_no_window():
    for seed in range(10):
        _, kept = learn([text(A, 32, 2 * HOP, 100 + seed), text(B, 32, 2 * HOP, 200 + seed)])
        assert all(main.all() for main in kept)
