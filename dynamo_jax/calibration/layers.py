"""What calibration does with the experts of one layer, given what they were given: draft, quantize, measure.

Where a layer's inputs come from is the caller's: ``sweeps.py`` recomputes them layer by layer from a folder or a
decoder, ``dynamo_jax.transform`` taps them in a model of somebody else.

Axes: N tokens, A datasets, D hidden, E experts, k experts a token, F channels, P = 3 projections, W widths, S windows
of K pieces, U = 2 where gate with up and down have widths of their own, else 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dynamo_jax.calibration.experts import (
    Routed,
    errors_at,
    expert_chunks,
    planes_of,
    rows_of,
    run_expert,
)
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ExpertSizes
from dynamo_jax.models.experts import Activation
from dynamo_jax.models.formats.expert_files import Triple
from dynamo_jax.quant.planes import Planes, filled_up, quantize
from dynamo_jax.runtime.signatures import SPAN

ERRORS = ("errors", "apart_errors", "block_errors")  # of a layer's statistics, what ``errors_at`` measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerJob:
    """One layer with experts and how to take it. name: what an error calls it; weights, biases: of an expert, when they
    are needed; dataset: of each token; datasets: how many there are; done: is told the share of the experts that are
    finished. The rest as of ``sweeps.Calibration``."""

    name: str
    sizes: ExpertSizes
    activation: Activation
    weights: Callable[[int], Float[np.ndarray, "P F D"]]
    biases: Callable[[int], Triple | None]
    dataset: Int[np.ndarray, " N"]
    datasets: int
    group_size: int
    channel_block: int
    apart: bool
    quantizer: str
    done: Callable[[float], None]

    def member(self, token: np.ndarray, size: int, weight: ArrayLike = 1.0) -> Float[np.ndarray, "A R"]:
        """The weight of each row in its dataset. A new array each time: jax may still be reading an earlier one."""
        member = np.zeros((self.datasets, size), np.float32)
        member[self.dataset[token], np.arange(len(token))] = weight
        return member

    def finite(self, expert: int) -> Float[np.ndarray, "P F D"]:
        weights = self.weights(expert)
        if not np.isfinite(np.asarray(weights, np.float32)).all():
            raise ValueError(f"{self.name}, expert {expert}: weights to quantize hold NaN or infinity")
        return weights


def outputs_and_drafts(
    job: LayerJob, routed: Routed, drafts: bool
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "A E U W"], Float[np.ndarray, "A E"]]:
    """What the experts add to each token, the squared errors of rounding each of them (zeros without ``drafts``), and
    their rows."""
    out = np.zeros(routed.x.shape, np.float32)
    found = np.zeros((job.datasets, job.sizes.experts, 2 if job.apart else 1, len(WIDTHS)), np.float32)
    counts = np.zeros(found.shape[:2], np.float32)
    for together in expert_chunks(job.sizes):
        weights = [job.finite(expert) for expert in together]
        planes = _rounded(job, weights) if drafts else None
        for i, expert in enumerate(together):
            token, _, rows = rows_of(routed, expert)
            measured = (rows.x, rows.gates, job.member(token, len(rows.x)))
            biases = job.biases(expert)
            h, y, sums = run_expert(job.activation, *measured, weights[i], biases)
            counts[:, expert] = sums["counts"]
            out[token] += np.asarray(y)[: len(token)] * rows.gates[: len(token), None]
            if drafts:
                own = jax.tree.map(lambda a, i=i: a[i], planes)
                for w, width in enumerate(WIDTHS):
                    fixed = (job.activation, None, job.apart, width)
                    whole, each, _ = errors_at(*fixed, *measured, h, y, weights[i], own, biases)
                    found[:, expert, :, w] = each if job.apart else np.asarray(whole)[:, None]
            job.done((expert + 1) / (job.sizes.experts + 1))
    return out, found, counts


def _rounded(job: LayerJob, weights: list[np.ndarray]) -> Planes:
    return quantize(filled_up(np.stack(weights), job.channel_block, job.group_size), job.group_size)


def quantized_and_measured(
    job: LayerJob, routed: Routed, importance: Float[np.ndarray, " N"], emphasis: Float[np.ndarray, "E U 3"]
) -> tuple[Planes, dict[str, Any]]:
    """The planes of a layer's experts, and by dataset the sums of ``analysis.statistics.Statistics``."""
    sums, quantized = [], []
    for together in expert_chunks(job.sizes):
        weights = [job.finite(expert) for expert in together]
        found = [rows_of(routed, expert) for expert in together]
        biases = [job.biases(expert) for expert in together]
        rows = [f[2] for f in found]
        sizes = job.channel_block, job.group_size
        stacked = np.stack(weights)
        planes = planes_of(job.activation, job.quantizer, *sizes, stacked, rows, biases, routed, emphasis[together])
        quantized.append(planes)
        for i, expert in enumerate(together):
            own = jax.tree.map(lambda a, i=i: a[i], planes)
            token, (x, gates) = found[i][0], rows[i]
            h, y, total = run_expert(job.activation, x, gates, job.member(token, len(x)), weights[i], biases[i])
            weighted = job.member(token, len(x), importance[token])
            measured = (x, gates, weighted, h, y, weights[i], own, biases[i])
            fixed = (job.activation, job.channel_block, job.apart)
            errors = (np.stack(e, axis=-1) for e in zip(*(errors_at(*fixed, width, *measured) for width in WIDTHS)))
            sums.append(jax.tree.map(np.asarray, total) | dict(zip(ERRORS, errors)))
            job.done((expert + 1) / (job.sizes.experts + 1))
    stats = {name: np.stack([s[name] for s in sums], axis=1) for name in sums[0]}
    stats["tokens"] = np.bincount(job.dataset, minlength=job.datasets).astype(np.float32)
    return jax.tree.map(lambda *a: np.concatenate(a), *quantized), stats


def routed_pieces(chosen: Int[np.ndarray, "S T k"], experts: int) -> Float[np.ndarray, "S K E"]:
    """Routed tokens of each window, in K pieces of about what the monitor looks at. chosen: experts of its tokens, -1
    for none."""
    pieces = np.array_split(chosen, max(1, round(chosen.shape[1] / SPAN)), axis=1)
    flat = [piece.reshape(len(chosen), -1) for piece in pieces]
    counts = [[np.bincount(own[own >= 0], minlength=experts) for own in window] for window in zip(*flat)]
    return np.array(counts, np.float32)
