"""Codes and base scales trained until a quantized model predicts what the unquantized one does.

Calibration makes an expert's planes by what its own rows feel. Here the whole model runs, quantized as its plan says,
and the divergence of its predictions from the unquantized model's goes back to every code and every base scale. No
label is needed, so any text serves. Planes, bytes and plan stay what they are; only numbers in the planes change:

- A base scale is multiplied by a trained factor (as DWQ of mlx-lm and the second phase of EfficientQAT, arXiv
  2407.11062, train theirs).
- A code is where its weight lies among the cells of its width. The weight moves, and rounding is passed straight
  through in the gradient (arXiv 1308.3432), so that weights near the edge of a cell change over (as in AutoRound, arXiv
  2309.05516). Bits that refine a code that changed are those nearest to the float weight.

The 8-bit plane is rounded anew, to the float weights, so that 8 bits stay what they were: nothing that is read at 8
bits is trained. What predicts held-out windows best is kept, the planes as they came among them.

Axes: S windows of T tokens, L layers, E experts, P = 3 projections, F channels, G groups along D.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from dynamo_jax.calibration.config import DISTIL_WINDOWS
from dynamo_jax.kernels.layout import PLANE_BITS, PROJECTIONS, STEP, WIDTHS, unpack
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters, with_parameters, without_experts
from dynamo_jax.models.experts import float_experts
from dynamo_jax.models.loss import Head, head_divergence
from dynamo_jax.models.rest import FLOAT, quantized
from dynamo_jax.precision.plan import Plan
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.quant.nested_gptq import finished
from dynamo_jax.quant.planes import Planes, dequantize, filled_up, narrowed, over, rounded_scale
from dynamo_jax.texts.windows import batches

STAGE = "distil"
SCALE_RATE = 3e-3  # Adam's, of the logarithm of a base scale's factor
CODE_RATE = 1e-3  # of a weight's place, in base scales
WARM_UP = 0.05  # of the steps; then both rates fall, as a cosine, to LAST_RATE of themselves
LAST_RATE = 0.05
DECAYS = (0.9, 0.99)  # of Adam's means
CHECKS = 4  # on held-out windows, in equal parts of the steps
MOST_HELD_OUT = 32
EDGE = 0.02  # of a cell, how near to its edge a weight begins that its code does not hold


class Distilled(NamedTuple):
    """planes: of all layers. divergences: nats a token on held-out windows, of the planes as they came and at each
    check; the planes are those of the least."""

    planes: Planes
    divergences: tuple[float, ...]

    def words(self) -> str:
        first, least = self.divergences[0], min(self.divergences)
        if least == first:
            return f"distilled: no better than the divergence of {first:.4f} on held-out windows; the planes stay"
        return f"distilled: divergence {first:.4f} before, {least:.4f} after, on held-out windows"


class _Student(NamedTuple):
    """The planes that came and how their rows are read. four: codes of four bits, the first plane highest; scales: of
    groups; step: of a row's cells, in base scales; half: how many lie on either side of zero; trained: False where a
    row is read at 8 bits, as ``exact``, in base scales."""

    four: UInt8[np.ndarray, "L E P F D"]
    scales: Float[Array, "L E P F G"]
    step: Float[np.ndarray, "L E P F 1"]
    half: Float[np.ndarray, "L E P F 1"]
    trained: Bool[np.ndarray, "L E P F 1"]
    exact: Float[Array, "*LEPFD"]


class _Trained(NamedTuple):
    """place: of each weight, in base scales as they came; stretch: the logarithm of each scale's factor."""

    place: Float[Array, "L E P F D"]
    stretch: Float[Array, "L E P F G"]


