"""Rows of a quantized model: its baseline, and what the run time makes of it on novel text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.evaluation.perplexity import (
    Dataset,
    EvalConfig,
    Losses,
    Reference,
    Row,
    StepFn,
    make_row,
    run_windows,
    windows_over,
)
from dynamo_jax.evaluation.reference import Exact, Likeliest, head_of
from dynamo_jax.precision.plan import Plan
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.adapt import Observation, observe_windows
from dynamo_jax.runtime.memory import device_bits
from dynamo_jax.runtime.monitor import HOP, UNKNOWN, Watch, scores, start, watch
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import adapted, begin, divergence, finish, init, whole
from dynamo_jax.runtime.signatures import SPAN, Signatures
from dynamo_jax.runtime.standing import parts, sure
from dynamo_jax.runtime.switch import switched_step
from dynamo_jax.texts.reading import digest

VARIANTS = ("baseline", "auto")


class Verdict(NamedTuple):
    """What the stream monitor says at the end of a text's first windows. nearest: the known dataset that they are like,
    or least unlike; score: above 1 where the last tokens are unlike all; novel: the label."""

    nearest: str
    score: float
    novel: bool


class Timeline(NamedTuple):
    """A text from its first token on, in stretches of what the monitor looks at. tokens: at the end of each stretch;
    score: the stream monitor's, above 1 for novel; nearest: what the text is taken for there, "" before the first
    decision; baseline, auto: nats a token; adapted: whether auto ran at an adapted plan."""

    tokens: Int[np.ndarray, " Z"]
    score: Float[np.ndarray, " Z"]
    nearest: tuple[str, ...]
    baseline: Float[np.ndarray, " Z"]
    auto: Float[np.ndarray, " Z"]
    adapted: Bool[np.ndarray, " Z"]


class Adaptation(NamedTuple):
    """What the monitor said of a dataset and the plan that its auto variant used.

    gain: nats a token by which the adapted plan's predictions on the first windows are nearer than the baseline's to
    those of 8 bits, of known data on the windows that the plan was not made from; sure: whether that is beyond chance.
    Of novel data a plan that gained was taken, of known data one whose gain was sure. first: what the baseline lost on
    the first windows. timeline: of the whole text, where both variants were evaluated.
    """

    verdict: Verdict
    plan: Plan
    gain: float
    sure: bool
    first: Losses
    timeline: Timeline | None = None


def evaluate_quantized(
    model: QuantizedModel,
    data: list[Dataset],
    config: EvalConfig,
    variants: tuple[str, ...] = VARIANTS,
    references: Mapping[str, Reference] | None = None,
    progress: Progress = no_progress,
    exact: Mapping[str, Exact | Likeliest] | None = None,
) -> tuple[list[Row], dict[str, Adaptation]]:
    """Rows of the baseline, and of what the run time makes of it where text is novel or adapting to it surely gains.

    Both variants are branches of one compiled program; evaluating the second is a switch. A row's
    difference is to the row before it, the first one's to ``references`` (by dataset) if given. exact: of datasets by
    name, what a reference makes of their windows.
    """
    rows, adaptations = [], {}
    device, held = Device(model), device_bits(model.plan, model.spare)
    for index, dataset in enumerate(data):
        plan = model.plan
        if "auto" in variants:
            adaptations[dataset.name] = found = choose_plan(device, dataset.first, config)
            plan = found.plan
        reference = (references or {}).get(dataset.name)
        found_losses: dict[str, Losses] = {}
        for name in variants:
            step = device.step(plan, VARIANTS.index(name))
            own = (exact or {}).get(dataset.name)
            losses = run_windows(step, dataset.rest, config.batch_size, own, device.head)
            used = plan if name == "auto" else model.plan
            rows.append(make_row(dataset, name, losses, held, used.expert_bytes(), reference, config.batch))
            reference = (name, losses)
            found_losses[name] = losses
        if set(VARIANTS) <= set(found_losses):
            line = timeline(model, found.first, found_losses["baseline"], found_losses["auto"], dataset, plan)
            adaptations[dataset.name] = found._replace(timeline=line)
        progress("evaluate quantized", index + 1, len(data))
    return rows, adaptations


def timeline(
    model: QuantizedModel, first: Losses, baseline: Losses, auto: Losses, data: Dataset, plan: Plan
) -> Timeline:
    """What the monitor would have said, and what both variants lost, over the first windows and the rest."""
    window = data.first[0, 1:].size
    size = max(1, round(SPAN / window))  # windows of a stretch
    labels, found = followed(model.knowledge.signatures, np.concatenate([first.counts, baseline.counts]), window)
    count = max(1, len(labels) // size)
    last = [min((i + 1) * size, len(labels)) - 1 for i in range(count)]
    names = (*model.knowledge.names, "novel", "")  # UNKNOWN is the last

    def stretches(later: Losses) -> np.ndarray:
        each = np.concatenate([first.nll, later.nll]) / window
        return np.array([part.mean() for part in np.split(each[: last[-1] + 1], [i + 1 for i in last[:-1]])])

    ends = (np.array(last) + 1) * window
    return Timeline(
        tokens=ends,
        score=found[last].astype(np.float64),
        nearest=tuple(names[labels[i]] for i in last),
        baseline=stretches(baseline),
        auto=stretches(auto),
        adapted=(ends > len(first.nll) * window) & (plan is not model.plan),
    )


def followed(
    signatures: Signatures, counts: Float[np.ndarray, "S K L E"], window: int
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Label and score of the stream monitor at the end of each of a text's windows, of ``window`` tokens."""
    sizes = np.minimum(HOP, window - HOP * np.arange(counts.shape[1]))
    labels, found = _follow(signatures, jnp.asarray(counts, jnp.float32), jnp.asarray(sizes, jnp.float32))
    return np.asarray(labels), np.asarray(found)


