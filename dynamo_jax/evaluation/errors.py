"""The mean of measurements and how uncertain it is.

Axes: S windows, documents, or other things that were measured one by one.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def mean_and_error(each: Float[np.ndarray, " S"]) -> tuple[float, float | None]:
    """The mean, and its standard error, None of one measurement."""
    count = len(each)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(count)) if count > 1 else None
