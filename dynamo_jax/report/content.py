"""What a report is made from: rows, arrays and names, no words and no markup.

Axes: L layers, E experts, N channel blocks an expert, M pages an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.analysis.dynamics import Dynamics

Row = dict[str, Any]


class Line(NamedTuple):
    """A text's stretches: where each ends, the monitor's score, what the text is taken for, nll of auto minus that of
    the baseline, and whether auto ran at an adapted plan."""

    tokens: Sequence[float]
    score: Sequence[float]
    nearest: Sequence[str]
    gained: Sequence[float]
    adapted: Sequence[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportContent:
    """What a report shows.

    facts: of the model, the plan and the run, in order. expert_weights: of the whole model. rows: the fields of
    ``evaluation.perplexity.Row``. significance: nats a token predicted when that expert alone is at 2 bits.
    channel_significance: output energy through each channel block. baseline_bits: of each page, in {2, 3, 4, 8};
    apart: whether each projection of a block has a page of its own, those of gate first. adapted_bits: of the
    datasets that were adapted to. verdicts: nearest known dataset, score, novel or not. dynamics: of the known
    datasets. timelines: of the evaluated ones. command: that made the report; next_steps: commands by what they do.
    """

    model: str
    facts: dict[str, str]
    expert_weights: int
    rows: list[Row]
    significance: dict[str, Float[np.ndarray, "L E"]]
    channel_significance: dict[str, Float[np.ndarray, "L E N"]]
    baseline_bits: Int[np.ndarray, "L E M"]
    adapted_bits: dict[str, Int[np.ndarray, "L E M"]]
    verdicts: dict[str, tuple[str, float, bool]]
    dynamics: Dynamics | None
    command: str
    apart: bool = False
    next_steps: dict[str, str] = dataclasses.field(default_factory=dict)
    timelines: dict[str, Line] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = np.shape(self.baseline_bits)
        if len(shape) != 3:
            raise ValueError(f"baseline_bits has shape {shape}, expected (layers, experts, pages)")
        shape = shape[:2]
        maps = {"significance": 2, "channel_significance": 3, "adapted_bits": 3}
        for field, rank in maps.items():
            for name, array in getattr(self, field).items():
                if np.ndim(array) != rank or np.shape(array)[:2] != shape:
                    raise ValueError(
                        f"{field}[{name!r}] has shape {np.shape(array)}, expected {rank} axes that begin with the "
                        f"{shape} of baseline_bits"
                    )
