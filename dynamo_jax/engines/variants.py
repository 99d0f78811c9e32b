"""What a request says of its precision, and the folders that say which variants there are. No engine is imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from dynamo_jax.files import shown
from dynamo_jax.models.families.family import Raw
from dynamo_jax.precision.plan import Plan
from dynamo_jax.runtime import memory
from dynamo_jax.runtime.mesh import Placement
from dynamo_jax.runtime.residency import largest_shard, shards_of
from dynamo_jax.storage import checkpoint

AUTO = -1  # of a request that leaves the choice to its monitor


@dataclasses.dataclass(frozen=True)
class Variants:
    """Of the quantized model in ``folder``: its own plan is variant 0, ``others`` are variants 1, 2, ..

    adapts: one more, which follows the texts of requests that name none, behind the first in the state (``number``).
    watched: whether requests have monitors, without which nothing adapts.
    """

    folder: Path
    others: tuple[Plan, ...] = ()
    adapts: bool = True
    watched: bool = True

    def plans(self, plan: Plan) -> list[Plan]:
        """Of the state's variants at the start, all but the first, which is ``plan``."""
        return [*[plan] * self.adapts, *self.others]

    def slots(self, plan: Plan, spare: float, placement: Placement | None = None) -> dict[int, int]:
        """Slots for pages of each level: those that any of the variants reads, and where one adapts, spare ones.
        spare: a share of the plan's pages. placement: of one of several devices, which all have as many."""
        largest, shards = largest_shard(placement, [plan, *self.others]), shards_of(placement)
        if not self.adapts:
            return largest
        more, most = memory.spare_slots(plan, spare), plan.page_widths().size // shards
        return {level: min(count - (-more[level] // shards), most) for level, count in largest.items()}

    def asked(self, key: str | None) -> int:
        """The number of the state's variant that a request's key, "variant=N", names; ``AUTO`` where it has none.
        ValueError: another key, or no such variant."""
        if key is None or key == "variant=auto":
            return AUTO if self.adapts else 0
        found, last = re.fullmatch(r"variant=(\d{1,4})", key), len(self.others)
        if not found or (number := int(found[1])) > last:
            raise ValueError(f'extra_key {shown(key)}: expected "variant=N", N from 0 to {last}, or "variant=auto"')
        return number + self.adapts if number else 0


def variants_of(
    folder: str | Path, others: Sequence[str | Path] = (), adapts: bool = True, watched: bool = True
) -> Variants:
    """The variants that serve ``folder``: its own plan, then those of ``others``, folders of the same model quantized
    at other widths, of which only the plan is read; and one that adapts.

    ValueError: a folder that is no quantized model, or a plan of other sizes.
    """
    own = checkpoint.read_description(Path(folder)).plan
    plans = tuple(checkpoint.read_description(Path(other)).plan for other in others)
    for other, plan in zip(others, plans):
        for name in ("channel_block", "group_size", "hidden_size", "apart", "channels"):
            if (found := getattr(plan, name)) != (wanted := getattr(own, name)):
                raise ValueError(f"{other}: {name} is {found}, of {folder} {wanted}: not variants of one model")
        if plan.widths.shape != own.widths.shape:
            raise ValueError(f"{other}: widths are {plan.widths.shape}, of {folder} {own.widths.shape}")
    return Variants(Path(folder).absolute(), plans, adapts and watched, watched)


def architectures_of(variants: Variants, raw: Raw) -> list[str]:
    """The names under which engines look for the model's class, from its ``config.json``. ValueError: none."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{variants.folder}/config.json: architectures is {shown(names)}, expected a list of names")
    return names
