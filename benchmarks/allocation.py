"""How long plans take at the size of the largest models, and how far they are from the relaxation's bound.

    python benchmarks/allocation.py [--layers 60] [--experts 256] [--datasets 6] [--json PATH]

Errors are drawn: log-normal over experts and datasets, falling with the width. A plan of each objective is made at
3.0 and 2.5 bits a weight; "undivided": HiGHS on the whole program, for the sum.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.optimize
import scipy.sparse

from dynamo_jax.files import write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.precision import allocate as module
from dynamo_jax.precision.plan import block_costs


def drawn_errors(datasets: int, experts: int, seed: int) -> np.ndarray:
    """(A, I, W)"""
    rng = np.random.default_rng(seed)
    common = rng.lognormal(0, 1.5, experts)
    own = common * rng.lognormal(0, 1.0, (datasets, experts))
    return own[:, :, None] * np.array([1.0, 0.25, 0.06, 0.0003]) * rng.lognormal(0, 0.1, (datasets, experts, 4))


def sums_of(errors: np.ndarray, widths: np.ndarray) -> np.ndarray:
    return errors[:, np.arange(errors.shape[1]), np.searchsorted(WIDTHS, widths)].sum(axis=1)


def relaxation(errors: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """The least largest sum of plans that may split an expert between widths: no whole plan is below it."""
    items, width_count = costs.shape
    largest = np.zeros((items, 1))
    result = scipy.optimize.linprog(
        np.append(np.zeros(costs.size), 1.0),
        A_ub=np.block([[costs.reshape(1, -1), 0.0], [errors.reshape(len(errors), -1), -np.ones((len(errors), 1))]]),
        b_ub=np.append(budget, np.zeros(len(errors))),
        A_eq=scipy.sparse.hstack([scipy.sparse.kron(scipy.sparse.eye(items), np.ones((1, width_count))), largest]),
        b_eq=np.ones(items),
        bounds=[(0, None)] * costs.size + [(None, None)],
        method="highs-ipm",
    )
    return float(result.fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--datasets", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    items = arguments.layers * arguments.experts
    errors = drawn_errors(arguments.datasets, items, 0)
    costs = np.tile(block_costs(128, 2048, 128), (items, 1))
    rows = []
    print("| objective | bits | seconds | seconds, undivided | above the bound |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for bits in (3.0, 2.5):
        budget = bits / 8 * items * 3 * 128 * 2048
        alone = [sums_of(e[None], module.allocate(e, costs, budget))[0] for e in errors]
        for objective in module.OBJECTIVES:
            start = time.perf_counter()
            widths = module.allocate_known(errors, costs, budget, objective)
            seconds = time.perf_counter() - start
            undivided = math.nan
            if objective == "sum":
                with mock.patch.object(module, "LARGE", 1 << 60):
                    start = time.perf_counter()
                    module.allocate_known(errors, costs, budget, objective)
                    undivided = time.perf_counter() - start
            program = errors.sum(axis=0)[None] if objective == "sum" else errors / np.reshape(alone, (-1, 1, 1))
            above = sums_of(program, widths).max() / relaxation(program, costs, budget) - 1
            print(f"| {objective} | {bits:g} | {seconds:.1f} | {undivided:.1f} | {above:.1e} |", flush=True)
            row = {"objective": objective, "bits": bits, "seconds": seconds, "seconds_undivided": undivided}
            rows.append(row | {"above_bound": above})
    if arguments.json:
        write_json(arguments.json, {"items": items, "datasets": arguments.datasets, "rows": rows})


if __name__ == "__main__":
    main()
