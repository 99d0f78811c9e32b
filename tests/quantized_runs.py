"""Settings of a small quantization and its evaluation, which several test files and the fixtures of conftest share."""

from __future__ import annotations

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.evaluation.perplexity import EvalConfig

SETTINGS = QuantizeConfig(
    bits=3.0,
    per_projection=False,
    calibration_windows=4,
    window=64,
    batch_size=4,
    adaptation_windows=2,
    quantizer="rtn",
)
EVAL = EvalConfig(window=64, batch_size=4, adaptation_windows=4, limit=4)
