"""What a quantization is asked for, checked against the model that it is for: budget, objective, blocks, windows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dynamo_jax.kernels.layout import WIDTHS, num_blocks
from dynamo_jax.models.config import ExpertSizes, ModelConfig
from dynamo_jax.models.rest import FLOAT, check_rest
from dynamo_jax.precision.allocate import OBJECTIVES
from dynamo_jax.precision.plan import block_costs, expert_plan
from dynamo_jax.quant.nested_gptq import EMPHASIS
from dynamo_jax.runtime.memory import SPARE, device_bytes

BITS = 3.0  # a weight, where no budget is given
RESERVE = 0.1  # of fits_gib, where no reserve is given
BUDGETS = ("bits", "budget_bytes", "fits_gib")  # fields of which one is given
GIB = 2**30
LARGEST_GIB = 2**20
LARGEST_SPARE = 100
LARGEST_WEIGHT = 1e9
QUANTIZERS = ("gptq", "rtn")
NOVELTY_WEIGHT = 0.25  # benchmarks/unseen.py
UNSEEN = "unseen"  # the dataset that stands for text that nobody has seen
DRAWING_BYTES = 4 * 2**30  # of a model, at most, for it to be loaded and to draw that text where nobody asked
DISTIL_WINDOWS = 8  # at least, of which one is held out
DISTIL_UNSEEN = 0.5  # of distillation's windows, where text that nobody has seen is expected (docs/log.md)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What ``dynamo-jax quantize`` decides by. Windows are of ``window`` tokens.

    The budget is what the device holds of the experts when it serves: the baseline's planes with their scales, page
    tables, spare slots for pages of novel text, and pages on their way to these (``runtime.memory``). Give one of bits,
    budget_bytes and fits_gib.

    - bits: a weight of the experts; 3 where no budget is given.
    - budget_bytes: of all experts.
    - fits_gib: device memory in GiB for the whole model: the experts, what is not quantized, and reserve_gib.
    - reserve_gib: for the key/value cache, activations, a monitor for each request and what measuring a text takes
      between two steps; a tenth of fits_gib by default.
    - spare: slots for pages of novel text while other requests need the baseline, as a share of its pages.
    - max_width: planes of more bits are left out, in memory and on disk; 2, 3, 4 or 8.
    - objective: the loss of a plan over the known datasets, their sum or the worst (``precision.allocate``).
    - weights: what datasets count for in the sum, by name; 1 for those that are not named.
    - novelty_weight: the share of the text to come that is expected to be like none of the datasets; 0: all of it is
      like them.
    - unseen_windows: calibration windows of text that stands for that share. The dataset named ``unseen`` has them, if
      one is given; else the model draws them (``calibration.unseen``). By default as many as of all known datasets
      together, and none where a model of more than ``DRAWING_BYTES`` would have to draw; 0: what such text costs is
      expected from the known datasets (``plans.expecting``).
    - per_projection: whether an expert's gate and up have one width and its down another.
    - group_size: weights that share a scale, by default the largest of 128, 64, 32, 16 that divides the hidden size,
      or 8. The kernels of TPUs and Hopper GPUs take multiples of 128.
    - channel_block: channels that share a width; these kernels take 128. Neither it nor group_size need divide the
      model's sizes: planes are filled up (``kernels.layout``), in bytes that the budget counts.
    - rest: 8 or 4 bits for the matrices that are no routed experts' (``models.rest``): mixers' projections, shared
      experts, dense layers, embeddings and head; 16: they keep their dtype. Experts are calibrated behind them.
    - quantizer: gptq or rtn (``sweeps.Calibration``).
    - emphasis: what squared errors at 2, 3 and 4 bits count for each other when gptq chooses the codes that these
      widths share.
    - favour: how many times more they count at the width that a first plan gives the expert; 1: no first plan is made.
    - asymmetric: whether gptq makes down for the hidden channels that quantized gate and up give it
      (``quant.asymmetric``), or for those of float ones.
    - distil: tokens that codes and base scales are trained on once there is a plan (``calibration.distil``), 0 for
      none: known texts and as much text that the model draws, unless novelty_weight is 0. The whole model must fit
      memory.
    - window: tokens of a window.
    - calibration_windows: of each known dataset, from its beginning.
    - batch_size: windows that run together.
    """

    bits: float | None = None
    budget_bytes: int | None = None
    fits_gib: float | None = None
    reserve_gib: float | None = None
    spare: float = SPARE
    max_width: int = WIDTHS[-1]
    objective: str = "sum"
    weights: dict[str, float] | None = None
    novelty_weight: float = NOVELTY_WEIGHT
    unseen_windows: int | None = None
    per_projection: bool = True
    group_size: int | None = None
    channel_block: int = 16
    rest: int = FLOAT
    quantizer: str = "gptq"
    emphasis: tuple[float, float, float] = EMPHASIS
    favour: float = 4.0
    asymmetric: bool = True
    distil: int = 0
    window: int = 256
    calibration_windows: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("window", "calibration_windows", "batch_size", "channel_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.novelty_weight <= 1:
            raise ValueError(f"novelty_weight {self.novelty_weight}: expected a share of the text to come, 0 to 1")
        if self.unseen_windows is not None and self.unseen_windows < 0:
            raise ValueError(f"unseen_windows {self.unseen_windows}: expected 0 or more")
        given = [n for n in BUDGETS if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: a budget is given one way only")
        if not given:
            object.__setattr__(self, "bits", BITS)
        elif not (math.isfinite(value := getattr(self, given[0])) and value > 0):
            raise ValueError(f"{given[0]} {value}: expected a positive number")
        if not 0 <= self.spare <= LARGEST_SPARE:
            raise ValueError(f"spare {self.spare}: expected a share of the baseline's pages, 0 for none")
        if self.fits_gib is not None and self.fits_gib > LARGEST_GIB:
            raise ValueError(f"fits_gib {self.fits_gib:g}: expected at most {LARGEST_GIB:,}")
        check_rest(self.rest)
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer {self.quantizer!r}: known are {', '.join(QUANTIZERS)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r}: known are {', '.join(OBJECTIVES)}")
        if len(self.emphasis) != 3 or not all(math.isfinite(e) and e > 0 for e in self.emphasis):
            raise ValueError(f"emphasis {self.emphasis}: expected three positive numbers, for 2, 3 and 4 bits")
        least = max(self.batch_size, DISTIL_WINDOWS) * self.window
        if self.distil and self.distil < least:
            raise ValueError(f"distil {self.distil}: expected {least:,} tokens or more, or 0 for none")
        if not (math.isfinite(self.favour) and self.favour > 0):
            raise ValueError(f"favour {self.favour}: expected a positive number, 1 for none")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise ValueError(f"group_size {self.group_size}: expected a positive multiple of 8")
        if self.max_width not in WIDTHS:
            raise ValueError(f"max_width {self.max_width}: known are {', '.join(map(str, WIDTHS))}")
        if self.reserve_gib is not None and self.fits_gib is None:
            raise ValueError("reserve_gib: it is a part of fits_gib, which is not given")
        if self.reserve_gib is not None and not (math.isfinite(self.reserve_gib) and self.reserve_gib >= 0):
            raise ValueError(f"reserve_gib {self.reserve_gib}: expected a number of 0 or more")

    def bytes_for(self, weights: int, others: int | None = None) -> float:
        """The budget of all experts in bytes, which have so many weights; ``others``: bytes of all else, which
        fits_gib needs."""
        if self.bits is not None:
            return self.bits * weights / 8
        if self.budget_bytes is not None:
            return self.budget_bytes
        assert self.fits_gib is not None
        if others is None:
            raise ValueError(f"fits_gib {self.fits_gib:g}: the bytes of what is no expert are not known here")
        return (self.fits_gib - self.reserve) * GIB - others

    @property
    def reserve(self) -> float:
        """GiB of fits_gib that are neither experts nor other weights."""
        return RESERVE * (self.fits_gib or 0) if self.reserve_gib is None else self.reserve_gib

    def unseen_count(self, known: int) -> int:
        """Windows that stand for text that nobody has seen, beside those of so many known datasets."""
        if self.novelty_weight == 0:
            return 0
        return known * self.calibration_windows if self.unseen_windows is None else self.unseen_windows

    def drawn_count(self, known: int, model_bytes: int) -> int:
        """Of these windows, those that a model of so many bytes draws where no dataset has them."""
        if self.unseen_windows is None and model_bytes > DRAWING_BYTES:
            return 0
        return self.unseen_count(known)

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that a plan may have."""
        return tuple(width for width in WIDTHS if width <= self.max_width)

    def group(self, hidden_size: int) -> int:
        """The group size for a model."""
        if self.group_size is not None:
            return self.group_size
        return next((g for g in (128, 64, 32, 16) if hidden_size % g == 0), 8)


def check_sizes(sizes: ExpertSizes, config: QuantizeConfig) -> None:
    """ValueError if blocks or groups do not fit experts of these sizes."""
    if not 1 <= config.channel_block <= sizes.channels:
        raise ValueError(f"channel_block {config.channel_block} is not in 1..{sizes.channels}, the channels")
    group_size = config.group(sizes.hidden_size)
    if group_size % 8 or not 8 <= group_size <= sizes.hidden_size:
        raise ValueError(f"group_size {group_size} is no multiple of 8 up to the hidden size {sizes.hidden_size}")


def check_shapes(model: ModelConfig, config: QuantizeConfig) -> None:
    check_sizes(model.expert_sizes, config)
    if config.window > model.max_position_embeddings:
        raise ValueError(f"window {config.window} is past the model's {model.max_position_embeddings} positions")


def settled(config: QuantizeConfig, parts: Sequence[ExpertSizes], others: int, names: list[str]) -> QuantizeConfig:
    """The settings, checked against the known datasets' names and the sizes of a model's experts, with a budget that
    needs no more facts.

    others: bytes of all that is no expert's weight, as it is stored when the rest has ``config.rest`` bits.
    """
    for sizes in parts:
        check_sizes(sizes, config)
    check_weights(config, names)
    weights = sum(sizes.weights for sizes in parts)
    least = sum(_least_bytes(config, sizes) for sizes in parts)
    budget = config.bytes_for(weights, others)
    if budget < least:
        asked = next(f"{n} {v:g}" for n in BUDGETS if (v := getattr(config, n)) is not None)
        groups = " or ".join(str(g) for g in sorted({config.group(sizes.hidden_size) for sizes in parts}))
        raise ValueError(
            f"the budget, {asked}, is too small: the least is {8 * least / weights:g} bits a weight "
            f"(2 bits, a scale for each group of {groups}, whole groups and blocks), {least:,} bytes, "
            f"or {(least + others) / GIB + config.reserve:.4g} GiB with the {others:,} bytes that are no experts'"
            + (f" and a reserve of {config.reserve:g} GiB" if config.reserve else "")
            + _filling(config, parts)
        )
    _check_most(config, parts)
    if config.fits_gib is None:
        return config
    return dataclasses.replace(config, fits_gib=None, reserve_gib=None, budget_bytes=int(budget))


def _least_bytes(config: QuantizeConfig, sizes: ExpertSizes) -> int:
    costs = block_costs(config.channel_block, sizes.hidden_size, config.group(sizes.hidden_size))
    return int(costs[0]) * num_blocks(sizes.channels, config.channel_block) * sizes.experts * sizes.layers


def _filling(config: QuantizeConfig, parts: Sequence[ExpertSizes]) -> str:
    """What filling experts up to whole blocks and groups adds to them, in words; none where nothing is added."""
    words = []
    for sizes in parts:
        for name, size, unit, what in (
            ("channel_block", sizes.channels, config.channel_block, "channels of an expert"),
            ("group_size", sizes.hidden_size, config.group(sizes.hidden_size), "inputs of the hidden size"),
        ):
            if (whole := -(-size // unit) * unit) != size:
                words.append(f"{name} {unit} fills the {size:,} {what} up to {whole:,}")
    return f"; {', and '.join(words)}: choose one that divides them for less" if words else ""


def _check_most(config: QuantizeConfig, parts: Sequence[ExpertSizes]) -> None:
    """ValueError if ``bits`` are more than the widest planes and their slots can use, and not the default."""
    if config.bits is None or config.bits <= BITS:
        return
    total = 0
    for each in parts:
        shape = (each.layers, each.experts, 2 if config.per_projection else 1)
        sizes = (each.channels, config.channel_block, config.group(each.hidden_size), each.hidden_size)
        total += device_bytes(expert_plan(np.full(shape, config.max_width), *sizes), config.spare).total
    most = 8 * total / sum(each.weights for each in parts)
    if config.bits > most:
        raise ValueError(
            f"bits {config.bits:g}: more than there are; all planes of the experts up to {config.max_width} bits, with "
            f"their slots, are {most:.4f} bits a weight"
        )


def check_weights(config: QuantizeConfig, names: list[str]) -> None:
    """ValueError if ``config.weights`` do not fit the known datasets, or there is none."""
    if UNSEEN in names and config.unseen_count(1) == 0:
        raise ValueError(f"{UNSEEN}: this dataset stands for text to come, of which the settings expect none")
    if UNSEEN in names and UNSEEN in (config.weights or {}):
        raise ValueError(f"weights: {UNSEEN} counts as novelty_weight says")
    names = [name for name in names if name != UNSEEN]
    if not names:
        raise ValueError("no known dataset: calibration needs at least one")
    for name, value in (config.weights or {}).items():
        if name not in names:
            raise ValueError(f"weights: {name} is none of the known datasets, {', '.join(names)}")
        if not 0 <= value <= LARGEST_WEIGHT:
            raise ValueError(f"weights: {name} = {value}, expected a number of 0 to {LARGEST_WEIGHT:g}")
    if config.weights and not any(config.weights.get(name, 1.0) for name in names):
        raise ValueError("weights: no known dataset counts for anything")
    if config.objective == "worst" and any(v != 1 for v in (config.weights or {}).values()):
        raise ValueError("weights: the objective worst takes none; each dataset is measured by its own best plan")
