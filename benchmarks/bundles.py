"""What the TPU compiler makes of a function, for a chip that is not here: its final schedule, counted.

    python benchmarks/bundles.py       # kernels whose cost is known, for each chip

A TPU core issues one bundle of instructions a cycle, in the order that the compiler chose, so the bundles of a Pallas
kernel's grid loop are its cycles a step as long as nothing stalls. The compiler writes its last schedule down
(``--xla_jf_dump_to``), and what is read of it is:

    loop        bundles between the loop's first and its last, executed once a grid step
    regions     runs of bundles that a branch may jump over: one ``pl.when`` each. A branch names the region that it
                jumps to the end of, and the bundle after that end names it again; of regions that hold others the
                innermost are meant
    holders     regions that hold others, but for one that holds all others: the pipeline's guard, which always runs
    always      bundles of the loop that are in no region: they run in every step, or in those that run a holder

A step's cycles are ``always`` and those of the regions that it runs. How often a region runs, only the caller knows.
Beside the bytes that the step moves this bounds its time: max(cycles / clock, bytes / bandwidth). That is a model: it
leaves out stalls, the latency of copies and all contention.

Import this before jax: libtpu reads the environment once, when it loads.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="schedule-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here touches a chip
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.sharding import (  # noqa: E402
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from dynamo_jax.kernels.tpu_steps import Core  # noqa: E402

ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)")
BRANCH = re.compile(r"sbr\.rel \(!?%p\S+\) target = \$region(\d+)")
TOP = "TLP"  # the program that calls all others
CALL = re.compile(r"\b(?:inlined_)?call [^/]*/\* %(\S+) = ([a-z-]+)\(")
TURNS = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
REGION_END = re.compile(r"empty region (\d+)")


@dataclasses.dataclass(frozen=True)
class Chip:
    """topology: a name that the compiler knows; clock in Hz and bandwidth of one core's memory in bytes a second."""

    topology: str
    clock: float
    bandwidth: float
    core: Core


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 820e9, Core(128, True)),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2765e9, Core(128, False)),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9, Core(256, True)),
    # half of a chip has 3,700e9; what a copy was measured to move there is in tpu-inference's issue 3520
    "tpu7x": Chip("tpu7x:2x2x1", 1.9e9, 3210e9, Core(256, False)),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles of a kernel's grid loop. regions: of each innermost ``pl.when`` in it, in the order of the program;
    always: of what is in none; holders: of each outermost ``pl.when`` that holds others, its own bundles, which are in
    ``always``, and the places in ``regions`` of those that it holds."""

    always: int
    regions: tuple[int, ...]
    holders: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def total(self) -> int:
        return self.always + sum(self.regions)

    def without_holders(self) -> Loop:
        """Of the steps that run none of them."""
        held = {place for _, places in self.holders for place in places}
        left = tuple(size for place, size in enumerate(self.regions) if place not in held)
        return Loop(self.always - sum(own for own, _ in self.holders), left)


def compiled(chip: Chip, function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, Loop]]:
    """``function`` compiled for one core of the chip, given ``jax.ShapeDtypeStruct``s, and the loops of the programs in
    it that have one, by name."""
    devices = topologies.get_topology_desc(chip.topology, platform="tpu").devices
    placed = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    device = AbstractDevice(devices[0].device_kind, 1, "tpu")  # what libraries that ask for the chip see
    for path in DUMP.iterdir():
        path.unlink()
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        jitted = jax.jit(function, in_shardings=jax.tree.map(lambda _: placed, arguments))
        out = jitted.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    loops = {name: loop_of(schedule) for name, schedule in _schedules().items()}
    return out, {name: loop for name, loop in loops.items() if loop}


def _schedules() -> dict[str, str]:
    """The final schedule of each program that was compiled last, by name."""
    names = [path for path in sorted(DUMP.glob("*final_bundles.txt")) if "schedule-analysis" not in path.name]
    return {re.sub(r"-\d+-final_bundles\.txt$", "", path.name.split("-", 1)[1]): path.read_text() for path in names}


@dataclasses.dataclass(frozen=True)
class Around:
    """What a program runs beside its kernels, in each turn of its loop or outside of it. operations: how many programs
    of XLA's own; cycles: their bundles, of their own loops as often as they turn, and those of what calls them;
    partly: how many operations have loops that were counted as if they turned once; slowest: the cycles of each, most
    first."""

    operations: int
    cycles: int
    partly: int
    slowest: tuple[tuple[str, int], ...]


def around() -> tuple[Around, Around, int]:
    """Of the program that was compiled last: outside of its loop, in it, and how many more operations are left to
    another core of the chip, whose time nothing here says. ValueError: calls in a loop of the loop."""
    schedules = _schedules()
    (top,) = (name for name in schedules if name.endswith(TOP))
    (graph,) = (path.read_text() for path in DUMP.glob(f"*{TOP}-hlo.txt"))
    (alike,) = (path.read_text() for path in DUMP.glob(f"*{TOP}-00-deduplication-map.txt"))
    groups = [set(group.split()) for group in re.split(r"key:.*\n.*\n.*\n", alike)]
    found: tuple[list[tuple[str, int]], ...] = [], []
    own, partly = [0, 0], [0, 0]
    for line in schedules[top].splitlines():
        if not (address := ADDRESS.match(line)):
            continue
        depth = address.group(3).count(">")
        own[min(depth, 1)] += 1
        for name, kind in CALL.findall(line):
            if depth > 1:
                raise ValueError(f"{name} is called in a loop of the loop, as often as nothing here says")
            if kind != "custom-call":  # but for kernels
                same = next((group for group in groups if name in group), {name})
                cycles, in_all = max(_cycles(schedules[other]) for other in same if other in schedules)
                found[depth].append((name, cycles))
                partly[depth] += not in_all
    once, in_loop = (
        Around(len(each), sum(cycles for _, cycles in each) + bundles, some, tuple(sorted(each, key=lambda of: -of[1])))
        for each, bundles, some in zip(found, own, partly)
    )
    return once, in_loop, len(re.findall(r"custom-call-start\(.*sparsecore", graph))


def _cycles(schedule: str) -> tuple[int, bool]:
    """Of a program of XLA's own, and whether that is all: one whose loops turn as often as no test or several tests
    say is counted as if they turned once."""
    depths = [match.group(3).count(">") for match in map(ADDRESS.match, schedule.splitlines()) if match]
    turns = [int(turn) for turn in TURNS.findall(schedule)]
    loops = sum(now > before for before, now in itertools.pairwise([0, *depths]))
    if max(depths) > 1 or loops != len(turns) or len(set(turns)) > 1:
        return len(depths), False
    return len(depths) + sum(depth > 0 for depth in depths) * (max(turns, default=1) - 1), True


def loop_of(schedule: str) -> Loop | None:
    """The longest of the outermost loops of a schedule; None where there is none."""
    loops: list[list[int]] = []  # the first and the last bundle of each; bundles of a loop need not say that they are
    opened: list[tuple[str, int]] = []
    found: list[tuple[int, int]] = []
    for line in schedule.splitlines():
        match = ADDRESS.match(line)
        if match is None:
            continue
        at = int(match.group(1), 16)
        depth = match.group(3).count(">")
        if depth and (not loops or (depth == 1 and match.group(2) == "LB")):
            loops.append([at, at])
        elif depth:
            loops[-1][1] = at
        ended = set(REGION_END.findall(line))
        found += [(start, at) for name, start in opened if name in ended]
        opened = [(name, start) for name, start in opened if name not in ended]
        if branch := BRANCH.search(line):
            opened.append((branch.group(1), at + 1))
    if not loops:
        return None
    first, last = max(loops, key=lambda ends: ends[1] - ends[0])
    inside = sorted({(a, b) for a, b in found if first <= a < b <= last + 1})
    held = {(a, b): [(c, d) for c, d in inside if (c, d) != (a, b) and a <= c and d <= b] for a, b in inside}
    innermost = [region for region in inside if not held[region]]
    holders = [region for region in inside if held[region] and len(held[region]) < len(inside) - 1]
    holders = [region for region in holders if not any(region in held[other] for other in holders)]
    sizes = tuple(b - a for a, b in innermost)
    own = []
    for a, b in holders:
        places = tuple(place for place, region in enumerate(innermost) if region in held[a, b])
        own.append((b - a - sum(sizes[place] for place in places), places))
    return Loop(last + 1 - first - sum(sizes), sizes, tuple(own))


def write(path: Path | None, **found: Any) -> None:
    """What a benchmark found, with what compiled it; nowhere without a path."""
    if path:
        path.write_text(json.dumps({**found, **versions()}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {"jax": jax.__version__, "libtpu": version("libtpu")}


def known(dots: int, conditional: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A kernel with ``dots`` products in every step and ``conditional`` more in one ``pl.when``."""
    rows, size, steps = 16, 512, 8

    def kernel(x: Any, w: Any, out: Any, total: Any) -> None:
        for _ in range(dots):
            total[...] = jnp.dot(total[...].astype(jnp.bfloat16), w[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            total[...] = x[...].astype(jnp.float32)
            for _ in range(conditional):
                total[...] = jnp.dot(total[...].astype(jnp.bfloat16), w[...], preferred_element_type=jnp.float32)

        out[...] = total[...]

    function = pl.pallas_call(
        kernel,
        name="known",
        grid=(steps,),
        in_specs=[pl.BlockSpec((rows, size), lambda i: (0, 0)), pl.BlockSpec((size, size), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((rows, size), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, size), jnp.float32),
        scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32)],
    )
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, size), (steps * size, size))]
    return function, tuple(arguments)


def main() -> None:
    print(f"{'chip':6s} {'products':>9s} {'in pl.when':>11s} {'always':>7s}  regions")
    for name, chip in CHIPS.items():
        for dots, conditional in ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2), (1, 4)):
            function, arguments = known(dots, conditional)
            loop = compiled(chip, function, *arguments)[1]["known.1"]
            print(f"{name:6s} {dots:9d} {conditional:11d} {loop.always:7d}  {loop.regions}")


if __name__ == "__main__":
    main()
