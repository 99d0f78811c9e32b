"""From significance to a plan: the least loss of the text to come under the byte budget.

The text to come is like the known datasets but for a share, ``QuantizeConfig.novelty_weight``, that is like none of
them. What that share loses was measured, where a dataset stands for it (``calibration.unseen``), or is expected
(``expecting``).

Axes: A datasets, L layers, E experts, U widths of an expert, W widths to choose from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dynamo_jax.analysis.significance import cost_of_row
from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import UNSEEN, QuantizeConfig, check_weights
from dynamo_jax.calibration.sweeps import Draft
from dynamo_jax.kernels.layout import WIDTHS, num_blocks
from dynamo_jax.models.config import ExpertSizes, ModelConfig
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.models.huggingface import load_config
from dynamo_jax.precision.allocate import allocate_known
from dynamo_jax.precision.plan import Plan, expert_plan, item_costs
from dynamo_jax.runtime.memory import device_bytes

UNSEEN_PRIOR_ROWS = 8  # of its layer's experts, in what a row of unseen text costs at each expert
UNSEEN_COST = 3.0  # of a row of unseen text, in those of known rows at the same expert (benchmarks/unseen.py)


def expecting(
    losses: Float[np.ndarray, "A L E U W"],
    counts: Float[np.ndarray, "A L E"],
    tokens: Float[np.ndarray, " A"],
    weights: Float[np.ndarray, " A"],
    share: float,
) -> Float[np.ndarray, "A L E U W"]:
    """Losses of each dataset, nats a token, when ``share`` of its text to come is text that nobody has seen.

    Text that nobody has seen is taken to use the experts of a layer alike, and its rows to cost at each expert
    ``UNSEEN_COST`` times what the rows of all datasets together cost there, each dataset counted by its weight.

    counts: rows of each expert. tokens, weights: of each dataset.
    """
    weights = weights / weights.max()
    rows = np.tensordot(weights, counts, axes=1)
    cost = cost_of_row(np.tensordot(weights * tokens, losses, axes=1), rows, UNSEEN_PRIOR_ROWS)
    use = rows.mean(axis=1) / (weights @ tokens)
    return (1 - share) * losses + share * UNSEEN_COST * use[:, None, None, None] * cost


def favoured(
    drafts: list[Draft], names: list[str], config: QuantizeConfig, sizes: list[ExpertSizes]
) -> list[Float[np.ndarray, "L E U 3"]]:
    """The emphasis of each expert of each part: ``config.emphasis``, with ``config.favour`` at its width in a drafted
    plan.

    A draft holds the halves of each dataset, as calibration has them.
    """
    parts = []
    for draft, own in zip(drafts, sizes):
        whole = Draft(*(a[0::2] + a[1::2] for a in draft))
        losses = whole.errors * (whole.sensitivity / whole.tokens[:, None] ** 2)[:, :, None, None, None]
        parts.append(Part(own, losses, whole.counts))
    found = []
    for drafted in allocated(names, parts, whole.tokens, config):
        widths = drafted.widths[:, :, :: drafted.blocks, None]
        found.append(np.where(widths == np.array(WIDTHS[:3]), config.favour, 1.0) * np.array(config.emphasis))
    return found


def plan(
    analyses: dict[str, Analysis], model: Decoder | ModelConfig | str | Path, config: QuantizeConfig | None = None
) -> Plan:
    """The baseline: of all plans under the byte budget the one of least loss over the analysed datasets and, for a
    share ``novelty_weight`` of the text to come, over text that is like none of them: the dataset ``unseen``.

    model: that the analyses are of, its configuration, or its Hugging Face folder. ``config`` says what the budget is
    and what counts (``objective``, ``weights``, ``novelty_weight``, ``per_projection``); its group size is that of the
    analyses.

    ValueError: a budget below that of 2 bits everywhere, or by fits_gib, which needs to know more than these; two
    widths an expert where one was analysed; weights for a dataset that was not analysed. Source: docs/design.md,
    "Baseline".
    """
    if isinstance(model, (str, Path)):
        model = load_config(Path(model))
    config, model = config or QuantizeConfig(), model if isinstance(model, ModelConfig) else model.config
    check_weights(config, list(analyses))
    part, tokens = part_of(analyses, model.expert_sizes, config)
    return allocated(list(analyses), [part], tokens, config)[0]


class Part(NamedTuple):
    """Alike experts of a model: what each dataset loses at each of their widths, and its rows there."""

    sizes: ExpertSizes
    losses: Float[np.ndarray, "A L E U W"]
    counts: Float[np.ndarray, "A L E"]


def part_of(
    analyses: dict[str, Analysis], sizes: ExpertSizes, config: QuantizeConfig
) -> tuple[Part, Float[np.ndarray, " A"]]:
    """What the plan of these experts is chosen by, and the tokens of each dataset. ValueError: analysed with one width
    an expert where ``config`` asks for two."""
    losses = {
        name: a.apart_significance() if config.per_projection else a.expert_significance()[:, :, None]
        for name, a in analyses.items()
    }
    if missing := [name for name, loss in losses.items() if loss.shape[2] == 0]:
        raise ValueError(
            f"{missing[0]}: analysed with one width an expert, so that the plan needs per_projection=False"
        )
    stats = [a.stats for a in analyses.values()]
    counts = np.stack([np.asarray(s.counts, np.float64) for s in stats])
    tokens = np.array([s.tokens[0] for s in stats], np.float64)
    return Part(sizes, np.stack(list(losses.values())), counts), tokens


def allocated(
    names: list[str], parts: list[Part], tokens: Float[np.ndarray, " A"], config: QuantizeConfig
) -> list[Plan]:
    """The plan of each part, chosen together: all parts share one budget. names: of the datasets, whose losses the
    parts have in this order; ``unseen`` is none of the known ones."""
    choices = len(config.widths)
    known = [i for i, name in enumerate(names) if name != UNSEEN]
    weights = np.array([(config.weights or {}).get(names[i], 1.0) for i in known])
    share = config.novelty_weight
    items, costs = [], []
    for part in parts:
        if UNSEEN in names:
            expected = (1 - share) * part.losses[known] + share * part.losses[names.index(UNSEEN)]
        else:
            expected = expecting(part.losses, part.counts, tokens, weights, share)
        items.append(expected.reshape(len(known), -1, len(WIDTHS))[..., :choices])
        costs.append(_costs(part.sizes, config))
    together = np.concatenate(items, axis=1), np.concatenate([c[:, :choices] for c in costs])

    def within(budget: float) -> list[Plan]:
        widths = allocate_known(*together, budget, config.objective, weights)
        each = np.split(widths, np.cumsum([len(c) for c in costs])[:-1])
        return [_expert_plan(part.sizes, own, config) for part, own in zip(parts, each)]

    budget = config.bytes_for(sum(part.sizes.weights for part in parts))
    return _fitting(within, budget, float(sum(c[:, 0].sum() for c in costs)), config.spare)


def _costs(sizes: ExpertSizes, config: QuantizeConfig) -> Float[np.ndarray, "LEU W"]:
    """Bytes of what has a width of its own. For a page of the baseline there is a share of a spare slot."""
    blocks, group_size = num_blocks(sizes.channels, config.channel_block), config.group(sizes.hidden_size)
    costs = item_costs(blocks, config.channel_block, sizes.hidden_size, group_size, config.per_projection)
    costs = costs[::blocks] * blocks
    costs += config.spare * (costs - costs[:, :1])
    return np.tile(costs, (sizes.layers * sizes.experts, 1))


def _expert_plan(sizes: ExpertSizes, widths: Int[np.ndarray, " LEU"], config: QuantizeConfig) -> Plan:
    each = widths.reshape(sizes.layers, sizes.experts, -1)
    group_size = config.group(sizes.hidden_size)
    return expert_plan(each, sizes.channels, config.channel_block, group_size, sizes.hidden_size)


def _fitting(within: Callable[[float], list[Plan]], budget: float, least: float, spare: float) -> list[Plan]:
    """The plans of ``within`` whose bytes on the device, page tables and rounded slots too, are within ``budget``."""
    left = budget
    while True:
        found = within(left)
        over = sum(device_bytes(plan, spare).total for plan in found) - budget
        if over <= 0 or left <= least:
            return found
        left = max(left - over, least)
