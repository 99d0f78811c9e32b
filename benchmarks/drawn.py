"""Text that a model draws, as ``quantize`` has it beside the known kinds; once for a model, for all that ask."""

from __future__ import annotations

import functools

import numpy as np

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.unseen import drawn_windows, with_unseen
from dynamo_jax.models.decoder import Decoder

drawn = functools.cache(drawn_windows)


def and_drawn(model: Decoder, known: dict[str, np.ndarray], settings: QuantizeConfig) -> dict[str, np.ndarray]:
    """Windows (S, T1) of calibration: of the known kinds and, where the settings want some, of text that is drawn."""
    return with_unseen(known, lambda count: drawn(model, count, settings.window + 1), settings, model_bytes=0)
