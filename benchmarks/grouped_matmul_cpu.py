"""The grouped matmul on a CPU beside jax.lax.ragged_dot and a dense product of the same flops.

Purpose: ratios within one run; the peers take turns, and the median of the repeats counts. Every
result is checked against the reference first: a wrong one prints no speed and exits with 1.
Expect, on two cores: at 64 experts of 512 x 256 and 4096 rows at least 30x over ragged_dot (which
multiplies every expert by every row on a CPU) and within 3x of the dense product.

    JAX_PLATFORMS=cpu python benchmarks/grouped_matmul_cpu.py --json grouped_matmul_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from dynamo_jax.files import write_json
from dynamo_jax.kernels.grouped_matmul import grouped_matmul

# name -> experts, rows, K, N, skew (0: equal chances; 1: chances fall as 1/rank, like a real router's)
SHAPES = {
    "64 x (512, 256), 4096 rows": (64, 4096, 512, 256, 0.0),
    "64 x (512, 256), 4096 rows, skewed": (64, 4096, 512, 256, 1.0),
    "64 x (512, 256), 64 rows": (64, 64, 512, 256, 0.0),
    "8 x (256, 512), 4096 rows": (8, 4096, 256, 512, 0.0),
}


def random_sizes(experts: int, rows: int, skew: float, rng: np.random.Generator) -> np.ndarray:
    chances = 1.0 / np.arange(1, experts + 1) ** skew
    return rng.multinomial(rows, rng.permutation(chances / chances.sum())).astype(np.int32)


def measure(functions: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for call in functions.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def benchmark(shape: tuple, repeats: int, rng: np.random.Generator) -> dict[str, float]:
    experts, rows, k, n, skew = shape
    x = jnp.asarray(rng.standard_normal((rows, k), np.float32))
    w = jnp.asarray(rng.standard_normal((experts, k, n), np.float32))
    sizes = jnp.asarray(random_sizes(experts, rows, skew, rng))
    ours = jax.jit(grouped_matmul)
    owner = np.repeat(np.arange(experts), np.asarray(sizes))
    want = np.concatenate([np.asarray(x)[owner == e] @ np.asarray(w)[e] for e in range(experts)])
    if not np.allclose(np.asarray(ours(x, w, sizes)), want, rtol=1e-4, atol=1e-3):
        raise SystemExit("grouped_matmul differs from the products of its groups; no speed is reported")
    ragged, dense = jax.jit(jax.lax.ragged_dot), jax.jit(jnp.matmul)
    return measure(
        {
            "ours": lambda: ours(x, w, sizes),
            "ragged_dot": lambda: ragged(x, w, sizes),
            "dense": lambda: dense(x, w[0]),
        },
        repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each; the median counts")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    table = rich.table.Table(title=f"float32, jax {jax.__version__}, {jax.devices()[0].platform}")
    for column in (
        "shape",
        "ours ms",
        "GFLOP/s",
        "ragged_dot ms",
        "dense ms",
        "faster than ragged_dot",
        "of dense time",
    ):
        table.add_column(column, justify="left" if column == "shape" else "right")
    results = []
    for name, shape in SHAPES.items():
        seconds = benchmark(shape, args.repeats, rng)
        flops = 2 * shape[1] * shape[2] * shape[3]
        row = {
            "shape": name,
            **{f"{peer}_ms": 1e3 * s for peer, s in seconds.items()},
            "gflops": flops / seconds["ours"] / 1e9,
            "speedup_vs_ragged_dot": seconds["ragged_dot"] / seconds["ours"],
            "time_vs_dense": seconds["ours"] / seconds["dense"],
        }
        results.append(row)
        table.add_row(
            name,
            f"{row['ours_ms']:.2f}",
            f"{row['gflops']:.1f}",
            f"{row['ragged_dot_ms']:.2f}",
            f"{row['dense_ms']:.2f}",
            f"{row['speedup_vs_ragged_dot']:.1f} x",
            f"{row['time_vs_dense']:.2f} x",
        )
    rich.console.Console(width=130).print(table)
    if args.json:
        write_json(args.json, {"jax": jax.__version__, "results": results})


if __name__ == "__main__":
    main()
