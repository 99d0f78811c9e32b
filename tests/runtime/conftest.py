"""What tests of the run time share."""

from __future__ import annotations

import pytest

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize


@pytest.fixture(scope="session")
def rounded(shallow, texts):
    """A quantized model for tests that generate: one window of one text."""
    settings = QuantizeConfig(unseen_windows=0, calibration_windows=1, window=64, quantizer="rtn")
    return quantize(*shallow, {"code": texts["code"]}, settings)[0]
