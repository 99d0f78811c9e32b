"""What others do, on the same model and text: inputs of experts, one-width quantizers, one-set allocations.

Everything here is plain arrays: weights of all experts are (L, E, P, F, D), gate, up and down. The peers' groups lie
along the inputs of each projection, D for gate and up, F for down, as in their own tools.

Axes: N tokens, L layers, E experts, k experts a token, P = 3 projections, F channels, D hidden, O options.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats

from dynamo_jax.calibration.experts import padded_rows
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters, with_parameters
from dynamo_jax.models.experts import activation_of, expert_outputs
from dynamo_jax.quant.awq import awq
from dynamo_jax.quant.gptq import gptq
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.rtn import round_to_nearest

BATCH = 8
LEAST_ROWS = 16  # an expert with fewer calibration rows takes the pooled Hessian


def expert_weights(model: Decoder) -> np.ndarray:
    """(L, E, P, F, D) float32."""
    names = expert_parameter_names(model.config)
    arrays = parameters(model)
    flat = [np.asarray(arrays[name], np.float32) for name in names]
    return np.stack([np.stack(flat[i : i + 3], axis=1) for i in range(0, len(flat), 3)])


def with_experts(model: Decoder, params: dict, weights: np.ndarray) -> dict:
    """The parameters with other experts, rounded to bfloat16 as a matrix unit takes them."""
    names = expert_parameter_names(model.config)
    rounded = np.asarray(jnp.asarray(weights).astype(jnp.bfloat16).astype(jnp.float32))
    return params | {name: jnp.asarray(rounded[i // 3][:, i % 3]) for i, name in enumerate(names)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the layers' experts received. x: (L, N, D); experts, gates: (L, N, k)."""

    x: np.ndarray
    experts: np.ndarray
    gates: np.ndarray


@functools.partial(jax.jit, static_argnames="config")
def _observe(config, params, tokens):
    seen = []

    def experts(layer, x, routing, weights, form):
        seen.append((x, routing.experts, routing.gates))
        return expert_outputs(x, routing, weights, form), None

    with_parameters(config, params).hidden_states(tokens[:, :-1], experts=experts)
    return seen


def observed(config, params: dict, windows: np.ndarray) -> Inputs:
    """The inputs of all experts on windows of tokens (S, T + 1)."""
    parts = [_observe(config, params, jnp.asarray(windows[i : i + BATCH])) for i in range(0, len(windows), BATCH)]
    fields = (
        np.stack([np.concatenate([p[layer][i] for p in parts]) for layer in range(len(parts[0]))]) for i in range(3)
    )
    return Inputs(*(np.asarray(f) for f in fields))


@dataclasses.dataclass
class Sums:
    """Of each expert's rows: count, gate mass, x x^T, h h^T, |x|, |h|."""

    rows: np.ndarray  # (L, E)
    gates: np.ndarray  # (L, E)
    inner: np.ndarray  # (L, E, D, D)
    hidden: np.ndarray  # (L, E, F, F)
    size_x: np.ndarray  # (L, D): mean over all tokens
    size_h: np.ndarray  # (L, E, F)


def hidden_channels(config, x: np.ndarray, part: np.ndarray) -> np.ndarray:
    """What one expert (P, F, D) makes of rows (R, D): (R, F)."""
    size = padded_rows(len(x))  # few sizes, so that few programs are compiled
    gate, up = (np.zeros((size, part.shape[1]), np.float32) for _ in range(2))
    gate[: len(x)], up[: len(x)] = x @ part[0].T, x @ part[1].T
    return np.asarray(activation_of(config.mixture)(gate, up))[: len(x)]


def sums_of(config, weights: np.ndarray, inputs: Inputs) -> Sums:
    layers, experts, _, channels, size = weights.shape
    out = Sums(
        np.zeros((layers, experts)),
        np.zeros((layers, experts)),
        np.zeros((layers, experts, size, size), np.float32),
        np.zeros((layers, experts, channels, channels), np.float32),
        np.abs(inputs.x).mean(axis=1),
        np.zeros((layers, experts, channels), np.float32),
    )
    for layer in range(layers):
        for e in range(experts):
            token, slot = np.nonzero(inputs.experts[layer] == e)
            x = inputs.x[layer][token]
            h = hidden_channels(config, x, weights[layer, e])
            out.rows[layer, e] = len(token)
            out.gates[layer, e] = inputs.gates[layer][token, slot].sum()
            out.inner[layer, e], out.hidden[layer, e] = x.T @ x, h.T @ h
            out.size_h[layer, e] = np.abs(h).sum(axis=0) / max(1, len(token))
    return out


def bits_of(spec: GridSpec, weights: np.ndarray) -> float:
    """Stored bits a weight of gate, up and down together."""
    channels, size = weights.shape[-2:]
    return (2 * spec.bits_per_weight(size) + spec.bits_per_weight(channels)) / 3


