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
from dynamo_jax.progress import Spent

Row = dict[str, Any]
PLAN = "plan"  # among the predicted: the baseline, with all that the device holds for it


class Predicted(NamedTuple):
    """What calibration predicts of a plan. variant: ``PLAN``, "bf16", or of one width for all experts, "3 bits"; held:
    bytes of experts on the device; lost: nats a token above the unquantized model, on the known texts."""

    variant: str
    held: float
    lost: float


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
    """What a report shows; what is empty has no section.

    facts: of the model, the plan and the run, in order. stages: what each took, seconds and bytes of memory.
    expert_weights: of the whole model. rows: the fields of ``evaluation.perplexity.Row``; tasks: those of
    ``evaluation.tasks.TaskRow``; events: what the run time did on each task, in words. predicted: plans that
    calibration knows the cost of. significance: nats a token predicted when that expert alone is at 2 bits;
    block_significance: when that channel block is. baseline_bits: of each page, in {2, 3, 4, 8}; apart: whether each
    projection of a block has a page of its own, those of gate first. adapted_bits: of the datasets that were adapted
    to. verdicts: nearest known dataset, score, novel or not. dynamics: of the known datasets. timelines: of the
    evaluated ones. command: that made the report; next_steps: commands by what they do.
    """

    model: str
    facts: dict[str, str]
    expert_weights: int
    command: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    tasks: list[Row] = dataclasses.field(default_factory=list)
    events: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    predicted: list[Predicted] = dataclasses.field(default_factory=list)
    significance: dict[str, Float[np.ndarray, "L E"]] = dataclasses.field(default_factory=dict)
    block_significance: dict[str, Float[np.ndarray, "L E N"]] = dataclasses.field(default_factory=dict)
    baseline_bits: Int[np.ndarray, "L E M"] | None = None
    apart: bool = False
    adapted_bits: dict[str, Int[np.ndarray, "L E M"]] = dataclasses.field(default_factory=dict)
    verdicts: dict[str, tuple[str, float, bool]] = dataclasses.field(default_factory=dict)
    dynamics: Dynamics | None = None
    stages: dict[str, Spent] = dataclasses.field(default_factory=dict)
    next_steps: dict[str, str] = dataclasses.field(default_factory=dict)
    timelines: dict[str, Line] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline_bits is not None and np.ndim(self.baseline_bits) != 3:
            shape = np.shape(self.baseline_bits)
            raise ValueError(f"baseline_bits has shape {shape}, expected (layers, experts, pages)")
        first: tuple[str, tuple[int, ...]] | None = None
        if self.baseline_bits is not None:
            first = "baseline_bits", np.shape(self.baseline_bits)[:2]
        for field, rank in {"significance": 2, "block_significance": 3, "adapted_bits": 3}.items():
            for name, array in getattr(self, field).items():
                first = first or (f"{field}[{name!r}]", np.shape(array)[:2])
                if np.ndim(array) != rank or np.shape(array)[:2] != first[1]:
                    raise ValueError(
                        f"{field}[{name!r}] has shape {np.shape(array)}, expected {rank} axes that begin with the "
                        f"{first[1]} of {first[0]}"
                    )
