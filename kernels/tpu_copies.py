"""What a step of the TPU kernel copies: planes that lie in one piece, pages that lie alone, and a tile's rows.

Axes: as in ``tpu_steps.py``, and W sublanes of a row as words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dynamo_jax.kernels.tiles import SUBLANES
from dynamo_jax.kernels.tpu_steps import Fetches, Shape, Steps


class StepAt(NamedTuple):
    """A step: its number among those of all groups, its expert, the first of its blocks, of which a last step has some
    that the step before had too, where steps do not divide the blocks, how many of them are not copied, and its pages'
    runs, by level."""

    number: Any
    expert: Any
    first: Any
    skipped: Any
    runs: dict[int, list[Any]]


def copies_of(
    shape: Shape, steps: Steps, inputs: dict[str, Any], planes: dict[int, list[Any]], copied: Any
) -> tuple[Callable, Callable]:
    """Two functions of a step, a buffer, a condition or None and what is to be done with each copy: of all that lies in
    one piece, which the compiler makes instructions with a condition; and in loops, of pages that lie alone."""

    def in_pieces(of: StepAt, buffer: Any, when: Any, run: Callable[[Any], None]) -> None:
        count = shape.blocks - of.skipped
        for whole, here in zip(inputs["base"], planes[2]):
            from_ = whole.at[steps.layer[0], of.expert, pl.ds(of.first + of.skipped, count)]
            copy(from_, here.at[buffer, pl.ds(of.skipped, count)], copied.at[buffer], when, run)
        for level, runs in of.runs.items():
            for unit, first in enumerate(runs):
                there = first >= 0 if when is None else when & (first >= 0)
                for pool, here in zip(inputs["pages"][level], planes[level]):
                    into = here.at[pl.ds((buffer * shape.units + unit) * shape.blocks + of.skipped, count)]
                    copy(pool.at[pl.ds(first + of.skipped, count)], into, copied.at[buffer], there, run)

    def alone(of: StepAt, buffer: Any, when: Any, run: Callable[[Any], None]) -> None:
        for level, fetch in steps.reads.fetches.items():

            def one(j: Any, _: Any, level: int = level, fetch: Fetches = fetch) -> int:
                index = of.number * (shape.blocks * shape.units) + j
                page, place = fetch.page[index], buffer * (shape.blocks * shape.units) + fetch.place[index]
                for pool, here in zip(inputs["pages"][level], planes[level]):
                    run(pltpu.make_async_copy(pool.at[page], here.at[place], copied.at[buffer]))
                return 0

            jax.lax.fori_loop(0, jnp.where(True if when is None else when, fetch.single[of.number], 0), one, 0)

    return in_pieces, alone


def rows_of(steps: Steps, tile: Any, sublanes: int, memory: Any, fast: Any) -> tuple[Any, Any]:
    """A tile's rows, as many as it has, as words in memory (R W, 128) and in fast memory (M W, 128)."""
    first, count = (pl.multiple_of(rows[tile] * sublanes, SUBLANES) for rows in (steps.tiles.first, steps.tiles.rows))
    return memory.at[pl.ds(first, count)], fast.at[pl.ds(0, count)]


def copy(from_: Any, into: Any, copied: Any, when: Any, run: Callable[[Any], None]) -> None:
    """Do something with a copy, where ``when`` is None or holds."""
    one = lambda: run(pltpu.make_async_copy(from_, into, copied))  # noqa: E731
    one() if when is None else pl.when(when)(one)
