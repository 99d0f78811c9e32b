"""Widths for the experts of somebody else's model under one budget.

Axes: L layers of a part, E experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

from dynamo_jax.calibration.config import BUDGETS, QuantizeConfig, check_sizes, settled
from dynamo_jax.calibration.plans import allocated, part_of
from dynamo_jax.precision.plan import Plan, expert_plan, num_weights
from dynamo_jax.runtime.memory import device_bytes
from dynamo_jax.transform.analysis import ModelAnalysis
from dynamo_jax.transform.found import parts_of


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """A plan for each part of a model; layers: the names of each part's layers, by which it knows its model."""

    plans: tuple[Plan, ...]
    layers: tuple[tuple[str, ...], ...]

    def bits_per_weight(self) -> float:
        """Stored bits over the weights of all experts."""
        return 8 * self.stored_bytes() / sum(map(num_weights, self.plans))

    def stored_bytes(self) -> int:
        return sum(plan.stored_bytes() for plan in self.plans)

    def device_bytes(self, spare: float) -> int:
        """What serving takes, with spare slots for a share of the pages (``runtime.memory``)."""
        return sum(device_bytes(plan, spare).total for plan in self.plans)

    def check(self, layers: tuple[tuple[str, ...], ...]) -> None:
        """ValueError, which names the first difference: the plan is for other layers."""
        if self.layers != layers:
            ours = [name for part in self.layers for name in part]
            theirs = [name for part in layers for name in part]
            wrong = next((a for a, b in zip(ours, theirs) if a != b), None)
            raise ValueError(
                f"the plan is for another model: it has {len(ours)} layers with experts, the model {len(theirs)}"
                + (f"; {wrong} is at another place or missing" if wrong else "")
            )


def plan(
    analysis: ModelAnalysis,
    *,
    bits: float | None = None,
    bytes: int | None = None,
    fits_gib: float | None = None,
    reserve_gib: float | None = None,
    objective: str | None = None,
    weights: dict[str, float] | None = None,
    novelty_weight: float | None = None,
) -> ModelPlan:
    """The baseline: of all plans within the budget the one of least loss over the analysed datasets and, for a share
    ``novelty_weight`` of the text to come, over text that is like none of them.

    The budget is one of bits (a weight, 3 by default), bytes (of all experts) and fits_gib (device memory for the whole
    model, ``reserve_gib`` of it for caches and activations), slots for pages included: as ``QuantizeConfig`` has it,
    and so have objective, weights and novelty_weight. What is not given is as the analysis was asked for. ValueError: a
    budget that is too small or given twice, settings that are out of range.
    """
    config = analysis.config
    given = {"bits": bits, "budget_bytes": bytes, "fits_gib": fits_gib}
    changes: dict[str, object] = {}
    if any(v is not None for v in given.values()):
        changes = dict.fromkeys((*BUDGETS, "reserve_gib")) | {n: v for n, v in given.items() if v is not None}
    for name, value in (
        *(("reserve_gib", reserve_gib), ("objective", objective)),
        *(("weights", weights), ("novelty_weight", novelty_weight)),
    ):
        if value is not None:
            changes[name] = value
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    sizes = [part.sizes for part in analysis.parts]
    config = settled(config, sizes, analysis.other_bytes, list(analysis.datasets))
    parts = [part_of(part.analyses, part.sizes, config) for part in analysis.parts]
    plans = allocated(list(analysis.datasets), [p for p, _ in parts], parts[0][1], config)
    return ModelPlan(tuple(plans), tuple(part.names for part in analysis.parts))


def uniform(model: nnx.Module, width: int, channel_block: int = 16, group_size: int | None = None) -> ModelPlan:
    """The plan that gives all experts the same ``width`` (2, 3, 4 or 8 bits), without an analysis.

    channel_block: channels that share a width; group_size: weights that share a scale, by default as
    ``QuantizeConfig`` chooses it. ValueError: sizes that the model does not have, or no experts.
    """
    config = QuantizeConfig(channel_block=channel_block, group_size=group_size)
    parts, plans = parts_of(model), []
    for part in parts:
        check_sizes(part.sizes, config)
        layers, experts, channels, hidden = part.sizes
        group = config.group(hidden)
        plans.append(expert_plan(np.full((layers, experts, 2), width, np.int8), channels, channel_block, group, hidden))
    return ModelPlan(tuple(plans), tuple(part.names for part in parts))
