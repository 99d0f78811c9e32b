"""A quantized model as one value: parameters, planes, plan, and what calibration knew.

Axes: S known datasets, L layers, E experts, M widths of an expert (``runtime.adapt``), W widths.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int

from dynamo_jax.models.config import ModelConfig
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import Planes
from dynamo_jax.runtime.memory import SPARE
from dynamo_jax.runtime.mesh import Placement, placed_parameters
from dynamo_jax.runtime.signatures import FREEDOM, SPAN, Signatures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What calibration on the known datasets left behind for run time.

    counts: routed tokens a dataset, layer and expert.
    unseen: the same of text that stood for what nobody has seen, which is none of the datasets.
    signatures: what the monitor compares with, of each dataset's main kind of text.
    odd: the windows of each dataset, counted from 1, that are unlike the rest of it, which ``signatures`` leaves out.
    loss_per_error: nats a token for each unit of mean squared expert-output error, by layer.
    block_errors: nats a token that each of an expert's widths loses, mean over all calibration tokens.
    correction: for each expert and width, its measured error over the sum of its blocks'.
    calibrated: each dataset's text digest and the number of windows that calibration used.
    tokens: calibration tokens of all datasets together.
    """

    names: tuple[str, ...]
    counts: Float[np.ndarray, "S L E"]
    unseen: Float[np.ndarray, "L E"]
    signatures: Signatures
    odd: dict[str, tuple[int, ...]]
    loss_per_error: Float[np.ndarray, " L"]
    block_errors: Float[np.ndarray, "L E M W"]
    correction: Float[np.ndarray, "L E W"]
    calibrated: dict[str, tuple[str, int]]
    tokens: int

    def losses(self, errors: Float[np.ndarray, "L E M W"]) -> Float[np.ndarray, "L E M W"]:
        """Nats that measured errors of experts' outputs cost."""
        return errors * self.correction[:, :, None, :] * self.loss_per_error[:, None, None, None]

    def blind(self) -> str | None:
        """Why nothing can be called novel, and what helps; None where text can."""
        return blind(np.asarray(self.signatures.limit), self.tokens)


def blind(limit: Float[np.ndarray, " S"], tokens: int) -> str | None:
    """``Knowledge.blind`` from the monitor's limits and the tokens of calibration."""
    if np.isfinite(limit).all():
        return None
    known = np.size(limit)
    least = known * (-(-FREEDOM // known) + 1) * SPAN
    return (
        f"nothing can be called novel: calibration had {tokens:,} tokens, and the monitor needs {least:,}, as many of "
        "each known dataset; more windows help (quantize --windows)"
    )


def odd_words(odd: dict[str, tuple[int, ...]], windows: dict[str, int]) -> list[str]:
    """A line for each dataset that is not of one kind; windows: how many it has."""
    return [
        f"{name}: {len(numbers)} of {windows[name]} windows ({ranges(numbers)}) are unlike the rest; "
        "the monitor leaves them out"
        for name, numbers in odd.items()
        if numbers
    ]


def ranges(numbers: tuple[int, ...]) -> str:
    """ "1-12, 15" of ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedExperts:
    """The routed experts of a model, which need not be one of ours: all that serving takes.

    store: planes of all experts, (L, E, P, F, ..) for P = 3 projections and F channels, in host memory. plan: the
    baseline. knowledge: what calibration left behind for run time, None where there was none. spare: slots beside the
    baseline's, as a share of its pages. held: on one of several processes, the experts whose planes ``store`` has, in
    ascending order; None where it has all.
    """

    store: Planes
    plan: Plan
    knowledge: Knowledge | None
    spare: float = SPARE
    held: Int[np.ndarray, " O"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModel(QuantizedExperts):
    """Everything that ``dynamo-jax quantize`` writes and ``eval`` loads: a decoder of ours with its experts.

    parameters: all but the expert weights, by dotted name. window: tokens of a calibration window. files: the
    small files of the model that was quantized, config.json and tokenizer.json among them.
    """

    knowledge: Knowledge
    config: ModelConfig
    parameters: dict[str, Array]
    tokenizer: tokenizers.Tokenizer
    window: int
    files: dict[str, bytes]

    def device_parameters(self, dtype: Any = None, placement: Placement | None = None) -> dict[str, Array]:
        """The parameters on the device, or on several, as they are or in one dtype. A step computes in the dtype that
        it is given, so that these need no more bytes than they have in the file."""
        return placed_parameters(placement, self.config, self.parameters, dtype)
