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

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynamo_jax.evaluation.errors import mean_and_error
from dynamo_jax.evaluation.reference import Apart, Divergences, Exact, Likeliest, divergences
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.loss import Head
from dynamo_jax.precision.plan import touched_share
from dynamo_jax.texts.windows import batches, token_windows

# tokens (B, T1) -> losses (B,), counts (B, K, L, E), hidden states (B, T, D)
StepFn = Callable[[Array], tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How texts are evaluated. window: tokens; batch_size, adaptation_windows: windows, the latter the first ones of
    a text that monitor and adaptation see; limit: windows that count at most, None for all. batch: requests that a
    decode step is taken to serve together; reads: how many times the baseline's bytes such a step may read once
    adapted. ValueError: a number below 1, reads that are not above 0."""

    window: int = 256
    batch_size: int = 8
    adaptation_windows: int = 8
    limit: int | None = None
    batch: int = 1
    reads: float = 1.0

    def __post_init__(self) -> None:
        for name in ("window", "batch_size", "adaptation_windows", "limit", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} {value}: expected 1 or more")
        if not (math.isfinite(self.reads) and self.reads > 0):
            raise ValueError(f"reads {self.reads}: expected a number above 0")

    def check(self, model: ModelConfig) -> None:
        """ValueError if the windows are longer than the model can be given."""
        if self.window > model.max_position_embeddings:
            raise ValueError(f"window {self.window} is past the model's {model.max_position_embeddings} positions")


class Losses(NamedTuple):
    """nll: summed nats a window; counts: its routed tokens, in K pieces of what the monitor takes in at once; apart:
    how far each prediction is from a reference's, where there is one."""

    nll: Float[np.ndarray, " S"]
    counts: Float[np.ndarray, "S K L E"]
    apart: Apart | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    device_bits: that the device holds for a weight of the experts, spare slots included. bytes_per_token: of experts,
    that one request alone reads; bytes_per_step: that a step of ``batch`` requests of this text reads. difference: nll
    minus the reference row's, with its standard error. divergence: from a reference model, where there is one.
    """

    dataset: str
    kind: str  # known | novel
    variant: str
    device_bits: float
    bytes_per_token: float
    batch: int
    bytes_per_step: float
    tokens: int
    nll: float
    perplexity: float
    reference: str | None = None
    difference: float | None = None
    standard_error: float | None = None
    divergence: Divergences | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Reference = tuple[str, Losses]  # a row's variant and what it lost, for paired differences


class Dataset(NamedTuple):
    """Windows to judge and adapt on, and windows to evaluate on."""

    name: str
    kind: str
    first: Int[np.ndarray, "S T1"]
    rest: Int[np.ndarray, "S T1"]


def run_windows(
    step: StepFn,
    windows: Int[np.ndarray, "S T1"],
    batch_size: int,
    exact: Exact | Likeliest | None = None,
    head: Head | None = None,
) -> Losses:
    """Losses of all windows in batches of one shape. exact: what a reference makes of them; head: of the model, which
    its hidden states go through to be compared with that."""
    nll, counts, apart, start = [], [], [], 0
    for tokens, mask in batches(windows, batch_size):
        part = jnp.asarray(tokens)
        losses, routed, hidden = step(part)
        real = mask[:, 0] > 0
        nll.append(np.asarray(losses, np.float64)[real])
        counts.append(np.asarray(routed, np.float64)[real])
        if exact is not None and head is not None:
            apart.append(exact.apart(hidden, head, part, slice(start, start + int(real.sum()))))
        start += int(real.sum())
    together = Apart(*(np.concatenate(a) for a in zip(*apart))) if apart else None
    return Losses(np.concatenate(nll), np.concatenate(counts), together)


def make_row(
    data: Dataset,
    variant: str,
    losses: Losses,
    device_bits: float,
    expert_bytes: Float[np.ndarray, "L E"],
    reference: Reference | None,
    batch: int = 1,
) -> Row:
    """A row; the difference to ``reference`` is paired by window. expert_bytes: that reading an expert takes."""
    tokens = data.rest[:, 1:].size
    nll = float(losses.nll.sum() / tokens)
    use = losses.counts.sum(axis=(0, 1)) / tokens
    difference = error = None
    if reference is not None:
        per_window = (losses.nll - reference[1].nll) / (data.rest.shape[1] - 1)
        difference, error = mean_and_error(per_window)
    return Row(
        dataset=data.name,
        kind=data.kind,
        variant=variant,
        device_bits=device_bits,
        bytes_per_token=float((expert_bytes * use).sum()),
        batch=batch,
        bytes_per_step=float((expert_bytes * touched_share(use, batch)).sum()),
        tokens=tokens,
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),
        reference=reference[0] if reference else None,
        difference=difference,
        standard_error=error,
        divergence=None if losses.apart is None else divergences(losses.apart),
    )


def windows_over(count: int, window: int, config: EvalConfig) -> int:
    """How many windows of evaluation ``count`` windows of ``window`` tokens reach into."""
    return -(-count * window // config.window)


def make_dataset(
    name: str,
    kind: str,
    text: str,
    tokenizer: Any,
    config: EvalConfig,
    calibrated: int = 0,
    vocab_size: int | None = None,
) -> Dataset:
    """Windows of a text: ``calibrated`` ones left out, then those for adaptation, then those that rows count.

    A text with few windows gives half of them to adaptation. vocab_size: of the model, which ids are checked by.
    """
    most = None
    if config.limit is not None:
        most = calibrated + config.adaptation_windows + max(config.adaptation_windows, config.limit)
    windows = token_windows(text, tokenizer, config.window, name, most, vocab_size)[calibrated:]
    if len(windows) < 2:
        raise ValueError(
            f"{name}: {len(windows)} windows of {config.window} tokens are left after {calibrated} used in "
            "calibration; evaluation needs two, one to adapt on and one to count"
        )
    first = min(config.adaptation_windows, len(windows) // 2)
    return Dataset(name, kind, windows[:first], windows[first:][: config.limit])
