"""Widths under a byte budget: multiple-choice knapsacks, solved by HiGHS through scipy.

Each item (an expert, or a channel block) takes one of the widths 2, 3, 4, 8, and the summed error
is minimized. Offline the integer program is solved exactly; at run time its linear relaxation is,
which leaves at most as many items fractional as there are budgets: those take their lower width.
Errors here and elsewhere are nats a token.

Axes: I items, W widths, M budgets.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int

from dynamo_jax.kernels.layout import LEVELS, WIDTHS

RELATIVE_GAP = 1e-4
TIME_LIMIT_S = 20.0


def allocate(errors: Float[np.ndarray, "I W"], costs: Float[np.ndarray, "I W"], budget: float) -> Int[np.ndarray, " I"]:
    """The widths with the least summed error whose summed costs stay within ``budget``."""
    least = float(costs.min(axis=1).sum())
    if budget < least:
        raise ValueError(f"the budget of {budget:.0f} bytes is below the least that a plan needs, {least:.0f} bytes")
    scale, costs_matrix, choice = _program(errors, costs.reshape(1, -1))
    result = scipy.optimize.milp(
        scale,
        integrality=np.ones(errors.size),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(choice, 1, 1),
            scipy.optimize.LinearConstraint(costs_matrix, -np.inf, [budget]),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None:
        raise ValueError(f"no plan was found within the budget of {budget:.0f} bytes: {result.message}")
    return np.asarray(WIDTHS)[result.x.reshape(errors.shape).argmax(axis=1)]


def reallocate(
    errors: Float[np.ndarray, "I W"],
    pages: dict[int, int],
    read_costs: Float[np.ndarray, "M IW"],
    read_budgets: Float[np.ndarray, " M"],
) -> Int[np.ndarray, " I"]:
    """The least summed error with at most ``pages[level]`` pages of each refinement level, and with bytes
    read a token within the budget in each of M samples. A plan that meets all limits must exist."""
    rows = [np.tile(np.asarray(WIDTHS) >= level, len(errors)).astype(float) for level in LEVELS]
    limits = np.concatenate([[float(pages[level]) for level in LEVELS], read_budgets])
    scale, limited, choice = _program(errors, np.concatenate([np.stack(rows), read_costs]))
    result = scipy.optimize.linprog(
        scale, A_ub=limited, b_ub=limits, A_eq=choice, b_eq=np.ones(len(errors)), bounds=(0, 1), method="highs"
    )
    if result.x is None:
        raise ValueError(f"no plan fits the pages and the read budgets: {result.message}")
    # Shares of 1e-6 and less are the solver's own rounding.
    return np.asarray(WIDTHS)[(result.x.reshape(errors.shape) > 1e-6).argmax(axis=1)]


def _program(
    errors: Float[np.ndarray, "I W"], limited: Float[np.ndarray, "M IW"]
) -> tuple[np.ndarray, scipy.sparse.csr_matrix, scipy.sparse.csr_matrix]:
    """The scaled objective, the budgets' matrix and the matrix of one choice an item."""
    if not np.isfinite(errors).all():
        raise ValueError("errors to allocate by hold NaN or infinity")
    items, choices = errors.shape
    objective = errors.reshape(-1) / max(float(np.abs(errors).max()), 1e-30)
    choice = scipy.sparse.kron(scipy.sparse.eye(items), np.ones((1, choices)), format="csr")
    return objective, scipy.sparse.csr_matrix(limited), choice
