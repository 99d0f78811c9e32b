"""Perplexity over token windows, row by row, with paired standard errors.

Each window of T + 1 tokens predicts T of them; the token count of a row is exact. The first
``adaptation_windows`` of a text are what monitor and adaptation see, and no row counts them; nor the
windows that calibration used, where the text is the calibrated one. Bytes are those of
the experts; attention and embeddings are the same in every row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dynamo_jax.calibration.pipeline import batches, digest, no_progress
from dynamo_jax.calibration.sweeps import Progress
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.rtn import round_to_nearest
from dynamo_jax.runtime.adapt import Observation, adapted_plan, observe_windows
from dynamo_jax.runtime.monitor import HOP, LONGEST, Verdict, decide, judge, spans
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.runtime.serving import begin, finish, gain, init, spare
from dynamo_jax.runtime.switch import float_step, switched_step
from dynamo_jax.texts.reading import token_windows

StepFn = Callable[[Array], tuple[Array, Array]]  # tokens (B, T1) -> losses (B,), counts (B, L, E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """window and batch in tokens and windows; limit: windows of a dataset at most, None for all."""

    window: int = 256
    batch_size: int = 8
    adaptation_windows: int = 8
    limit: int | None = None


class Losses(NamedTuple):
    """nll: (S,) summed nats a window; counts: (S, L, E) its routed tokens."""

    nll: Float[np.ndarray, " S"]
    counts: Float[np.ndarray, "S L E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. difference: nll minus the reference row's, with its standard error."""

    dataset: str
    kind: str  # known | novel
    variant: str
    bits_per_weight: float
    bytes_per_token: float
    tokens: int
    nll: float
    perplexity: float
    reference: str | None = None
    difference: float | None = None
    standard_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Reference = tuple[str, Losses]  # a row's variant and what it lost, for paired differences


class Dataset(NamedTuple):
    """Windows to judge and adapt on, and windows to evaluate on."""

    name: str
    kind: str
    first: Int[np.ndarray, "S T1"]
    rest: Int[np.ndarray, "S T1"]


def run_windows(step: StepFn, windows: Int[np.ndarray, "S T1"], batch_size: int) -> Losses:
    """Losses of all windows in batches of one shape."""
    nll, counts = [], []
    for tokens, mask in batches(windows, batch_size):
        losses, routed = step(jnp.asarray(tokens))
        real = mask[:, 0] > 0
        nll.append(np.asarray(losses, np.float64)[real])
        counts.append(np.asarray(routed, np.float64)[real])
    return Losses(np.concatenate(nll), np.concatenate(counts))


def make_row(
    data: Dataset,
    variant: str,
    losses: Losses,
    bits: float,
    bytes_per_token: float,
    reference: Reference | None,
) -> Row:
    """A row; the difference to ``reference`` is paired by window."""
    tokens = data.rest[:, 1:].size
    nll = float(losses.nll.sum() / tokens)
    difference = error = None
    if reference is not None:
        per_window = (losses.nll - reference[1].nll) / (data.rest.shape[1] - 1)
        difference = float(per_window.mean())
        error = float(per_window.std(ddof=1) / math.sqrt(len(per_window))) if len(per_window) > 1 else None
    return Row(
        dataset=data.name,
        kind=data.kind,
        variant=variant,
        bits_per_weight=bits,
        bytes_per_token=bytes_per_token,
        tokens=tokens,
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),
        reference=reference[0] if reference else None,
        difference=difference,
        standard_error=error,
    )


def float_parameters(model: Decoder, rounding: GridSpec | None = None) -> dict[str, Array]:
    """Float32 parameters, the experts rounded to nearest if ``rounding`` says how."""
    params = {name: a.astype(jnp.float32) for name, a in parameters(model).items()}
    if rounding is not None:
        for name in expert_parameter_names(model.config):
            params[name] = round_to_nearest(params[name], rounding)
    return params


def evaluate_float(config: ModelConfig, params: dict[str, Array], data: Dataset, batch_size: int) -> Losses:
    return run_windows(lambda tokens: float_step(config, params, tokens), data.rest, batch_size)


