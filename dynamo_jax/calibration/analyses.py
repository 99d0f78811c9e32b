"""What calibration found of each dataset: its sums, those of its halves, and what moves between datasets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tokenizers
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dynamo_jax.analysis.dynamics import Dynamics, Significance, dynamics
from dynamo_jax.analysis.significance import (
    apart_significance,
    block_significance,
    channel_significance,
    expert_significance,
)
from dynamo_jax.analysis.statistics import Statistics, merge
from dynamo_jax.calibration.config import UNSEEN, QuantizeConfig
from dynamo_jax.texts.windows import token_windows


class Analysis(NamedTuple):
    """What calibration found of one dataset; significance is in nats a token that a width loses, predicted.

    stats: sums over its tokens (``analysis.statistics``, which gives their shapes). sensitivity: sum of its tokens'
    importance, by layer: nats for each squared output error. windows: routed tokens of each window, in K pieces of
    about 256 tokens. halves: the same of the first half of its windows and of the rest (no tokens if there is one
    window). Source: docs/design.md.
    """

    stats: Statistics
    sensitivity: Float[np.ndarray, " L"]
    windows: Float[np.ndarray, "S K L E"]
    halves: tuple[Analysis, ...] = ()

    def expert_significance(self) -> Float[np.ndarray, "L E W"]:
        """Of each expert at each width (2, 3, 4, 8 bits)."""
        return expert_significance(self.stats)

    def apart_significance(self) -> Float[np.ndarray, "L E U W"]:
        """Of its gate with up, and of its down, one without the other."""
        return apart_significance(self.stats)

    def block_significance(self) -> Float[np.ndarray, "L E N W"]:
        """Of each of its channel blocks, the others exact."""
        return block_significance(self.stats)

    def channel_significance(self, down: Float[ArrayLike, "L E F D"]) -> Float[np.ndarray, "L E F"]:
        """The output energy that goes through each channel, given the down projections; not in nats."""
        return channel_significance(self.stats, down)


def known_windows(
    known: dict[str, str], tokenizer: tokenizers.Tokenizer, config: QuantizeConfig, vocab_size: int | None = None
) -> dict[str, Int[np.ndarray, "S T1"]]:
    """The first windows of each text, as many as calibration takes; of one that is named ``unseen`` as many as stand
    for text that nobody has seen. vocab_size: of the model, which ids are checked by.

    ValueError: no text, one of less than a window, an id that the model does not know.
    """
    others = len(known) - (UNSEEN in known)
    if not others:
        raise ValueError("no known dataset: calibration needs at least one")
    counts = dict.fromkeys(known, config.calibration_windows) | {UNSEEN: config.unseen_count(others)}
    return {
        name: token_windows(text, tokenizer, config.window, name, counts[name], vocab_size)
        for name, text in known.items()
    }


def whole(first: Analysis, second: Analysis) -> Analysis:
    """A dataset from its halves."""
    windows = np.concatenate([first.windows, second.windows])
    sensitivity = first.sensitivity + second.sensitivity
    return Analysis(merge(first.stats, second.stats), sensitivity, windows, (first, second))


def dynamics_of(analyses: dict[str, Analysis]) -> Dynamics:
    """How far routing and the significance at the least width move between the datasets and within them."""

    def at_least_width(a: Analysis) -> Significance:
        return Significance(a.expert_significance()[..., 0], a.block_significance()[..., 0])

    return dynamics(
        {n: a.windows.sum(axis=1) for n, a in analyses.items()},
        {n: at_least_width(a) for n, a in analyses.items()},
        {n: (at_least_width(a.halves[0]), at_least_width(a.halves[1])) for n, a in analyses.items()},
    )
