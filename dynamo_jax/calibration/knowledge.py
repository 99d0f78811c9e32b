"""What calibration leaves behind for the run time: signatures, prior errors, corrections."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from dynamo_jax.analysis.significance import per_token, whole_over_blocks
from dynamo_jax.analysis.statistics import merge
from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import UNSEEN, QuantizeConfig
from dynamo_jax.runtime.quantized import Knowledge
from dynamo_jax.runtime.signatures import SPAN, Signatures, learn, spans


def knowledge_of(
    analyses: dict[str, Analysis],
    config: QuantizeConfig,
    calibrated: dict[str, tuple[str, int]],
) -> Knowledge:
    """Signatures, prior errors and corrections of the known datasets together; text that stands for what nobody has
    seen is none of them."""
    unseen, analyses = analyses.get(UNSEEN), without_unseen(analyses)
    runs = list(analyses.values())
    stats = functools.reduce(merge, (a.stats for a in runs))
    tokens = float(stats.tokens[0])
    blocks = np.asarray(stats.block_errors)
    correction = whole_over_blocks(np.asarray(stats.errors), blocks)
    block_errors = per_token(blocks * correction[:, :, None, :], stats)
    signatures, odd = noticed(analyses, config.window)
    counts = np.stack([np.asarray(a.stats.counts) for a in runs])
    return Knowledge(
        names=tuple(analyses),
        counts=counts,
        unseen=np.zeros_like(counts[0]) if unseen is None else np.asarray(unseen.stats.counts),
        signatures=signatures,
        odd=odd,
        loss_per_error=np.sum([a.sensitivity for a in runs], axis=0) / tokens,
        block_errors=block_errors,
        correction=correction,
        calibrated={name: calibrated[name] for name in analyses if name in calibrated},
        tokens=int(tokens),
    )


def without_unseen(analyses: Mapping[str, Analysis]) -> dict[str, Analysis]:
    """Those of known datasets."""
    return {name: run for name, run in analyses.items() if name != UNSEEN}


def noticed(analyses: dict[str, Analysis], window: int) -> tuple[Signatures, dict[str, tuple[int, ...]]]:
    """What the monitor compares with, and each dataset's windows, counted from 1, that are unlike the rest of it.

    window: tokens of one. It is as many stretches of about ``SPAN`` tokens as it was counted in; shorter ones are put
    together.
    """
    analyses = without_unseen(analyses)
    size = max(1, round(SPAN / window))
    stretches = [spans(a.windows.reshape(-1, *a.windows.shape[2:]), size) for a in analyses.values()]
    signatures, kept = learn(stretches)
    odd = {}
    for (name, run), main in zip(analyses.items(), kept):
        first = np.flatnonzero(~main) * size // run.windows.shape[1]
        numbers = sorted({int(f) + i for f in first for i in range(min(size, len(run.windows)))})
        odd[name] = tuple(n + 1 for n in numbers)
    return signatures, odd
