"""Widths under a byte budget: multiple-choice knapsacks, solved by HiGHS through scipy.

Each item (an expert, a projection of one, a channel block) takes one of the widths 2, 3, 4, 8. Offline
the integer program is solved, to a gap of RELATIVE_GAP; at run time its linear relaxation is, which
leaves at most as many items fractional as there are limits: those take their lower width. Errors here
and elsewhere are nats a token.

A large program is solved in two steps, as large knapsacks are (the core problem of Balas and Zemel, 1980): the
linear relaxation, of whose solution only as many items are fractional as there are limits, then the integer program
of its choices and of the CORE others whose reduced costs are least. benchmarks/allocation.py measures how far above
the relaxation's bound that ends.

Axes: I items, W widths, A datasets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int

from dynamo_jax.kernels.layout import LEVELS, WIDTHS

RELATIVE_GAP = 1e-4
TIME_LIMIT_S = 20.0
LARGE = 4096  # choices, from which on the relaxation goes first
CORE = 1000  # choices that are left open then
OBJECTIVES = ("sum", "worst")
Limits = int | Int[np.ndarray, " n"]  # pages of all shards together, or of each


def allocate(errors: Float[np.ndarray, "I W"], costs: Float[np.ndarray, "I W"], budget: float) -> Int[np.ndarray, " I"]:
    """The widths with the least summed error whose summed costs stay within ``budget``."""
    return _least_largest(errors[None], costs, budget)


def allocate_known(
    errors: Float[np.ndarray, "A I W"],
    costs: Float[np.ndarray, "I W"],
    budget: float,
    objective: str = "sum",
    weights: Float[np.ndarray, " A"] | None = None,
) -> Int[np.ndarray, " I"]:
    """One plan for several datasets.

    objective: sum, the least error summed over the datasets, each counted ``weights`` times; worst, the least
    largest of what each dataset's error is of its error under the best plan for it alone in the same budget. A
    dataset that could lose nothing at all (errors of zero in its own plan) has no such ratio and does not count.
    """
    weights = np.ones(len(errors)) if weights is None else np.asarray(weights, np.float64)
    if len(weights) != len(errors) or not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"weights {weights.tolist()}: expected {len(errors)} of them, none negative, not all zero")
    if objective == "sum":
        return allocate(np.tensordot(weights, errors, axes=1), costs, budget)
    if objective != "worst":
        raise ValueError(f"objective {objective!r}: known are {', '.join(OBJECTIVES)}")
    if (weights != 1).any():
        raise ValueError("the objective worst takes no weights: each dataset is measured by its own best plan")
    rows = np.arange(costs.shape[0])
    alone = [e[rows, np.searchsorted(WIDTHS, allocate(e, costs, budget))].sum() for e in errors]
    ratios = np.stack([e / best for e, best in zip(errors, alone) if best > 0] or [errors.sum(axis=0)])
    return _least_largest(ratios, costs, budget)


def _least_largest(
    errors: Float[np.ndarray, "A I W"], costs: Float[np.ndarray, "I W"], budget: float
) -> Int[np.ndarray, " I"]:
    """The widths for which the largest of the A sums is least, within the budget."""
    least = float(costs.min(axis=1).sum())
    if budget < least:
        raise ValueError(f"the budget of {budget:.0f} bytes is below the least that a plan needs, {least:.0f} bytes")
    if not np.isfinite(errors).all():
        raise ValueError("errors to allocate by hold NaN or infinity")
    program = _program(errors / max(float(np.abs(errors).max()), 1e-30), costs, budget)
    kept = np.ones(program.objective.size, bool)
    if costs.size > LARGE:
        relaxed = scipy.optimize.linprog(
            program.objective,
            A_ub=program.limits,
            b_ub=program.most,
            A_eq=program.choice,
            b_eq=np.ones(len(costs)),
            bounds=np.stack([program.least, np.full(kept.size, np.inf)], axis=1),
            method="highs-ipm",
        )
        if relaxed.x is None:
            raise ValueError(f"no plan was found within the budget of {budget:.0f} bytes: {relaxed.message}")
        reduced = relaxed.lower.marginals
        kept = (relaxed.x > 1e-6) | (reduced <= np.sort(reduced)[:CORE].max()) | ~np.isfinite(program.least)
    whole = np.isfinite(program.least)[kept]
    result = scipy.optimize.milp(
        program.objective[kept],
        integrality=whole.astype(float),
        bounds=scipy.optimize.Bounds(program.least[kept], np.where(whole, 1, np.inf)),
        constraints=[
            scipy.optimize.LinearConstraint(program.choice[:, kept], 1, 1),
            scipy.optimize.LinearConstraint(program.limits[:, kept], -np.inf, program.most),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None:
        raise ValueError(f"no plan was found within the budget of {budget:.0f} bytes: {result.message}")
    shares = np.zeros(kept.size)
    shares[kept] = result.x
    return np.asarray(WIDTHS)[shares[: costs.size].reshape(costs.shape).argmax(axis=1)]


class _Program(NamedTuple):
    """Of the shares of all choices, and the largest of the sums where there are several: what to make least, the
    least of each variable, one choice an item, and what must stay below which values: the spending, then the sums."""

    objective: Float[np.ndarray, " V"]
    least: Float[np.ndarray, " V"]
    choice: scipy.sparse.csr_matrix
    limits: scipy.sparse.csr_matrix
    most: Float[np.ndarray, " L"]


def _program(errors: Float[np.ndarray, "A I W"], costs: Float[np.ndarray, "I W"], budget: float) -> _Program:
    flat, choice, spent = errors.reshape(len(errors), -1), _one_choice(*costs.shape), costs.reshape(1, -1)
    if len(errors) == 1:
        return _Program(flat[0], np.zeros(costs.size), choice, scipy.sparse.csr_matrix(spent), np.array([budget]))
    limits = np.block([[spent, np.zeros((1, 1))], [flat, -np.ones((len(flat), 1))]])
    return _Program(
        np.append(np.zeros(costs.size), 1.0),
        np.append(np.zeros(costs.size), -np.inf),
        scipy.sparse.hstack([choice, scipy.sparse.csr_matrix((len(costs), 1))], format="csr"),
        scipy.sparse.csr_matrix(limits),
        np.append(budget, np.zeros(len(flat))),
    )


def _one_choice(items: int, choices: int) -> scipy.sparse.csr_matrix:
    return scipy.sparse.kron(scipy.sparse.eye(items), np.ones((1, choices)), format="csr")


def reallocate(
    errors: Float[np.ndarray, "I W"],
    pages: Mapping[int, Limits],
    read_costs: Float[np.ndarray, "I W"],
    read_budget: float,
    pages_each: Int[np.ndarray, " I"] | None = None,
    now: Int[np.ndarray, " I"] | None = None,
    spare: Mapping[int, Limits] | None = None,
    shards: Int[np.ndarray, " I"] | None = None,
) -> Int[np.ndarray, " I"]:
    """The least summed error with at most ``pages[level]`` pages of each refinement level, and with summed bytes
    read a token within the budget. A plan that meets all limits must exist.

    pages_each: the pages of a level that an item takes, 1 by default. spare: of each level, how many pages may be
    among them that the widths ``now`` do not read. shards: where each item's pages lie, from 0; then ``pages`` and
    ``spare`` have a number for each shard, or one for every shard.
    """
    if not np.isfinite(errors).all():
        raise ValueError("errors to allocate by hold NaN or infinity")
    each = np.ones(len(errors)) if pages_each is None else np.asarray(pages_each, np.float64)
    shards = np.zeros(len(errors), int) if shards is None else shards
    count = int(shards.max(initial=0)) + 1
    of_shard = scipy.sparse.csr_matrix((each, (shards, np.arange(len(errors)))), shape=(count, len(errors)))
    rows: list[scipy.sparse.csr_matrix] = []
    most: list[float] = []
    for level in LEVELS:
        reads = scipy.sparse.csr_matrix((np.asarray(WIDTHS) >= level).astype(float))
        limited = [(pages, of_shard)]
        if spare is not None and now is not None:
            limited.append((spare, of_shard.multiply(now < level)))
        for limits, counted in limited:
            rows.append(scipy.sparse.kron(counted, reads, format="csr"))
            most.extend(np.broadcast_to(np.asarray(limits[level], float), count))
    scale = max(read_budget, 1e-30)  # the solver's tolerances are absolute
    result = scipy.optimize.linprog(
        errors.reshape(-1) / max(float(np.abs(errors).max()), 1e-30),
        A_ub=scipy.sparse.vstack([*rows, read_costs.reshape(1, -1) / scale], format="csr"),
        b_ub=[*most, read_budget / scale],
        A_eq=_one_choice(*errors.shape),
        b_eq=np.ones(len(errors)),
        bounds=(0, 1),
        method="highs",
    )
    if result.x is None:
        raise ValueError(f"no plan fits the pages and the read budget: {result.message}")
    # Shares of 1e-6 and less are the solver's own rounding.
    return np.asarray(WIDTHS)[(result.x.reshape(errors.shape) > 1e-6).argmax(axis=1)]
