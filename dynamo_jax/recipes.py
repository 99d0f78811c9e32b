"""Recipes: which model, texts, budgets and tasks a run has, what it must reach, and what others published.

A TOML file of configs/recipes/ fills ``Recipe``. A mistake is a ``ValueError`` that names the key, and
``settings.load_toml`` puts the file before it. ``bench.py`` runs a recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamo_jax.calibration.config import BITS, QuantizeConfig
from dynamo_jax.evaluation.perplexity import EvalConfig, Row
from dynamo_jax.evaluation.switched import VARIANTS
from dynamo_jax.evaluation.tasks import TaskRow
from dynamo_jax.quant.grids import BITS as GRID_BITS
from dynamo_jax.texts.tasks import named

EXACT = "bf16"  # the unquantized model, which all others are compared with
GPTQ = "gptq"  # before the width, of plain GPTQ at one width
GROUPS = ("known", "novel", "tasks")

Measure = Callable[[list[Any], list[Any]], float]


def text_recovery(own: list[Row], exact: list[Row]) -> float:
    return float(np.mean([e.perplexity / o.perplexity for o, e in zip(own, exact)]))


def task_recovery(own: list[TaskRow], exact: list[TaskRow]) -> float:
    whole = np.mean([e.accuracy for e in exact])
    return float(np.mean([o.accuracy for o in own]) / whole) if whole > 0 else math.nan


# of a variant's rows of some texts or tasks, and those of ``EXACT``
TEXT_MEASURES: dict[str, Measure] = {
    "recovery": text_recovery,
    "agreement": lambda own, _: float(np.mean([o.divergence.agreement if o.divergence else 1.0 for o in own])),
    "divergence": lambda own, _: float(np.mean([o.divergence.mean if o.divergence else 0.0 for o in own])),
    "perplexity": lambda own, _: float(np.mean([o.perplexity for o in own])),
}
TASK_MEASURES: dict[str, Measure] = {
    "recovery": task_recovery,
    "accuracy": lambda own, _: float(np.mean([o.accuracy for o in own])),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """What a run must reach.

    variant: ``baseline`` or ``auto`` at one of the budgets, or ``gptqN``, which has none. measure: ``recovery`` (of
    texts, the perplexity of bf16 as a share of the variant's; of tasks, the mean accuracy as a share of bf16's),
    ``agreement`` (the share of tokens whose likeliest is bf16's), ``divergence`` from bf16 in nats a token,
    ``perplexity``, or ``accuracy``. on: ``known``, ``novel``, ``tasks``, or the name of one text or task. least or
    most: of the mean over these.
    """

    variant: str
    measure: str
    on: str
    budget: float | None = None
    least: float | None = None
    most: float | None = None

    def passes(self, value: float) -> bool:
        """NaN passes nothing."""
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of others, and which of ours stands beside it (as a threshold says it). method: whose; bits: a weight,
    as they count them; accuracies are shares of 1; source: paper and table."""

    method: str
    bits: float
    on: str
    measure: str
    value: float
    source: str
    variant: str
    budget: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does.

    model: the bundled one's name, a Hugging Face folder or a name of its hub. known, novel: sources of texts by name
    (``texts.sources.read_source``); judged: of a known name, the text that it is evaluated on, in place of the rest of
    its own. budgets: bits a weight on the device; uniform: widths of plain GPTQ, to compare with. tasks: NAME=FILE or
    names of sets (``texts.tasks``); documents: of each at most. quantize: without a budget. waiting: for which machine,
    of a recipe that none has run yet.
    """

    model: str
    known: dict[str, str]
    budgets: tuple[float, ...]
    novel: dict[str, str] = dataclasses.field(default_factory=dict)
    judged: dict[str, str] = dataclasses.field(default_factory=dict)
    uniform: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    documents: int | None = None
    quantize: QuantizeConfig = dataclasses.field(default_factory=QuantizeConfig)
    evaluate: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    thresholds: tuple[Threshold, ...] = ()
    published: tuple[Published, ...] = ()
    waiting: str = ""

    def __post_init__(self) -> None:
        if not self.known:
            raise ValueError("known: no text; calibration needs at least one")
        if not self.budgets:
            raise ValueError("budgets: none; expected bits a weight, such as [3.0]")
        for budget in self.budgets:
            if not (math.isfinite(budget) and budget > 0):
                raise ValueError(f"budgets: {budget:g}, expected a positive number of bits a weight")
        for width in self.uniform:
            if width not in GRID_BITS:
                raise ValueError(f"uniform: {width}, expected widths of {GRID_BITS[0]} to {GRID_BITS[-1]} bits")
        for key in ("budgets", "uniform"):
            if len(set(values := getattr(self, key))) < len(values):
                raise ValueError(f"{key}: a number is given twice")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents: {self.documents}, expected 1 or more")
        if (self.quantize.bits, self.quantize.budget_bytes, self.quantize.fits_gib) != (BITS, None, None):
            raise ValueError("quantize: holds a budget; those of a recipe are its budgets, in bits a weight")
        self._check_names()
        for number, threshold in enumerate(self.thresholds, 1):
            where = f"thresholds {number}"
            self._check_place(where, threshold)
            if threshold.variant == EXACT:
                raise ValueError(f"{where}: variant {EXACT} is what others are compared with")
            if (threshold.least is None) == (threshold.most is None):
                raise ValueError(f"{where}: expected least or most, one of the two")
        for number, figure in enumerate(self.published, 1):
            self._check_place(f"published {number}", figure)

    def _check_names(self) -> None:
        seen: dict[str, str] = {}
        tasks = self.task_names
        for key, names in (("known", self.known), ("novel", self.novel), ("tasks", tasks)):
            for name in names:
                if name in GROUPS:
                    raise ValueError(f"{key}: {name} stands for all of them, and cannot be one's name")
                if name in seen:
                    raise ValueError(f"{key}: {name} is among {seen[name]}, too; names differ")
                seen[name] = key
        if odd := [name for name in self.judged if name not in self.known]:
            raise ValueError(f"judged: {odd[0]} is not among known, {', '.join(self.known)}")

    def _check_place(self, where: str, at: Threshold | Published) -> None:
        """ValueError unless the run has a figure there."""
        if at.variant not in self.variants:
            raise ValueError(f"{where}: variant {at.variant!r}: there are {', '.join(self.variants)}")
        if at.variant in VARIANTS and at.budget not in self.budgets:
            there = ", ".join(f"{budget:g}" for budget in self.budgets)
            raise ValueError(f"{where}: budget {at.budget}: the budgets are {there}")
        if at.variant not in VARIANTS and at.budget is not None:
            raise ValueError(f"{where}: budget {at.budget:g}: {at.variant} has none")
        if not self.names_on(at.on):
            there = ", ".join([*GROUPS, *self.known, *self.novel, *self.task_names])
            empty = f"the recipe has no {at.on}" if at.on in GROUPS else f"expected one of {there}"
            raise ValueError(f"{where}: on {at.on!r}: {empty}")
        measures = TASK_MEASURES if self.is_of_tasks(at.on) else TEXT_MEASURES
        if at.measure not in measures:
            raise ValueError(f"{where}: measure {at.measure!r}: on {at.on} there are {', '.join(measures)}")

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(named(self.tasks, "tasks: "))

    @property
    def variants(self) -> tuple[str, ...]:
        return (EXACT, *(f"{GPTQ}{width}" for width in self.uniform), *VARIANTS)

    def is_of_tasks(self, on: str) -> bool:
        return on == "tasks" or on in self.task_names

    def names_on(self, on: str) -> tuple[str, ...]:
        """The texts or tasks that ``on`` means; none of an unknown name."""
        groups = dict(zip(GROUPS, (tuple(self.known), tuple(self.novel), self.task_names)))
        return groups.get(on, (on,) if any(on in names for names in groups.values()) else ())


class Found(NamedTuple):
    """A row of the results; budget: None of a variant that has none."""

    budget: float | None
    row: Row | TaskRow

    @property
    def name(self) -> str:
        return self.row.dataset if isinstance(self.row, Row) else self.row.task


def value_at(recipe: Recipe, found: Iterable[Found], at: Threshold | Published) -> float:
    """The run's own figure at a place, from all its rows."""
    names, rows = recipe.names_on(at.on), list(found)
    own = _rows(rows, names, at.variant, at.budget)
    exact = _rows(rows, names, EXACT, None)
    measures = TASK_MEASURES if recipe.is_of_tasks(at.on) else TEXT_MEASURES
    return measures[at.measure](own, exact)


def _rows(found: Sequence[Found], names: Sequence[str], variant: str, budget: float | None) -> list[Any]:
    """One for each name, in that order."""
    there = {f.name: f.row for f in found if f.row.variant == variant and f.budget == budget}
    return [there[name] for name in names]
