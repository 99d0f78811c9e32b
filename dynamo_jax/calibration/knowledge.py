"""What calibration leaves behind for the run time: signatures, prior errors, corrections."""

from __future__ import annotations

import functools

import numpy as np

from dynamo_jax.analysis.significance import per_token, whole_over_blocks
from dynamo_jax.analysis.statistics import merge
from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.runtime.monitor import HOP, LONGEST, learn, novelty_threshold, spans
from dynamo_jax.runtime.quantized import Knowledge


def knowledge_of(
    analyses: dict[str, Analysis],
    config: QuantizeConfig,
    calibrated: dict[str, tuple[str, int]],
) -> Knowledge:
    """Signatures, prior errors and corrections of the known datasets together."""
    runs = list(analyses.values())
    stats = functools.reduce(merge, (a.stats for a in runs))
    tokens = float(stats.tokens[0])
    blocks = np.asarray(stats.block_errors)
    correction = whole_over_blocks(np.asarray(stats.errors), blocks)
    block_errors = per_token(blocks * correction[:, :, None, :], stats)
    size = max(1, round(2 * HOP / config.window))  # windows of what the monitor looks at
    scatter = learn([spans(a.windows, size) for a in runs])
    if config.window > LONGEST:  # longer windows scatter less than what it looks at, and would make all of that novel
        scatter = scatter._replace(limit=scatter.limit * np.inf)
    return Knowledge(
        names=tuple(analyses),
        counts=np.stack([np.asarray(a.stats.counts) for a in runs]),
        centre=np.asarray(scatter.centre),
        inverse=np.asarray(scatter.inverse),
        limit=np.asarray(scatter.limit),
        threshold=novelty_threshold({n: a.windows for n, a in analyses.items()}, config.adaptation_windows),
        loss_per_error=np.sum([a.sensitivity for a in runs], axis=0) / tokens,
        block_errors=block_errors,
        correction=correction,
        calibrated=calibrated,
        tokens=int(tokens),
    )
