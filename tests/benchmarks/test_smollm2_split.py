"""A dense FFN cut into experts computes the same: the pure functions of benchmarks/models, on small random arrays."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks" / "models"
HIDDEN, CHANNELS = 24, 40


def _load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


dense_gguf, split = _load("dense_gguf"), _load("dense_split")


def normed(x, scale):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * scale


def streams(dense, tokens):
    """A stand-in for the model that reads and writes the stream wherever the real one does; the mixing of positions
    by attention is left out. Returns the stream after the layers, and the logits."""
    x = dense.embed.astype(np.float64)[tokens]
    for layer in dense.layers:
        a = normed(x, layer["attention_norm"])
        x = x + np.tanh(a @ layer["q"] + a @ layer["k"] - a @ layer["v"]) @ layer["o"]
        h = split.hidden_channels(normed(x, layer["experts_norm"]), layer["gate"], layer["up"])
        x = x + h @ layer["down"]
    return x, normed(x, dense.norm) @ dense.head.T


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(0)
    matrix = lambda *shape: (rng.standard_normal(shape) / 5).astype(np.float32)  # noqa: E731
    scale = lambda: rng.uniform(0.2, 3, HIDDEN).astype(np.float32)  # noqa: E731

    def layer():
        square = {name: matrix(HIDDEN, HIDDEN) for name in "qkvo"}
        ffn = {name: matrix(CHANNELS, HIDDEN) for name in ("gate", "up", "down")}
        return square | ffn | {"attention_norm": scale(), "experts_norm": scale()}

    embed = matrix(50, HIDDEN)
    return dense_gguf.Dense(embed, embed.copy(), scale(), [layer(), layer()])


def test_folded_norms_compute_the_same_logits(dense):
    folded = split.fold_norms(dense)
    tokens = np.arange(50)
    np.testing.assert_allclose(streams(folded, tokens)[1], streams(dense, tokens)[1], rtol=1e-4, atol=1e-5)
    assert all((layer[n] == 1).all() for layer in folded.layers for n in ("attention_norm", "experts_norm"))
    assert (folded.norm == 1).all()


def test_a_rotated_stream_is_another_stream_with_the_same_logits(dense):
    folded = split.fold_norms(dense)
    (x, logits), (turned, found) = (streams(d, np.arange(50)) for d in (folded, split.rotate_stream(folded, 3)))
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, rtol=1e-4, atol=1e-4)
    assert np.abs(turned - x).max() > 0.1


def test_rotation_refuses_norms_that_are_not_folded(dense):
    with pytest.raises(AssertionError, match="ones"):
        split.rotate_stream(dense)


@pytest.fixture(scope="module")
def ffn(dense):
    x = np.random.default_rng(1).standard_normal((300, HIDDEN)).astype(np.float32)
    layer = dense.layers[0]
    h = split.hidden_channels(x, layer["gate"], layer["up"])
    return x, h, layer["down"], split.cut(h, layer["down"], shared=8, experts=4)


def test_all_experts_together_are_the_dense_ffn(dense, ffn):
    x, h, down, parts = ffn
    layer = dense.layers[0]

    def part(own):
        return split.hidden_channels(x, layer["gate"][own], layer["up"][own]) @ down[own]

    total = part(parts.shared) + sum(part(own) for own in parts.routed)
    np.testing.assert_allclose(total, h @ down, rtol=1e-4, atol=1e-4)
    assert sorted([*parts.shared, *parts.routed.reshape(-1)]) == list(range(CHANNELS))
    assert parts.routed.shape == (4, 8)


def test_shared_channels_have_the_most_energy(ffn):
    _, h, down, parts = ffn
    energy = np.square(h * np.linalg.norm(down, axis=1)).mean(axis=0)
    assert energy[parts.shared].min() >= energy[parts.routed].max()


def test_clusters_have_one_size_and_find_channels_that_go_together():
    rng = np.random.default_rng(2)
    truth = np.repeat(np.arange(4), 6)
    features = np.eye(4, 30)[truth] + 0.1 * rng.standard_normal((24, 30))
    order = rng.permutation(24)
    members = split.balanced_clusters(features[order], 4)
    assert np.bincount(members).tolist() == [6] * 4
    assert all(len(set(members[truth[order] == t])) == 1 for t in range(4))
    with pytest.raises(ValueError, match="one size"):
        split.balanced_clusters(features, 5)


def test_the_router_drops_less_than_chance_and_its_gates_are_all_but_equal(ffn):
    x, h, down, parts = ffn
    norms = split.expert_norms(h, down, parts.routed)
    router = split.fit_router(x, norms)
    logits = x @ router
    gates = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.abs(gates * 4 - 1).max() < 0.01
    mask = split.chosen(x, router, 3)
    assert (mask.sum(axis=1) == 3).all()
    assert np.square(norms * ~mask).sum() < np.square(norms).sum() / 4


def test_the_correction_makes_up_for_part_of_what_is_left_out(ffn):
    x, h, down, parts = ffn
    mask = split.chosen(x, split.fit_router(x, split.expert_norms(h, down, parts.routed)), 3)
    seen = split.masked(h, parts.routed, mask)
    left = h @ down - seen @ down
    wanted = np.ones_like(left)
    corrected = split.corrected_down(seen, down, left, wanted, 1e-2)
    assert np.square(h @ down - seen @ corrected).sum() < np.square(left).sum()
    np.testing.assert_array_equal(split.masked(h, parts.routed, np.ones_like(mask)), h)
    np.testing.assert_array_equal(split.corrected_down(h, down, 0 * left, wanted, 1e-2), down)


def test_rows_of_neighbouring_pairs_come_back_in_halves():
    rows = np.arange(8.0)[:, None]  # of two heads, 4 rows each
    pairs = rows.reshape(2, 2, 2, 1).swapaxes(1, 2).reshape(8, 1)  # 0 2 1 3, as GGUF stores halves 0 1 | 2 3
    np.testing.assert_array_equal(dense_gguf.in_halves(pairs, 2), rows)