def distil(
    model: Decoder,
    planes: Planes,
    plan: Plan,
    windows: Int[np.ndarray, "S T"],
    tokens: int,
    batch_size: int,
    progress: Progress = no_progress,
    rest: int = FLOAT,
) -> Distilled:
    """The planes of a model's experts (L, E, P, F, ..), trained at the widths of ``plan``.

    model: unquantized, in memory with about ten times its experts' weights beside it. windows: of text; one in
    ``DISTIL_WINDOWS`` is for checks, the others are passed over, in another order each time, until so many tokens were
    seen. rest: bits of the rest of the quantized model (``models.rest``). ValueError: too few windows or tokens for a
    batch.
    """
    if len(windows) < DISTIL_WINDOWS or tokens < batch_size * windows.shape[1]:
        raise ValueError(
            f"distil: {len(windows)} windows and {tokens:,} tokens are too few; it takes {DISTIL_WINDOWS} windows, and "
            f"{batch_size * windows.shape[1]:,} tokens for a step"
        )
    config = model.config
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in parameters(model).items()}
    others = _others(config, parameters(model), rest)
    weights = filled_up(_expert_weights(config, arrays), plan.channel_block, plan.group_size)
    student = _student(planes, plan)
    now = _Trained(_places(weights, student), jnp.zeros(student.scales.shape))
    apart = np.arange(len(windows)) % DISTIL_WINDOWS == DISTIL_WINDOWS - 1
    held, own = windows[apart][:MOST_HELD_OUT], windows[~apart]
    steps = tokens // (batch_size * windows.shape[1])
    order = _orders(len(own), steps * batch_size).reshape(steps, batch_size)
    rates = tuple(_falling(rate, steps) for rate in (CODE_RATE, SCALE_RATE))
    state = _adam().init(now)
    progress(STAGE, 0, steps)
    divergences, best = [_mean_divergence(config, arrays, others, student, now, held, batch_size)], None
    for step in range(steps):
        batch = jnp.asarray(own[order[step]])
        now, state = _step(config, arrays, others, student, now, state, batch, tuple(rate(step) for rate in rates))
        if (step + 1) * CHECKS // steps > step * CHECKS // steps:
            divergences.append(_mean_divergence(config, arrays, others, student, now, held, batch_size))
            if divergences[-1] < min(divergences[:-1]):
                best = jax.tree.map(np.asarray, now)
        progress(STAGE, step + 1, steps)
    if best is not None:
        planes = narrowed(_planes_of(weights, student, best, plan), planes.widths[-1])
    return Distilled(planes, tuple(divergences))


