"""What XLA does around the experts' kernel in each layer of a model, on TPUs that are not here.

    python benchmarks/tpu_layer.py [--chip v6e] [--shape olmoe-1b-7b] [--tokens 8] [--json PATH]

A layer gets its tokens and their routing, and gives the outputs of the tokens' experts. Around the kernel rows are put
in the order of their experts, gathered, and added up again for each token. Layers run in a loop, as those of a stacked
model do. What is around each of two kernels is counted from the compiler's final schedule (``bundles.py``):

    ours           planes of 2, 3 and 4 bits, two variants, each token with its own: ``runtime.switch``
    gmm_v2 int4    the kernel of tpu-inference, two calls and the activation between them, around which the same order,
                   gathering and adding up stand as around ours; no rows where that package is missing

"operations" are XLA's own programs in a layer, and "cycles" theirs, with those of what calls them, but for waiting: for
memory, and for each other. Of "partly" operations, rows have their number, loops turn as often as the schedule does not
say, and are counted as if they turned once. "once" are the operations outside of the loop, and their cycles for each of
``LAYERS`` layers: ours reads its page tables there. "offloaded" are more operations, that the compiler leaves to
another core of the chip (the SparseCore); how long they take nothing here says. "kernel us" is the kernel's own
modelled time at mixed 3 bits, or 4, from the rows of ``tpu_schedule.py``.
"""

from __future__ import annotations

import bundles  # isort: skip  (before jax)

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from layers import BATCHES, SHAPES, TOKENS, Layer
from tpu_schedule import GROUP, LAYERS, PEERS, ROUNDED, even, found, tiled_shapes, tilings

from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.models.experts import ExpertForm, silu_gated
from dynamo_jax.models.routing import Routing
from dynamo_jax.runtime.switch import switched_experts

SCHEDULE = Path(__file__).parent / "results" / "tpu_schedule.json"
VARIANTS = 2


def routed(layer: Layer, tokens: int) -> tuple[Any, ...]:
    """Shapes of tokens, and of the experts that each goes to in each layer, with their gates."""
    of = jax.ShapeDtypeStruct
    chosen = (LAYERS, tokens, layer.chosen)
    return of((tokens, layer.hidden), jnp.bfloat16), of(chosen, jnp.int32), of(chosen, jnp.float32)


def in_layers(experts: Callable[..., Any], x: Any, chosen: Any, gates: Any) -> Any:
    """experts: of a layer, x and the layer's own routing."""
    return jax.lax.fori_loop(0, LAYERS, lambda at, x: x + experts(at, x, chosen[at], gates[at]), x)


def ours(chip: str, layer: Layer, tokens: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    resident, table = tiled_shapes(LAYERS, layer, {3: 1.0, 4: 1.0}, GROUP)

    def run(x: Any, chosen: Any, gates: Any, resident: Any, tables: Any, number: Any) -> Any:
        switched = switched_experts(resident, tables, number, ROUNDED[chip])

        def experts(at: Any, x: Any, chosen: Any, gates: Any) -> Any:
            return switched(at, x, Routing(gates, chosen, gates), None, ExpertForm(silu_gated, None))[0]

        return in_layers(experts, x, chosen, gates)

    return run, (*routed(layer, tokens), resident, (table,) * VARIANTS, jax.ShapeDtypeStruct((tokens,), jnp.int32))


def theirs(chip: str, layer: Layer, tokens: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def product(inner: int, outer: int) -> tuple[Callable[..., Any], Any]:
        tiling = tilings(inner, outer, 4, (even(outer, 1024),))[-1]
        return PEERS["gmm_v2 int4"][1](layer.experts, inner, outer, (16, *tiling))

    first, both = product(layer.hidden, 2 * layer.channels)
    second, down = product(layer.channels, layer.hidden)

    def run(x: Any, chosen: Any, gates: Any, both: Any, down: Any) -> Any:
        def experts(_: Any, x: Any, chosen: Any, gates: Any) -> Any:
            order = sort_by_expert(chosen, layer.experts)
            inner = first(gather_rows(x, order), both, order.group_sizes)
            hidden = silu_gated(inner[:, : layer.channels], inner[:, layer.channels :])
            return combine_rows(second(hidden, down, order.group_sizes), gates, order).astype(x.dtype)

        return in_layers(experts, x, chosen, gates)

    return run, (*routed(layer, tokens), both, down)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", action="append", choices=list(bundles.CHIPS), help="v6e and tpu7x by default")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="OLMoE and Mixtral by default")
    parser.add_argument("--tokens", action="append", type=int, choices=TOKENS, help="1, 8, 64 and 512 by default")
    parser.add_argument("--slowest", type=int, default=0, help="print so many operations of each, with their cycles")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    sys.argv = sys.argv[:1]  # a peer reads flags of its own there
    modelled = json.loads(SCHEDULE.read_text())["rows"]
    rows = []
    print(
        "chip   layer              tokens  kernel       operations  cycles     us    once  cycles  offloaded  kernel us"
    )
    for chip in chosen.chip or ("v6e", "tpu7x"):
        for name in chosen.shape or ("olmoe-1b-7b", "mixtral-8x7b"):
            for tokens in chosen.tokens or (1, 8, 64, BATCHES[-1]):
                for kernel, build, like in (("ours", ours, "ours mixed"), ("gmm_v2 int4", theirs, "gmm_v2 int4")):
                    try:
                        run, arguments = build(chip, SHAPES[name], tokens)
                    except ImportError as error:
                        print(f"{chip:6s} {name:17s} {tokens:7d}  {kernel:12s} {error}")
                        continue
                    bundles.compiled(bundles.CHIPS[chip], run, *arguments)
                    once, each, offloaded = bundles.around()
                    own = found(modelled, chip=chip, shape=name, tokens=tokens, kernel=like, form=ROUNDED[chip])
                    row = {"chip": chip, "shape": name, "tokens": tokens, "kernel": kernel}
                    row |= {"operations": each.operations, "cycles": each.cycles}
                    row |= {"us": each.cycles / bundles.CHIPS[chip].clock * 1e6}
                    row |= {"once_operations": once.operations, "once_cycles": once.cycles / LAYERS}
                    row |= {"partly": each.partly, "once_partly": once.partly}
                    row |= {"offloaded": offloaded, "kernel_us": own and own["modelled_us"]}
                    rows.append(row)
                    print(
                        f"{chip:6s} {name:17s} {tokens:7d}  {kernel:12s} {row['operations']:10d} {row['cycles']:7d} "
                        f"{row['us']:6.1f} {row['once_operations']:7d} {row['once_cycles']:7.0f} "
                        f"{row['offloaded']:10d} " + (f"{row['kernel_us']:10.1f}" if own else ""),
                        flush=True,
                    )
                    for operation, cycles in each.slowest[: chosen.slowest]:
                        print(f"    {cycles:7d}  {operation}")
                    bundles.write(chosen.json, rows=rows)


if __name__ == "__main__":
    main()