def float_row(
    config: ModelConfig, data: Dataset, variant: str, losses: Losses, bits: float, reference: Reference | None
) -> Row:
    """A row of a model whose experts all have ``bits`` bits a weight: a token reads its top-k experts."""
    active = config.num_expert_weights * config.num_experts_per_tok / config.num_experts
    return make_row(data, variant, losses, bits, active * bits / 8, reference)


UNIFORM = {"bf16": None, "rtn4": 4, "rtn3": 3, "rtn2": 2}


def evaluate_uniform(
    model: Decoder,
    data: list[Dataset],
    config: EvalConfig,
    group_size: int = 64,
    names: tuple[str, ...] = tuple(UNIFORM),
    progress: Progress = no_progress,
) -> tuple[list[Row], dict[str, Reference]]:
    """Rows of the unquantized model and of all experts rounded to nearest, and each dataset's first losses."""
    rows: list[Row] = []
    first: dict[str, Reference] = {}
    for index, name in enumerate(names):
        rtn_bits = UNIFORM[name]
        rounding = None if rtn_bits is None else GridSpec(rtn_bits, group_size)
        params = float_parameters(model, rounding)
        bits = 16.0 if rounding is None else rounding.bits_per_weight(model.config.hidden_size)
        for dataset in data:
            losses = evaluate_float(model.config, params, dataset, config.batch_size)
            rows.append(float_row(model.config, dataset, name, losses, bits, first.get(dataset.name)))
            first.setdefault(dataset.name, (name, losses))
        progress("evaluate uniform", index + 1, len(names))
    return rows, first


VARIANTS = ("baseline", "auto")


class Timeline(NamedTuple):
    """A text from its first token on, in stretches of what the monitor looks at. tokens: at the end of each stretch;
    score: the stream monitor's, above 1 for novel; nearest: what the text is taken for there; baseline, auto: nats a
    token; adapted: whether auto ran at an adapted plan."""

    tokens: Int[np.ndarray, " Z"]
    score: Float[np.ndarray, " Z"]
    nearest: tuple[str, ...]
    baseline: Float[np.ndarray, " Z"]
    auto: Float[np.ndarray, " Z"]
    adapted: Bool[np.ndarray, " Z"]


class Adaptation(NamedTuple):
    """What the monitor said of a dataset and the plan that its auto variant used.

    gain: nats a token by which the adapted plan's predictions on the first windows are nearer than the baseline's to
    those of 8 bits; None where the data was known. A plan that gained nothing there was not taken. first: what the
    baseline lost on the first windows. timeline: of the whole text, where both variants were evaluated.
    """

    verdict: Verdict
    plan: Plan
    gain: float | None
    first: Losses
    timeline: Timeline | None = None


def evaluate_quantized(
    model: QuantizedModel,
    data: list[Dataset],
    config: EvalConfig,
    variants: tuple[str, ...] = VARIANTS,
    references: dict[str, Reference] | None = None,
    progress: Progress = no_progress,
) -> tuple[list[Row], dict[str, Adaptation]]:
    """Rows of the baseline, and of what the run time makes of it when the monitor finds novel data.

    Both variants are branches of one compiled program; evaluating the second is a switch. A row's
    difference is to the row before it, the first one's to ``references`` (by dataset) if given.
    """
    rows, adaptations = [], {}
    device = Device(model)
    for index, dataset in enumerate(data):
        plan = model.plan
        if "auto" in variants:
            adaptations[dataset.name] = found = choose_plan(device, dataset.first, config.batch_size)
            plan = found.plan
        reference = (references or {}).get(dataset.name)
        found_losses: dict[str, Losses] = {}
        for name in variants:
            step = device.step(plan, VARIANTS.index(name))
            losses = run_windows(step, dataset.rest, config.batch_size)
            used = plan if name == "auto" else model.plan
            read = used.bytes_per_token(losses.counts.sum(axis=0), dataset.rest[:, 1:].size)
            rows.append(make_row(dataset, name, losses, used.bits_per_weight(), read, reference))
            reference = (name, losses)
            found_losses[name] = losses
        if set(VARIANTS) <= set(found_losses) and dataset.first[0, 1:].size <= LONGEST:
            line = timeline(model, found.first, found_losses["baseline"], found_losses["auto"], dataset, plan)
            adaptations[dataset.name] = found._replace(timeline=line)
        progress("evaluate quantized", index + 1, len(data))
    return rows, adaptations