def _both(weights: np.ndarray, gate_up: Callable, down: Callable) -> np.ndarray:
    """Apply one function to gate and up, (E, 2F, D) a layer, and one to down with its inputs last, (E, D, F)."""
    out = []
    for layer, w in enumerate(weights):
        experts, _, channels, size = w.shape
        first = np.asarray(gate_up(layer, w[:, :2].reshape(experts, 2 * channels, size)))
        second = np.asarray(down(layer, w[:, 2].swapaxes(1, 2)))
        parts = [first.reshape(experts, 2, channels, size), second.swapaxes(1, 2)[:, None]]
        out.append(np.concatenate(parts, axis=1))
    return np.stack(out)


def rtn_weights(weights: np.ndarray, spec: GridSpec) -> np.ndarray:
    rounded = lambda _, w: round_to_nearest(jnp.asarray(w), spec)  # noqa: E731
    return _both(weights, rounded, rounded)


def gptq_weights(weights: np.ndarray, sums: Sums, spec: GridSpec) -> np.ndarray:
    def one(hessians: np.ndarray) -> Callable:
        return lambda layer, w: gptq(w, hessians[layer], spec, sums.rows[layer], least_rows=LEAST_ROWS).weights

    return _both(weights, one(sums.inner), one(sums.hidden))


def awq_weights(weights: np.ndarray, sums: Sums, spec: GridSpec) -> np.ndarray:
    return _both(
        weights,
        lambda layer, w: awq(w, sums.inner[layer], sums.size_x[layer][None], spec, shared=True).weights,
        lambda layer, w: awq(w, sums.hidden[layer], sums.size_h[layer], spec, shared=False).weights,
    )


# Allocations. Options of every expert in one order; costs in bits a weight (of all experts together).


def mixed(options: list[np.ndarray], choice: np.ndarray) -> np.ndarray:
    """Weights (L, E, ..) of which each expert comes from the option that was chosen for it."""
    out = options[0].copy()
    for i, option in enumerate(options):
        out[choice == i] = option[choice == i]
    return out


def frequency_plan(rows: np.ndarray, bits: list[float], budget: float) -> np.ndarray:
    """The most used experts of each layer get the second option, the others the first, within the budget."""
    experts = rows.shape[1]
    high = int((budget - bits[0]) / (bits[1] - bits[0]) * experts + 1e-9)
    rank = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1)
    return (rank < high).astype(int)


def knapsack(errors: np.ndarray, bits: list[float], budget: float, shares: np.ndarray | None = None) -> np.ndarray:
    """The options (I,) with the least summed errors (I, O) and mean bits, weighted by ``shares``, in the budget."""
    items, options = errors.shape
    shares = np.ones(items) if shares is None else shares
    choose = np.kron(np.eye(items), np.ones(options))
    result = scipy.optimize.milp(
        errors.reshape(-1) / np.abs(errors).max(),
        integrality=np.ones(items * options),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(choose, 1, 1),
            scipy.optimize.LinearConstraint(np.outer(shares, bits).reshape(1, -1) / shares.sum(), -np.inf, budget),
        ],
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    return result.x.reshape(items, options).argmax(axis=1)


def mc_plan(config, weights, inputs: Inputs, options: list[np.ndarray], bits: list[float], budget: float) -> np.ndarray:
    """Layer by layer: minimize the sum of frequency * mean gate * output error (Frobenius norm) of the experts."""
    out = []
    for layer, w in enumerate(weights):
        errors = np.zeros((len(w), len(options)))
        for e in range(len(w)):
            token, slot = np.nonzero(inputs.experts[layer] == e)
            x, gates = inputs.x[layer][token], inputs.gates[layer][token, slot]

            def run(part, x=x):
                return hidden_channels(config, x, part) @ part[2]

            exact = run(w[e])
            significance = len(token) / inputs.x.shape[1] * (gates.mean() if len(gates) else 0.0)
            errors[e] = [significance * np.linalg.norm(run(o[layer, e]) - exact) for o in options]
        out.append(knapsack(errors + 1e-12, bits, budget))
    return np.stack(out)


def data_free_plan(weights: np.ndarray, options: list[np.ndarray], bits: list[float], budget: float) -> np.ndarray:
    """One knapsack over all experts: relative reconstruction error, times the weights' kurtosis over a Gaussian's."""
    layers, experts = weights.shape[:2]
    flat = weights.reshape(layers * experts, 3, -1)
    heavy = np.maximum(scipy.stats.kurtosis(flat, axis=-1, fisher=False) / 3, 1.0)  # (I, P)
    energy = (flat**2).sum(axis=-1)
    errors = [((o.reshape(flat.shape) - flat) ** 2).sum(axis=-1) / energy * heavy for o in options]
    return knapsack(np.stack([e.sum(axis=1) for e in errors], axis=1), bits, budget).reshape(layers, experts)
