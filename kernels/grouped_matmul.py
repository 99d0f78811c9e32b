"""The one public operation: rows sorted by expert, times each expert's weights.

On a CPU the default is our own path; elsewhere it is ``jax.lax.ragged_dot``, which XLA lowers to
grouped kernels there but to every expert times every row on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from dynamo_jax.kernels.reference import grouped_matmul_reference
from dynamo_jax.kernels.xla import grouped_matmul_xla

IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "reference": grouped_matmul_reference,
    "xla": grouped_matmul_xla,
    "ragged_dot": jax.lax.ragged_dot,
}


def grouped_matmul(
    x: Float[Array, "R K"],
    w: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R N"]:
    """Multiply each row by the weights of its group.

    x: (R, K) rows, those of expert 0 first. w: (E, K, N). group_sizes: (E,) non-negative, sum
    at most R; rows past the last group come out as zeros. ``implementation`` names one of
    ``IMPLEMENTATIONS``; None takes "xla" on a CPU and "ragged_dot" elsewhere. A named one never falls back.
    """
    if x.ndim != 2 or w.ndim != 3 or group_sizes.ndim != 1:
        raise ValueError(
            f"expected x (R, K), w (E, K, N), group_sizes (E,); got {x.shape}, {w.shape}, {group_sizes.shape}"
        )
    if x.shape[1] != w.shape[1] or w.shape[0] != group_sizes.shape[0]:
        raise ValueError(f"sizes do not fit: x {x.shape}, w {w.shape}, group_sizes {group_sizes.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; cast one of them")
    name = implementation or ("xla" if jax.default_backend() == "cpu" else "ragged_dot")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; known: {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](x, w, group_sizes).astype(x.dtype)
