"""All planes of all experts in host memory, cut into pages with checksums.

A page is one refinement plane of one block. What it is made of, and which plan reads it, is defined here; which pages
are on the device is ``residency.py``'s.

Axes: L layers, E experts, P projections, F channels, N channel blocks of C channels, D hidden, G groups,
U = 3 where a page holds one projection, else 1, Q pages.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt32

from dynamo_jax.kernels.arrangements import ARRANGEMENTS
from dynamo_jax.kernels.layout import LEVELS, PROJECTIONS, WIDTHS, Pages
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes, filled_up, quantize


def quantize_experts(
    layers: list[ExpertWeights], channel_block: int, group_size: int, plans: Sequence[Plan] = ()
) -> Planes:
    """Planes of all layers' experts, rounded to nearest, arrays with axes (L, E, P, F, ..).

    plans: each expert's base scales suit the widths that these read of it; 2, 3 and 4 bits without them.
    """
    parts = []
    for index, weights in enumerate(layers):
        filled = filled_up(np.stack(weights, axis=1), channel_block, group_size)
        together: dict[tuple[int, ...], list[int]] = {}
        for expert in range(len(filled)):
            read = sorted({int(width) for plan in plans for width in plan.widths[index, expert].flat})
            together.setdefault(tuple(read) or WIDTHS[:3], []).append(expert)
        try:
            found = [quantize(filled[experts], group_size, widths) for widths, experts in together.items()]
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        order = np.argsort(np.concatenate(list(together.values())))
        parts.append(jax.tree.map(lambda *a, order=order: np.concatenate(a)[order], *found))
    return jax.tree.map(lambda *a: np.stack(a), *parts)


def page_counts(plan: Plan) -> dict[int, int]:
    """Pages of each refinement level that the plan reads."""
    return {level: int(has.sum()) for level, has in pages_of(plan).items()}


def pages_of(plan: Plan) -> dict[int, np.ndarray]:
    """For each refinement level, which pages (L, E, U*N) the plan reads."""
    widths = plan.page_widths()
    return {level: widths >= level for level in LEVELS}


def page_tables(plan: Plan) -> dict[int, Int[np.ndarray, "L E UN"]]:
    """For each refinement level, the page of each block, counted in (layer, expert, block) order; -1: none."""
    return {
        level: np.where(has, np.cumsum(has).reshape(has.shape) - 1, -1).astype(np.int32)
        for level, has in pages_of(plan).items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostPages:
    """Planes in host memory and the checksums that their pages had when they were put there. arrangement: in which
    the device takes them (``kernels.arrangements``); place: where each expert is among ``planes``, -1 for one whose
    pages other processes send."""

    planes: Planes
    channel_block: int
    together: int  # projections of a page, 3 or 1
    checksums: dict[int, UInt32[np.ndarray, "L E UN"]]
    arrangement: str = "planes"
    place: Int[np.ndarray, " E"]

    def has(self, where: Int[np.ndarray, "Q 3"]) -> Bool[np.ndarray, " Q"]:
        """Which of the pages at (layer, expert, block) this process has."""
        return self.place[where[:, 1]] >= 0

    def arrays(self, level: int, where: Int[np.ndarray, "Q 3"]) -> Any:
        """The pages at (layer, expert, block), host arrays; ValueError if one is not what it was."""
        if level not in self.planes.codes:
            raise ValueError(f"planes of {level} bits were left out; this model has {self.planes.widths}")
        codes, ratios = _cut(self.planes, self.channel_block, self.together, level, where, self.place)
        for page, found in zip(where, _sums(codes, ratios)):
            if found != self.checksums[level][tuple(page)]:
                layer, expert, block = map(int, page)
                raise ValueError(
                    f"the {level}-bit page of layer {layer}, expert {expert}, block {block} is damaged in host memory"
                )
        blocks = self.planes.scales.shape[3] // self.channel_block
        first = where[:, 2:] // blocks if self.together == 1 else np.zeros((len(where), 1), int)
        arrange = ARRANGEMENTS[self.arrangement].pages
        return arrange(Pages(codes, ratios), level, first + np.arange(self.together))


def places(experts: int, held: Int[np.ndarray, " O"] | None, own: Int[np.ndarray, " n"]) -> Int[np.ndarray, " E"]:
    """Where each of ``own`` experts is among those that are ``held`` (all, if None), -1 for the others. ValueError: one
    of them is not held."""
    held = np.arange(experts) if held is None else held
    if len(missing := np.setdiff1d(own, held)):
        raise ValueError(
            f"the planes of {len(held)} of {experts} experts are here and not those of expert {missing[0]}: the model "
            "was loaded for one of several processes; use it on the mesh that load was given"
        )
    place = np.full(experts, -1)
    place[own] = np.searchsorted(held, own)
    return place


def host_pages(
    planes: Planes, plan: Plan, arrangement: str = "planes", place: Int[np.ndarray, " E"] | None = None
) -> HostPages:
    """The pages that plans of this one's blocks read; place: as ``HostPages`` has it, by default all are there."""
    together = 1 if plan.apart else PROJECTIONS
    place = np.arange(plan.widths.shape[1]) if place is None else place
    sums = {}
    for level, has in pages_of(plan).items():
        if level not in planes.codes:
            sums[level] = np.zeros(has.shape, np.uint32)
            continue
        here = np.zeros(has.shape, bool)
        here[:, place >= 0] = True
        parts = _cut(planes, plan.channel_block, together, level, np.argwhere(here), place)
        sums[level] = np.zeros(has.shape, np.uint32)
        sums[level][here] = np.array(list(_sums(*parts)), np.uint32)
    return HostPages(
        planes=planes,
        channel_block=plan.channel_block,
        together=together,
        checksums=sums,
        arrangement=arrangement,
        place=place,
    )


def _cut(planes: Planes, channel_block: int, together: int, level: int, where: np.ndarray, place: np.ndarray) -> tuple:
    def cut(array: np.ndarray) -> np.ndarray:
        layers, experts, projections, channels, last = array.shape
        units, blocks = projections // together, channels // channel_block
        parts = np.asarray(array).reshape(layers, experts, units, together, blocks, channel_block, last)
        layer, expert, index = where.T
        return parts[layer, place[expert], index // blocks, :, index % blocks]

    return cut(planes.codes[level]), cut(planes.ratios) if level == 8 and planes.ratios is not None else None


def _sums(codes: np.ndarray, ratios: np.ndarray | None) -> list[int]:
    own = [zlib.crc32(page.tobytes()) for page in codes]
    return own if ratios is None else [zlib.crc32(page.tobytes(), start) for page, start in zip(ratios, own)]
