"""A dense model's FFN cut into shared channels and routed experts: plain arrays, no model and no files.

The stream: norms are folded into the weights behind them, then the residual stream is rotated; both leave the function
as it was. The cut: channels with the most energy are shared by all tokens, the others are clustered by when they are
active, all clusters of one size. The router: a linear map to each expert's expected share of the output. What the
experts that were left out would have added is made up for in the down projections, by least squares.

Axes: N tokens, D hidden, F channels, E experts, C = F_routed / E channels of an expert, k experts a token.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
import scipy.optimize
from dense_gguf import Dense

from dynamo_jax.quant.hadamard import rotation


def fold_norms(dense: Dense) -> Dense:
    """The same function with norms of ones: their scales are in the weights that follow."""

    def folded(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        first, second = layer["attention_norm"], layer["experts_norm"]
        rest = {name: first[:, None] * layer[name] for name in "qkv"}
        rest |= {name: layer[name] * second for name in ("gate", "up")}
        return layer | rest | {"attention_norm": np.ones_like(first), "experts_norm": np.ones_like(second)}

    layers = [folded(layer) for layer in dense.layers]
    return Dense(dense.embed, dense.head * dense.norm, np.ones_like(dense.norm), layers)


def rotate_stream(dense: Dense, seed: int = 0) -> Dense:
    """The same function with its residual stream x turned to R x. Norms must be ones (``fold_norms``)."""
    r = rotation(dense.embed.shape[1], seed)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (np.asarray(a, np.float64) @ b).astype(np.float32)

    def turned(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        reading = {name: product(layer[name].T, r.T).T for name in "qkv"}
        rows = {name: product(layer[name], r.T) for name in ("o", "gate", "up", "down")}
        return layer | reading | rows

    for scale in (dense.norm, *(layer[n] for layer in dense.layers for n in ("attention_norm", "experts_norm"))):
        assert (scale == 1).all(), "a rotation passes a norm only where its scales are ones"
    return Dense(product(dense.embed, r.T), product(dense.head, r.T), dense.norm, [turned(x) for x in dense.layers])


def hidden_channels(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate x) * (up x), (N, F)."""
    a = x @ gate.T
    return a / (1 + np.exp(-a)) * (x @ up.T)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which channels are shared (S,), and which belong to each routed expert (E, C)."""

    shared: np.ndarray
    routed: np.ndarray


def cut(h: np.ndarray, down: np.ndarray, shared: int, experts: int, seed: int = 0) -> Cut:
    """Channels by what they give to the output of tokens: h (N, F), down (F, D)."""
    size = np.abs(h) * np.linalg.norm(down, axis=1)
    order = np.argsort(-np.square(size).mean(axis=0), kind="stable")
    rest = np.sort(order[shared:])
    features = np.sqrt(size[:, rest]).T
    features = features - features.mean(axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-12
    members = balanced_clusters(features, experts, seed)
    return Cut(np.sort(order[:shared]), np.stack([rest[members == e] for e in range(experts)]))


def balanced_clusters(features: np.ndarray, clusters: int, seed: int = 0, rounds: int = 6) -> np.ndarray:
    """The cluster of each point (P, N): k-means in which all clusters get P / clusters points, by assignment."""
    points = len(features)
    if points % clusters:
        raise ValueError(f"{points} channels cannot be cut into {clusters} experts of one size")
    rng = np.random.default_rng(seed)
    centres = features[_spread(features, clusters, rng)]
    members = np.full(points, -1)
    for _ in range(rounds):
        near = np.repeat(features @ centres.T, points // clusters, axis=1)
        slots = scipy.optimize.linear_sum_assignment(-near)[1] // (points // clusters)
        if (slots == members).all():
            break
        members = slots
        centres = np.stack([features[members == c].mean(axis=0) for c in range(clusters)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True) + 1e-12
    return members


def _spread(features: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Starting points far from each other, each drawn by its squared distance to those before (k-means++)."""
    chosen = [int(rng.integers(len(features)))]
    while len(chosen) < count:
        away = np.maximum(0, 1 - (features @ features[chosen].T).max(axis=1)) ** 2
        chosen.append(int(rng.choice(len(features), p=away / away.sum())))
    return chosen


def expert_norms(h: np.ndarray, down: np.ndarray, routed: np.ndarray) -> np.ndarray:
    """|output| of each routed expert for each token, (N, E)."""
    return np.stack([np.linalg.norm(h[:, own] @ down[own], axis=1) for own in routed], axis=1)


def ridge(x: np.ndarray, target: np.ndarray, share: float) -> np.ndarray:
    """The weights (D, O) of the linear map from x to target, with a penalty of ``share`` of the mean energy of x."""
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += share * np.trace(gram) / len(gram)
    return scipy.linalg.solve(gram, x.T @ target, assume_a="pos")


def fit_router(x: np.ndarray, norms: np.ndarray, spread: float = 1e-4, share: float = 1e-2) -> np.ndarray:
    """Weights (D, E) whose logits rank the experts by expected |output|, with standard deviation ``spread``.

    Logits that small make the softmax gates of any chosen k experts equal to about one part in ten thousand."""
    weights = ridge(x, norms, share)
    weights -= weights.mean(axis=1, keepdims=True)  # softmax does not see it
    return (weights * (spread / (x @ weights).std())).astype(np.float32)


def chosen(x: np.ndarray, router: np.ndarray, k: int) -> np.ndarray:
    """Whether each token goes to each expert, (N, E)."""
    logits = x @ router
    out = np.zeros(logits.shape, bool)
    np.put_along_axis(out, np.argsort(-logits, axis=1, kind="stable")[:, :k], True, axis=1)
    return out


def masked(h: np.ndarray, routed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """h with the channels of the experts that a token does not go to at zero."""
    out = h.copy()
    for e, own in enumerate(routed):
        out[:, own] *= mask[:, e, None]
    return out


def corrected_down(h: np.ndarray, down: np.ndarray, left: np.ndarray, wanted: np.ndarray, share: float) -> np.ndarray:
    """The down projection nearest to ``down`` that makes up for what is ``left`` (N, D) of the ``wanted`` stream.

    Errors count relative to the stream, as the next norm sees them: else a few tokens of huge norm decide."""
    size = np.sqrt(np.square(wanted).mean(axis=1, keepdims=True)) + 1e-6
    return (down + ridge(h / size, left / size, share)).astype(np.float32)
