"""A plan: the bit-width of every channel block, and what it costs in bytes.

Axes: L layers, E experts, N channel blocks an expert, P = 3 projections, F channels, M = N or, where projections are
apart, 2 N: what has a width of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Int8

from dynamo_jax.kernels.layout import PROJECTIONS, WIDTHS, block_bytes, filled, num_blocks

APART = (2, 1)  # projections that share a width where they do not all: gate and up, then down


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Widths in {2, 3, 4, 8}; ``widths[l, e, n]`` is that of channels n*channel_block .. of the expert.

    apart: gate and up have one width, down another; ``widths[l, e]`` are then those of the N blocks in gate and up,
    and behind them those of the N blocks in down. channels: of an expert, N * channel_block where none are given; the
    last block, and the last group along ``hidden_size``, may be filled up (``kernels.layout``). ValueError: another
    width, or sizes that do not fit each other.
    """

    widths: Int8[np.ndarray, "L E M"]
    channel_block: int
    group_size: int
    hidden_size: int
    apart: bool = False
    channels: int = 0

    def __post_init__(self) -> None:
        unknown = set(np.unique(self.widths)) - set(WIDTHS)
        if unknown:
            raise ValueError(f"plan holds widths {sorted(map(int, unknown))}; known are {WIDTHS}")
        for name in ("channel_block", "group_size", "hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} {value!r} is no positive whole number")
        if np.ndim(self.widths) != 3:
            raise ValueError(
                f"plan has widths of the shape {np.shape(self.widths)}, expected (layers, experts, blocks)"
            )
        if self.apart and np.shape(self.widths)[-1] % 2:
            raise ValueError(f"plan has {np.shape(self.widths)[-1]} widths an expert, expected two for each block")
        if self.group_size % 8 or not 8 <= self.group_size <= self.hidden_size:
            raise ValueError(
                f"group_size {self.group_size} is no multiple of 8 up to the hidden size {self.hidden_size}"
            )
        whole = self.blocks * self.channel_block
        if not self.channels:
            object.__setattr__(self, "channels", whole)
        if filled(self.channels, self.channel_block) != whole:
            raise ValueError(f"{self.channels} channels are not {self.blocks} blocks of {self.channel_block}")

    @property
    def blocks(self) -> int:
        """N"""
        return self.widths.shape[-1] // (2 if self.apart else 1)

    def costs(self) -> Float[np.ndarray, "M W"]:
        """Bytes of what each width of an expert is for, at each width."""
        return item_costs(self.blocks, self.channel_block, self.hidden_size, self.group_size, self.apart)

    def chosen(self, values: Float[np.ndarray, "L E M W"]) -> Float[np.ndarray, "L E M"]:
        """Of values at all widths those at the plan's."""
        at = np.searchsorted(WIDTHS, self.widths)
        return np.take_along_axis(values, at[..., None], axis=-1)[..., 0]

    def pages(self) -> Int[np.ndarray, " M"]:
        """Pages of a level that each width of an expert stands for: a page holds what one width must serve."""
        return np.repeat(APART, self.blocks) if self.apart else np.ones(self.blocks, int)

    def page_widths(self) -> Int8[np.ndarray, "L E Np"]:
        """The width of each page: of the N blocks, or of those of gate, of up and of down in turn."""
        if not self.apart:
            return self.widths
        layers, experts, _ = self.widths.shape
        each = self.widths.reshape(layers, experts, 2, self.blocks)
        return each[:, :, [0, 0, 1]].reshape(layers, experts, -1)

    def channel_widths(self) -> Int8[np.ndarray, "L E P F"]:
        """The width of every channel of gate, of up and of down, with those that fill up the last block."""
        layers, experts, _ = self.widths.shape
        pages = self.page_widths().reshape(layers, experts, -1, self.blocks)
        each = np.broadcast_to(pages, (layers, experts, PROJECTIONS, self.blocks))
        return np.repeat(each, self.channel_block, axis=3)

    def expert_bytes(self) -> Float[np.ndarray, "L E"]:
        """Stored bytes of each expert, scales included."""
        costs = self.costs()
        return self.chosen(np.broadcast_to(costs, (*self.widths.shape[:2], *costs.shape))).sum(axis=2)

    def stored_bytes(self) -> int:
        """Bytes of the planes that the plan reads, all experts together, scales included."""
        return int(self.expert_bytes().sum())

    def bits_per_weight(self) -> float:
        """Stored bits over the weights of the experts, without what fills up blocks and groups."""
        return 8 * self.stored_bytes() / num_weights(self)

    def bytes_per_token(self, counts: Float[np.ndarray, "L E"], tokens: float) -> float:
        """Expert bytes that one token reads on the mean, when ``counts`` of ``tokens`` went to each expert."""
        return float((self.expert_bytes() * counts).sum() / tokens)

    def bytes_per_step(self, use: Float[np.ndarray, "L E"], batch: int) -> float:
        """Expert bytes that a step of ``batch`` tokens is expected to read, where a token has ``use`` rows at each
        expert. An expert is read once, however many of the tokens go to it.
        """
        return float((self.expert_bytes() * touched_share(use, batch)).sum())


def touched_share(use: Float[np.ndarray, "*A"], batch: int) -> Float[np.ndarray, "*A"]:
    """How likely at least one of ``batch`` tokens goes to an expert that a token goes to with likelihood ``use``."""
    return 1 - (1 - np.clip(use, 0, 1)) ** batch


def block_costs(channel_block: int, hidden_size: int, group_size: int) -> Float[np.ndarray, " W"]:
    """Bytes of one channel block at each width."""
    return np.array([block_bytes(b, channel_block, hidden_size, group_size) for b in WIDTHS], np.float64)


def item_costs(
    blocks: int, channel_block: int, hidden_size: int, group_size: int, apart: bool
) -> Float[np.ndarray, "M W"]:
    """Bytes of each of an expert's widths: of a block's three projections, or of two, then of one."""
    shares = np.repeat(APART, blocks) / PROJECTIONS if apart else np.ones(blocks)
    return shares[:, None] * block_costs(channel_block, hidden_size, group_size)


def num_weights(plan: Plan) -> int:
    """Of all experts, without what fills up their planes."""
    layers, experts, _ = plan.widths.shape
    return PROJECTIONS * layers * experts * plan.channels * plan.hidden_size


def expert_plan(
    widths: Int8[np.ndarray, "L E *U"], channels: int, channel_block: int, group_size: int, hidden_size: int
) -> Plan:
    """The plan in which all blocks of an expert share its width, or its two: of gate and up, and of down."""
    blocks = num_blocks(channels, channel_block)
    each = np.asarray(widths, np.int8)
    full = np.repeat(each, blocks, axis=2) if each.ndim == 3 else np.repeat(each[:, :, None], blocks, axis=2)
    return Plan(
        widths=full,
        channel_block=channel_block,
        group_size=group_size,
        hidden_size=hidden_size,
        apart=each.ndim == 3 and each.shape[2] == 2,
        channels=channels,
    )