def _orders(count: int, length: int) -> Int[np.ndarray, " length"]:
    """``count`` things again and again, in another order each time."""
    rng = np.random.default_rng(0)
    passes = [rng.permutation(count) for _ in range(-(-length // count))]
    return np.concatenate(passes)[:length]


def _others(config: ModelConfig, arrays: dict[str, Any], rest: int) -> dict[str, Array]:
    """What the student has beside its experts, where that is not what the teacher has."""
    if rest == FLOAT:
        return {}
    return {name: jnp.asarray(a) for name, a in quantized(without_experts(config, arrays), rest).items()}


def _expert_weights(config: ModelConfig, arrays: dict[str, Any]) -> Float[np.ndarray, "L E P F D"]:
    flat = [np.asarray(arrays[name]) for name in expert_parameter_names(config)]
    return np.stack([np.stack(flat[i : i + PROJECTIONS], axis=1) for i in range(0, len(flat), PROJECTIONS)])


def _student(planes: Planes, plan: Plan) -> _Student:
    codes = {b: np.asarray(unpack(jnp.asarray(a), PLANE_BITS[b])) for b, a in planes.codes.items()}
    four = codes[2] << 2
    for width, bits in ((3, 1), (4, 0)):  # a plane that was left out is not read
        if width in codes:
            four |= codes[width] << bits
    scales = jnp.asarray(planes.scales).astype(jnp.float32)
    widths = plan.channel_widths()[..., None]
    exact = np.zeros((), np.float32)
    if (widths == WIDTHS[-1]).any():
        wide = jnp.repeat(scales, plan.group_size, axis=-1)
        exact = np.where(widths == WIDTHS[-1], np.asarray(over(dequantize(planes, WIDTHS[-1]), wide)), 0)
    bits = np.minimum(widths, 4)
    step = (2.0 ** (2 - bits)).astype(np.float32)
    half = (2.0 ** (bits - 1)).astype(np.float32)
    return _Student(four, scales, step, half, widths < WIDTHS[-1], jnp.asarray(exact))


def _places(weights: Float[np.ndarray, "L E P F D"], student: _Student) -> Float[Array, "L E P F D"]:
    """Where the weights lie, in base scales; those that their codes do not hold, just inside the cells that do."""
    size = weights.shape[-1] // student.scales.shape[-1]
    value = _value(student)
    place = np.asarray(over(jnp.asarray(weights), jnp.repeat(student.scales, size, axis=-1)))
    near = student.step * (0.5 - EDGE)
    end = student.step * (student.half - 0.5)  # the middle of the last cell, past which there is no other
    low = np.where(value <= -end, -np.inf, value - near)
    high = np.where(value >= end, np.inf, value + near)
    inside = student.step * (student.half + 0.5)  # a weight far outside of the grid could never come back
    return jnp.asarray(np.clip(np.clip(place, low, high), -inside, inside), jnp.float32)


def _value(student: _Student) -> Float[np.ndarray, "L E P F D"]:
    """What the codes that came say at the plan's widths, in base scales."""
    cell = student.four // (student.step * 4).astype(np.uint8)
    return (cell + 0.5 - student.half) * student.step


def _rounded(student: _Student, place: Float[Array, "L E P F D"]) -> Float[Array, "L E P F D"]:
    """The middle of the cell that each place is in, in base scales."""
    cell = jnp.clip(jnp.floor(place / student.step) + student.half, 0, 2 * student.half - 1)
    return (cell + 0.5 - student.half) * student.step


def _with_planes(config: ModelConfig, arrays: dict[str, Array], student: _Student, now: _Trained) -> Decoder:
    """The model with its experts quantized: gradients of places are those of what they are rounded to."""
    place = now.place + jax.lax.stop_gradient(_rounded(student, now.place) - now.place)
    place = jnp.where(student.trained, place, student.exact)
    scales = student.scales * jnp.exp(jnp.where(student.trained, now.stretch, 0.0))
    weights = (place.reshape(*scales.shape, -1) * scales[..., None]).reshape(place.shape)
    weights = weights[..., : config.expert_sizes.channels, : config.hidden_size]
    experts = {
        name: weights[i // PROJECTIONS, :, i % PROJECTIONS] for i, name in enumerate(expert_parameter_names(config))
    }
    return with_parameters(config, arrays | experts)


def _divergence(
    config: ModelConfig,
    arrays: dict[str, Array],
    others: dict[str, Array],
    student: _Student,
    now: _Trained,
    tokens: Int[Array, "B T"],
) -> Float[Array, " B"]:
    teacher = with_parameters(config, arrays)
    exact, _ = teacher.hidden_states(tokens, experts=float_experts)
    model = _with_planes(config, others or arrays, student, now)
    hidden, _ = model.hidden_states(tokens, experts=float_experts)
    heads = (Head(one.head_weights(), *one.logit_form()) for one in (teacher, model))
    return head_divergence(jax.lax.stop_gradient(exact), hidden, *heads).mean(axis=1)


_check = functools.partial(jax.jit, static_argnames="config")(_divergence)


def _mean_divergence(
    config: ModelConfig,
    arrays: dict[str, Array],
    others: dict[str, Array],
    student: _Student,
    now: _Trained,
    windows: Int[np.ndarray, "S T"],
    batch_size: int,
) -> float:
    found = [
        np.asarray(_check(config, arrays, others, student, now, jnp.asarray(tokens)))[mask[:, 0] > 0]
        for tokens, mask in batches(windows, batch_size)
    ]
    return float(np.concatenate(found).mean())


def _falling(rate: float, steps: int) -> optax.Schedule:
    warm_up = max(1, round(WARM_UP * steps))
    return optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, max(steps, warm_up + 1), LAST_RATE * rate)


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(*DECAYS)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("now", "state"))
def _step(config, arrays, others, student, now, state, tokens, rates):
    def loss(now):
        return _divergence(config, arrays, others, student, now, tokens).mean()

    updates, state = _adam().update(jax.grad(loss)(now), state)
    moved = _Trained(*(a - rate * u for a, rate, u in zip(now, rates, updates)))
    return moved, state


def _planes_of(weights: Float[np.ndarray, "L E P F D"], student: _Student, found: _Trained, plan: Plan) -> Planes:
    stretch = np.where(student.trained, np.asarray(found.stretch), 0)
    scales = np.asarray(rounded_scale(student.scales * np.exp(stretch)))
    before = student.four // (student.step * 4).astype(np.uint8)
    cell = np.asarray(jnp.floor(found.place / student.step)) + student.half
    cell = np.clip(cell, 0, 2 * student.half - 1).astype(np.uint8)
    first = cell * (student.step * 4).astype(np.uint8)  # of the cell's codes of four bits
    wide = jnp.repeat(jnp.asarray(scales), plan.group_size, axis=-1)
    nearest = np.asarray(jnp.floor(over(jnp.asarray(weights), wide * STEP[4]))) + 8
    nearest = np.clip(nearest, first, first + (student.step * 4).astype(np.uint8) - 1).astype(np.uint8)
    four = np.where((cell == before) | ~student.trained, student.four, nearest)
    flat = (a.reshape(-1, *a.shape[-2:]) for a in (weights, four, scales))
    return jax.tree.map(lambda a: a.reshape(*four.shape[:3], *a.shape[1:]), finished(*flat))