def timeline(
    model: QuantizedModel, first: Losses, baseline: Losses, auto: Losses, data: Dataset, plan: Plan
) -> Timeline:
    """What the monitor would have said, and what both variants lost, over the first windows and the rest."""
    window = data.first[0, 1:].size
    size = max(1, round(2 * HOP / window))
    counts = spans(np.concatenate([first.counts, baseline.counts]), size)
    labels, scores = _decide(model.knowledge.monitor(), jnp.asarray(counts, jnp.float32))
    names = (*model.knowledge.names, "novel")

    def stretches(later: Losses) -> np.ndarray:
        each = np.concatenate([first.nll, later.nll]) / window
        return each[: len(counts) * size].reshape(len(counts), -1).mean(axis=1)

    ends = np.arange(1, len(counts) + 1) * size * window
    return Timeline(
        tokens=ends,
        score=np.asarray(scores, np.float64),
        nearest=tuple(names[i] for i in np.asarray(labels)),
        baseline=stretches(baseline),
        auto=stretches(auto),
        adapted=(ends > len(first.nll) * window) & (plan is not model.plan),
    )


_decide = jax.jit(jax.vmap(decide, in_axes=(None, 0)))


class Device:
    """The model's planes, with the slots for pages that the run time has by default."""

    def __init__(self, model: QuantizedModel):
        self.model = model
        self._parameters = model.device_parameters()
        self._host, self._state = init(model)
        self.spare = spare(self._host, self._state)

    def step(self, adapted: Plan, number: int) -> StepFn:
        """One batch at variant ``number``: 0 is the baseline, 1 the adapted one. Changing it compiles nothing."""
        self._host, self._state = finish(self._host, self._state, begin(self._host, self._state, adapted))
        fixed = (self.model.config, self._parameters, self._state.resident, self._state.tables, jnp.asarray(number))
        return lambda tokens: switched_step(*fixed, tokens)

    def gain(self, windows: Int[np.ndarray, "S T1"], seen: Observation) -> float:
        """``serving.gain`` of the adapted plan that ``step`` was asked for last."""
        return gain(self.model, self._state, windows, seen)


def choose_plan(device: Device, first: Int[np.ndarray, "S T1"], batch_size: int) -> Adaptation:
    """What the run time does after the first windows: keep the baseline on data that it knows, else adapt.

    An adapted plan must prove itself: it is taken only if on these windows its predictions are nearer to those of
    8 bits than the baseline's are. Errors that are small for each layer can still be harmful together.
    """
    model = device.model
    before = run_windows(device.step(model.plan, 0), first, batch_size)
    verdict = judge(before.counts.sum(axis=0), model.knowledge.signatures(), model.knowledge.threshold)
    if not verdict.novel:
        return Adaptation(verdict, model.plan, None, before)
    seen = observe_windows(model, first)
    plan = adapted_plan(model.plan, model.knowledge, seen, device.spare)
    device.step(plan, 1)
    found = device.gain(first, seen)
    return Adaptation(verdict, plan if found > 0 else model.plan, found, before)


def make_dataset(name: str, kind: str, text: str, tokenizer: Any, config: EvalConfig, calibrated: int = 0) -> Dataset:
    """Windows of a text: ``calibrated`` ones left out, then those for adaptation, then those that rows count.

    A text with few windows gives half of them to adaptation.
    """
    windows = token_windows(text, tokenizer, config.window, name)[calibrated:]
    if len(windows) < 2:
        raise ValueError(
            f"{name}: {len(windows)} windows of {config.window} tokens are left after {calibrated} used in "
            "calibration; evaluation needs two, one to adapt on and one to count"
        )
    first = min(config.adaptation_windows, len(windows) // 2)
    return Dataset(name, kind, windows[:first], windows[first:][: config.limit])


def calibrated_windows(model: QuantizedModel, name: str, text: str, config: EvalConfig) -> int:
    """How many leading windows of this text calibration used; 0 unless it is the text that it used."""
    known_digest, used = model.knowledge.calibrated.get(name, ("", 0))
    return -(-used * model.window // config.window) if known_digest == digest(text) else 0
