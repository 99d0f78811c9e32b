"""Other ways to place precision on text that was seen, at the bytes of one of our plans.

Axes: L layers, E experts, M widths of an expert, W widths, C clusters, P points, V values of a point.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.precision.plan import Plan

DYNAMIC_SHARE = 0.01  # of the channel blocks, at the highest precision


def hot_experts(plan: Plan, counts: Float[np.ndarray, "L E"], tokens: float, stored: float) -> Plan:
    """Whole experts at 4 bits, those first that most tokens went to, others at 2, while their bytes are no more than
    ``stored`` and a token reads no more than by ``plan``. After DynaExq, arXiv 2511.15015."""
    low, _, high, _ = plan.costs().sum(axis=0)
    left = stored - counts.size * low
    read = plan.bytes_per_token(counts, tokens) * tokens - counts.sum() * low
    widths = np.full_like(plan.widths, 2)
    for expert in np.argsort(-counts, axis=None, kind="stable"):
        layer, index = np.unravel_index(expert, counts.shape)
        if left < high - low:
            break
        if read >= counts[layer, index] * (high - low):  # one that is too hot for what is left is passed over
            widths[layer, index] = 4
            left, read = left - (high - low), read - counts[layer, index] * (high - low)
    return dataclasses.replace(plan, widths=widths)


def clustered_experts(
    plan: Plan,
    significance: Float[np.ndarray, "A L E"],
    channels: Float[np.ndarray, "L E M"],
    stored: float,
) -> Plan:
    """Experts at the width of their cluster, and the most dynamic channels at the highest.

    After a description of DynaMo (arXiv 2503.21135), not after its code, which is not public: the experts' significance
    on each dataset, normalised over a layer, is clustered by fuzzy c-means into four widths; the one percent of the
    channels that a dataset moves most (``channels``) is held at the highest precision. What the description leaves
    open: the widths are 2, 3, 4 and 8, a channel is a channel block, and while the bytes are above ``stored`` the
    expert of the least significance above 2 bits goes to the next lower width; below it the one of the most
    significance under 8 bits goes to the next higher one, as long as that fits.
    """
    shares = significance / np.maximum(significance.sum(axis=-1, keepdims=True), 1e-30)
    points = np.log(np.maximum(shares.reshape(len(shares), -1).T, 1e-9))
    at = clusters(points, len(WIDTHS)).reshape(shares.shape[1:])  # 0 the least significant
    order = np.argsort(shares.mean(axis=0), axis=None, kind="stable")
    costs = plan.costs()

    def of(at: Int[np.ndarray, "L E"]) -> Plan:
        widths = np.broadcast_to(np.asarray(WIDTHS)[at][..., None], plan.widths.shape).copy()
        count = max(1, round(DYNAMIC_SHARE * widths.size))
        widths.reshape(-1)[np.argsort(-channels, axis=None, kind="stable")[:count]] = WIDTHS[-1]
        return dataclasses.replace(plan, widths=widths.astype(np.int8))

    whole = costs.sum(axis=0)
    left = stored - of(at).stored_bytes()
    for expert in order:
        while left < 0 and at.reshape(-1)[expert]:
            at.reshape(-1)[expert] -= 1
            left = stored - of(at).stored_bytes()
    for expert in order[::-1]:
        now = at.reshape(-1)[expert]
        if now < len(WIDTHS) - 1 and left >= whole[now + 1] - whole[now]:
            at.reshape(-1)[expert] += 1
            left = stored - of(at).stored_bytes()
    return of(at)


def clusters(points: Float[np.ndarray, "P V"], count: int, rounds: int = 100) -> Int[np.ndarray, " P"]:
    """The cluster that each point belongs to most, by fuzzy c-means with exponent 2; those of the least values first.
    It begins at quantiles, so that it is a function of the points."""
    level = points.mean(axis=1)
    first = np.searchsorted(np.sort(level), np.quantile(level, (np.arange(count) + 0.5) / count))
    centres = points[np.argsort(level, kind="stable")[np.minimum(first, len(level) - 1)]]
    for _ in range(rounds):
        squared = np.maximum(((points[:, None] - centres) ** 2).sum(axis=-1), 1e-12)
        member = (1 / squared) / (1 / squared).sum(axis=1, keepdims=True)
        centres = (member**2).T @ points / (member**2).sum(axis=0)[:, None]
    rank = np.argsort(np.argsort(centres.mean(axis=1), kind="stable"), kind="stable")
    return rank[member.argmax(axis=1)]
