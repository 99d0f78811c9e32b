"""A plan: the bit-width of every channel block, and what it costs in bytes.

Axes: L layers, E experts, N channel blocks an expert.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int8

from dynamo_jax.kernels.layout import WIDTHS, block_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Widths in {2, 3, 4, 8}; ``widths[l, e, n]`` is that of channels n*channel_block .. of the expert."""

    widths: Int8[np.ndarray, "L E N"]
    channel_block: int
    group_size: int
    hidden_size: int

    def __post_init__(self) -> None:
        unknown = set(np.unique(self.widths)) - set(WIDTHS)
        if unknown:
            raise ValueError(f"plan holds widths {sorted(map(int, unknown))}; known are {WIDTHS}")

    def block_costs(self) -> Float[np.ndarray, " W"]:
        return block_costs(self.channel_block, self.hidden_size, self.group_size)

    def expert_bytes(self) -> Float[np.ndarray, "L E"]:
        """Stored bytes of each expert, scales included."""
        return self.block_costs()[np.searchsorted(WIDTHS, self.widths)].sum(axis=2)

    def stored_bytes(self) -> int:
        return int(self.expert_bytes().sum())

    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes() / num_weights(self)

    def bytes_per_token(self, counts: Float[np.ndarray, "L E"], tokens: float) -> float:
        """Expert bytes that one token reads on the mean, when ``counts`` of ``tokens`` went to each expert."""
        return float((self.expert_bytes() * counts).sum() / tokens)


def block_costs(channel_block: int, hidden_size: int, group_size: int) -> Float[np.ndarray, " W"]:
    """Bytes of one channel block at each width."""
    return np.array([block_bytes(b, channel_block, hidden_size, group_size) for b in WIDTHS], np.float64)


def num_weights(plan: Plan) -> int:
    return 3 * plan.widths.size * plan.channel_block * plan.hidden_size


def expert_plan(
    widths: Int8[np.ndarray, "L E"], blocks: int, channel_block: int, group_size: int, hidden_size: int
) -> Plan:
    """The plan in which all blocks of an expert share its width."""
    full = np.repeat(np.asarray(widths, np.int8)[:, :, None], blocks, axis=2)
    return Plan(widths=full, channel_block=channel_block, group_size=group_size, hidden_size=hidden_size)
