"""Accuracy on zero-shot tasks: of each document the continuation that the model finds likeliest.

As the field does it (lm-evaluation-harness): ``accuracy`` takes the largest log-likelihood, ``accuracy_norm`` the
largest a character. A document of one continuation is right where greedy decoding would write it. The margin is finer
than both: by how many nats a character the right continuation is ahead of the best of the others. Variants are compared
document by document, so that standard errors of differences are paired.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Float

from dynamo_jax.evaluation.errors import mean_and_error
from dynamo_jax.evaluation.likelihood import likelihoods, pair_of
from dynamo_jax.progress import Progress, no_progress
from dynamo_jax.runtime.generate import Between, LanguageModel
from dynamo_jax.texts.tasks import Document


class Scores(NamedTuple):
    """Of each document. right: whether the likeliest continuation is the right one; right_norm: the likeliest a
    character; margin: nats a character, NaN of a document of one continuation. cut: documents whose context was cut."""

    right: Float[np.ndarray, " S"]
    right_norm: Float[np.ndarray, " S"]
    margin: Float[np.ndarray, " S"]
    cut: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One line of the table. standard_error: of ``accuracy``; margin: mean over the documents of more than one
    continuation, None where there are none; cut: documents whose context was cut. difference, difference_norm,
    difference_margin: to the row of ``reference``, each with its paired standard error."""

    task: str
    variant: str
    documents: int
    accuracy: float
    standard_error: float | None
    accuracy_norm: float
    standard_error_norm: float | None
    margin: float | None
    cut: int
    reference: str | None = None
    difference: float | None = None
    difference_error: float | None = None
    difference_norm: float | None = None
    difference_norm_error: float | None = None
    difference_margin: float | None = None
    difference_margin_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def scores(
    model: LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    documents: Sequence[Document],
    prefix: int | None = None,
    between: Between | None = None,
    progress: Progress = no_progress,
) -> Scores:
    """What the model makes of a task's documents. prefix: the token that an empty context has; between: as
    ``likelihoods`` takes it. ValueError: a continuation of no tokens, with its document."""
    pairs = []
    for number, document in enumerate(documents):
        try:
            pairs += [pair_of(tokenizer, document.context, text, prefix) for text in document.continuations]
        except ValueError as error:
            raise ValueError(f"document {number}: {error}") from error
    found = iter(likelihoods(model, pairs, between, progress))
    right, right_norm, margin, cut = [], [], [], 0
    for document in documents:
        own = [next(found) for _ in document.continuations]
        nats = np.array([one.nats for one in own])
        each = nats / np.array([len(text) for text in document.continuations])
        others = np.delete(each, document.label)
        right.append(own[0].greedy if len(own) == 1 else nats.argmax() == document.label)
        right_norm.append(own[0].greedy if len(own) == 1 else each.argmax() == document.label)
        margin.append(each[document.label] - others.max() if len(others) else math.nan)
        cut += any(one.cut for one in own)
    return Scores(np.array(right, float), np.array(right_norm, float), np.array(margin), cut)


def task_row(task: str, variant: str, found: Scores, reference: tuple[str, Scores] | None = None) -> TaskRow:
    """A row; the differences to ``reference``, a variant and its scores of the same documents, are paired."""
    accuracy, error = _mean(found.right)
    norm, norm_error = _mean(found.right_norm)
    more: dict[str, Any] = {}
    if reference is not None:
        other = reference[1]
        more["reference"] = reference[0]
        for name, field in (("", "right"), ("_norm", "right_norm"), ("_margin", "margin")):
            apart = _mean(getattr(found, field) - getattr(other, field))
            more |= {f"difference{name}": apart[0], f"difference{name}_error": apart[1]}
    return TaskRow(
        task=task,
        variant=variant,
        documents=len(found.right),
        accuracy=accuracy or 0.0,
        standard_error=error,
        accuracy_norm=norm or 0.0,
        standard_error_norm=norm_error,
        margin=_mean(found.margin)[0],
        cut=found.cut,
        **more,
    )


def _mean(each: Float[np.ndarray, " S"]) -> tuple[float | None, float | None]:
    """The mean of what is there, and its standard error."""
    each = each[np.isfinite(each)]
    if not len(each):
        return None, None
    return mean_and_error(each)


def compared(task: str, found: Mapping[str, Scores]) -> list[TaskRow]:
    """The rows of a task's variants, each with its differences to the row before it."""
    rows, before = [], None
    for variant, one in found.items():
        rows.append(task_row(task, variant, one, before))
        before = variant, one
    return rows