@jax.jit
def _follow(signatures: Signatures, counts: Array, sizes: Array) -> tuple[Array, Array]:
    def one(state: Watch, window: Array) -> tuple[Watch, tuple[Array, Array]]:
        state = watch(signatures, state, window[None], sizes[None])
        return state, (state.label[0], state.score[0])

    return jax.lax.scan(one, start(signatures), counts)[1]


def verdict_of(model: QuantizedModel, counts: Float[np.ndarray, "S K L E"], window: int) -> Verdict:
    """What the stream monitor says after these windows of a text, each of ``window`` tokens."""
    signatures, names = model.knowledge.signatures, model.knowledge.names
    labels, found = followed(signatures, counts, window)
    label = int(labels[-1])
    if label in (UNKNOWN, len(names)):
        nearest = int(np.argmin(scores(signatures, jnp.asarray(counts.sum(axis=(0, 1)), jnp.float32))))
    else:
        nearest = label
    return Verdict(names[nearest], float(found[-1]), label == len(names))


class Device:
    """The model's planes, with the slots for pages that the run time has by default."""

    def __init__(self, model: QuantizedModel):
        self.model = model
        self._parameters = model.device_parameters()
        self._host, self._state = init(model)
        self.head = head_of(model.config, self._parameters)

    def step(self, adapted: Plan, number: int) -> StepFn:
        """One batch at variant ``number``: 0 is the baseline, 1 the adapted one, which the baseline lends its slots,
        since nobody else is served. Changing it compiles nothing."""
        if number == 0:
            self._host, self._state = whole(self._host, self._state)
        else:
            move = begin(self._host, self._state, adapted, lend=True)
            self._host, self._state = finish(self._host, self._state, move)
        fixed = (self.model.config, self._parameters, self._state.resident, self._state.tables, jnp.asarray(number))
        return lambda tokens: switched_step(*fixed, tokens)

    def adapted(self, seen: Observation, config: EvalConfig) -> Plan:
        """``serving.adapted`` for what was seen."""
        limit = config.batch, config.reads
        return adapted(self.model, self._host, self._state, seen, 1, *limit, lend=True)

    def divergence(self, windows: Int[np.ndarray, "S T1"], seen: Observation, number: int) -> Float[np.ndarray, " S"]:
        """``serving.divergence`` of the variant that ``step`` was asked for last."""
        return divergence(self.model, self._state, windows, seen, number)


def choose_plan(device: Device, first: Int[np.ndarray, "S T1"], config: EvalConfig) -> Adaptation:
    """What the run time does after the first windows: it adapts to data that is novel, and to data that it knows where
    the gain is sure; else it keeps the baseline.

    An adapted plan must prove itself: it is taken only if on these windows its predictions are nearer to those of
    8 bits than the baseline's are. Errors that are small for each layer can still be harmful together. Of known data
    one half makes the plan and the other judges it (``standing.parts``).
    """
    model = device.model
    before = run_windows(device.step(model.plan, 0), first, config.batch_size)
    verdict = verdict_of(model, before.counts, first[0, 1:].size)
    making, judging = parts(first, not verdict.novel)
    seen = observe_windows(model, making)
    judged = seen if verdict.novel else observe_windows(model, judging)
    apart = device.divergence(judging, judged, 0)
    plan = device.adapted(seen, config)
    device.step(plan, 1)
    gains = (apart - device.divergence(judging, judged, 1)) / first[0, 1:].size
    found, certain = float(gains.mean()), sure(gains)
    return Adaptation(verdict, plan if certain or (verdict.novel and found > 0) else model.plan, found, certain, before)


def calibrated_windows(model: QuantizedModel, name: str, text: str, config: EvalConfig) -> int:
    """How many leading windows of this text calibration used; 0 unless it is the text that it used."""
    known_digest, used = model.knowledge.calibrated.get(name, ("", 0))
    return windows_over(used, model.window, config) if known_digest == digest(text) else 0
