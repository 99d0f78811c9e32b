"""Text to a quantized model: calibrate on the known datasets, allocate, quantize.

``calibrate.py`` does the long part; this module turns text into its windows and its sums into a plan.
A model in memory becomes a ``QuantizedModel``; a checkpoint folder, of any size, becomes a folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dynamo_jax.analysis.dynamics import Dynamics, Significance, dynamics
from dynamo_jax.analysis.significance import (
    apart_significance,
    block_significance,
    channel_significance,
    expert_significance,
    per_token,
    whole_over_blocks,
)
from dynamo_jax.analysis.statistics import Statistics, merge
from dynamo_jax.calibration.sweeps import (
    QUANTIZERS,
    Calibration,
    Draft,
    LayerSource,
    Progress,
    calibrate,
    statistics_of,
)
from dynamo_jax.kernels.layout import WIDTHS, filled
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, expert_parameter_names, parameters
from dynamo_jax.models.experts import ExpertWeights
from dynamo_jax.models.huggingface import Source, load_tokenizer, side_files, side_files_of
from dynamo_jax.precision.allocate import OBJECTIVES, allocate_known
from dynamo_jax.precision.plan import Plan, block_costs, expert_plan, item_costs
from dynamo_jax.quant.nested_gptq import EMPHASIS
from dynamo_jax.runtime.monitor import HOP, LONGEST, learn, novelty_threshold, spans
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.work import Bundle, FolderWork, MemoryWork, Work
from dynamo_jax.texts.reading import token_windows

BITS = 3.0  # a weight, where no budget is given
BUDGETS = ("bits", "budget_bytes", "fits_gib")  # fields of which one is given
WORK_FORMAT = 2  # of unfinished work: raised when bundles change their meaning
GIB = 2**30


def no_progress(stage: str, done: float, of: int) -> None:
    """The callback that shows nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What ``dynamo-jax quantize`` decides by. Windows are of ``window`` tokens.

    The budget is one of bits, a weight of the experts, scales included (3 by default); budget_bytes, of all experts;
    fits_gib, memory in GiB for the weights of the whole model: the experts' planes and what is not quantized (not
    the key/value cache, not activations).
    objective: the loss of a plan over the known datasets, their sum or the worst (``precision.allocate``). weights:
    what datasets count for in the sum, by name; 1 for those that are not named.
    per_projection: whether an expert's gate and up have one width and its down another.
    group_size: weights that share a scale, by default the largest of 128, 64, 32, 16 that divides the hidden size, or
    8. Neither it nor channel_block need divide the model's sizes: planes are filled up (``kernels.layout``), in bytes
    that the budget counts. The kernels of TPUs and Hopper GPUs take blocks of 128 and groups of multiples of 128.
    quantizer: gptq or rtn (``calibrate.Calibration``). emphasis: what squared errors at 2, 3 and 4 bits count for
    each other when gptq chooses the codes that these widths share; favour: how many times more they count at the
    width that a first plan gives the expert (1: no first plan is made).
    """

    bits: float | None = None
    budget_bytes: int | None = None
    fits_gib: float | None = None
    objective: str = "sum"
    weights: dict[str, float] | None = None
    per_projection: bool = True
    group_size: int | None = None
    channel_block: int = 16
    quantizer: str = "gptq"
    emphasis: tuple[float, float, float] = EMPHASIS
    favour: float = 4.0
    window: int = 256
    calibration_windows: int = 32
    adaptation_windows: int = 8
    batch_size: int = 8

    def __post_init__(self) -> None:
        given = [n for n in BUDGETS if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: a budget is given one way only")
        if not given:
            object.__setattr__(self, "bits", BITS)
        elif not (math.isfinite(value := getattr(self, given[0])) and value > 0):
            raise ValueError(f"{given[0]} {value}: expected a positive number")

    def bytes_for(self, model: ModelConfig, others: int | None = None) -> float:
        """The budget of all experts in bytes; ``others``: bytes of what is not quantized, which fits_gib needs."""
        if self.bits is not None:
            return self.bits * model.num_expert_weights / 8
        if self.budget_bytes is not None:
            return self.budget_bytes
        assert self.fits_gib is not None
        if others is None:
            raise ValueError(f"fits_gib {self.fits_gib:g}: the bytes of what is not quantized are not known here")
        return self.fits_gib * GIB - others

    def group(self, hidden_size: int) -> int:
        """The group size for a model."""
        if self.group_size is not None:
            return self.group_size
        return next((g for g in (128, 64, 32, 16) if hidden_size % g == 0), 8)


class Analysis(NamedTuple):
    """One dataset's sums. sensitivity: of its tokens' importance; windows: routing counts of each window (S, L, E);
    halves: the sums of the first half of its windows and of the rest (no tokens if there is one window)."""

    stats: Statistics
    sensitivity: Float[np.ndarray, " L"]
    windows: Float[np.ndarray, "S L E"]
    halves: tuple[Analysis, ...] = ()

    def expert_significance(self) -> Float[np.ndarray, "L E W"]:
        return expert_significance(self.stats)

    def apart_significance(self) -> Float[np.ndarray, "L E U W"]:
        return apart_significance(self.stats)

    def block_significance(self) -> Float[np.ndarray, "L E N W"]:
        return block_significance(self.stats)

    def channel_significance(self, down: Float[ArrayLike, "L E F D"]) -> Float[np.ndarray, "L E F"]:
        return channel_significance(self.stats, down)


class DecoderSource:
    """A decoder in memory, layer by layer: see ``calibrate.LayerSource``."""

    def __init__(self, model: Decoder):
        self.config = model.config
        self._arrays = {name: np.asarray(a) for name, a in parameters(model).items()}

    def top(self) -> Bundle:
        return {name: a for name, a in self._arrays.items() if not name.startswith("layers.")}

    def layer(self, layer: int) -> Bundle:
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): a for name, a in self._arrays.items() if name.startswith(prefix)}
        return {name: a for name, a in own.items() if name not in ExpertWeights._fields}

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gate, up, down = (self._arrays[f"layers.{layer}.{part}"][expert] for part in ExpertWeights._fields)
        return gate, up, down

    def other_bytes(self) -> int:
        """Of all but the routed experts' weights."""
        return sum(a.nbytes for n, a in self._arrays.items() if n.rpartition(".")[2] not in ExpertWeights._fields)

    def release(self) -> None:
        pass


def layer_weights(model: Decoder, layer: int) -> ExpertWeights:
    """Weights of the experts of the ``layer``-th layer that has some."""
    weights = model.moe_layers()[layer].expert_weights()
    assert weights is not None
    return weights


def batches(windows: Int[np.ndarray, "S T1"], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of exactly ``size`` windows with masks (size, T); the last one is filled with masked copies."""
    out = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        mask = np.zeros((size, windows.shape[1] - 1), np.float32)
        mask[: len(part)] = 1
        out.append((np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)]), mask))
    return out


def known_windows(
    known: dict[str, str], tokenizer: tokenizers.Tokenizer, config: QuantizeConfig
) -> dict[str, Int[np.ndarray, "S T1"]]:
    if not known:
        raise ValueError("no known dataset: calibration needs at least one")
    return {
        name: token_windows(text, tokenizer, config.window, name, config.calibration_windows)
        for name, text in known.items()
    }


def analyze(
    source: LayerSource,
    windows: dict[str, Int[np.ndarray, "S T1"]],
    config: QuantizeConfig,
    work: Work,
    progress: Progress = no_progress,
) -> dict[str, Analysis]:
    """Calibrate on all datasets at once; each one's sums, and those of its halves."""
    tokens = np.concatenate(list(windows.values()))
    sizes = [size for w in windows.values() for size in ((len(w) + 1) // 2, len(w) // 2)]
    half = np.repeat(np.arange(len(sizes)), sizes)
    favour = functools.partial(favoured, names=list(windows), config=config, model=source.config)
    job = Calibration(
        source=source,
        tokens=tokens,
        dataset=half,
        datasets=len(sizes),
        group_size=config.group(source.config.hidden_size),
        channel_block=config.channel_block,
        apart=config.per_projection,
        quantizer=config.quantizer,
        emphasis=config.emphasis,
        favour=favour if config.favour != 1 else None,
        batch_size=config.batch_size,
        work=work,
        progress=progress,
    )
    calibrate(job)
    records = statistics_of(work, source.config)
    halves = []
    for index in range(len(sizes)):
        fields: dict[str, Any] = {f: np.stack([r[f][index] for r in records]) for f in Statistics._fields}
        halves.append(
            Analysis(
                Statistics(**fields),
                np.array([r["sensitivity"][index] for r in records]),
                np.stack([r["windows"][half == index] for r in records], axis=1),
            )
        )
    return {name: _whole(halves[2 * i], halves[2 * i + 1]) for i, name in enumerate(windows)}


def _whole(first: Analysis, second: Analysis) -> Analysis:
    windows = np.concatenate([first.windows, second.windows])
    sensitivity = first.sensitivity + second.sensitivity
    return Analysis(merge(first.stats, second.stats), sensitivity, windows, (first, second))


def dynamics_of(analyses: dict[str, Analysis]) -> Dynamics:
    """How far routing and the significance at the least width move between the datasets and within them."""

    def at_least_width(a: Analysis) -> Significance:
        return Significance(a.expert_significance()[..., 0], a.block_significance()[..., 0])

    return dynamics(
        {n: a.windows for n, a in analyses.items()},
        {n: at_least_width(a) for n, a in analyses.items()},
        {n: (at_least_width(a.halves[0]), at_least_width(a.halves[1])) for n, a in analyses.items()},
    )


def favoured(
    draft: Draft, names: list[str], config: QuantizeConfig, model: ModelConfig
) -> Float[np.ndarray, "L E U 3"]:
    """The emphasis of each expert: ``config.emphasis``, with ``config.favour`` at its width in a drafted plan.

    The draft holds the halves of each dataset, as ``analyze`` names them to the calibration.
    """
    whole = Draft(*(a[0::2] + a[1::2] for a in draft))
    losses = [errors * (sensitivity / tokens**2)[:, None, None, None] for errors, sensitivity, tokens in zip(*whole)]
    plan = _allocated(dict(zip(names, losses)), config, model)
    widths = plan.widths[:, :, :: plan.blocks, None]
    return np.where(widths == np.array(WIDTHS[:3]), config.favour, 1.0) * np.array(config.emphasis)


def baseline_plan(analyses: dict[str, Analysis], config: QuantizeConfig, model: ModelConfig) -> Plan:
    """The plan of least loss over the known datasets, by ``config.objective``, under the byte budget."""
    losses = {
        name: a.apart_significance() if config.per_projection else a.expert_significance()[:, :, None]
        for name, a in analyses.items()
    }
    return _allocated(losses, config, model)


def _allocated(losses: dict[str, Float[np.ndarray, "L E U W"]], config: QuantizeConfig, model: ModelConfig) -> Plan:
    group_size = config.group(model.hidden_size)
    blocks = filled(model.intermediate_size, config.channel_block) // config.channel_block
    costs = item_costs(blocks, config.channel_block, model.hidden_size, group_size, config.per_projection)
    items = np.stack(list(losses.values())).reshape(len(losses), -1, len(WIDTHS))
    experts = model.num_moe_layers * model.num_experts
    weights = np.array([(config.weights or {}).get(name, 1.0) for name in losses])
    widths = allocate_known(
        items,
        np.tile(costs[::blocks] * blocks, (experts, 1)),
        config.bytes_for(model),
        config.objective,
        weights,
    )
    shape = (model.num_moe_layers, model.num_experts, -1)
    channels = model.intermediate_size
    return expert_plan(widths.reshape(shape), channels, config.channel_block, group_size, model.hidden_size)


def knowledge_of(
    analyses: dict[str, Analysis],
    config: QuantizeConfig,
    calibrated: dict[str, tuple[str, int]],
) -> Knowledge:
    """Signatures, prior errors and corrections of the known datasets together."""
    runs = list(analyses.values())
    stats = functools.reduce(merge, (a.stats for a in runs))
    tokens = float(stats.tokens[0])
    blocks = np.asarray(stats.block_errors)
    correction = whole_over_blocks(np.asarray(stats.errors), blocks)
    block_errors = per_token(blocks * correction[:, :, None, :], stats)
    size = max(1, round(2 * HOP / config.window))  # windows of what the monitor looks at
    scatter = learn([spans(a.windows, size) for a in runs])
    if config.window > LONGEST:  # longer windows scatter less than what it looks at, and would make all of that novel
        scatter = scatter._replace(limit=scatter.limit * np.inf)
    return Knowledge(
        names=tuple(analyses),
        counts=np.stack([np.asarray(a.stats.counts) for a in runs]),
        centre=np.asarray(scatter.centre),
        inverse=np.asarray(scatter.inverse),
        limit=np.asarray(scatter.limit),
        threshold=novelty_threshold({n: a.windows for n, a in analyses.items()}, config.adaptation_windows),
        loss_per_error=np.sum([a.sensitivity for a in runs], axis=0) / tokens,
        block_errors=block_errors,
        correction=correction,
        calibrated=calibrated,
        tokens=int(tokens),
    )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plan_and_knowledge(
    source: LayerSource,
    windows: dict[str, Int[np.ndarray, "S T1"]],
    known: dict[str, str],
    config: QuantizeConfig,
    work: Work,
    progress: Progress,
) -> tuple[Plan, Knowledge, dict[str, Analysis]]:
    analyses = analyze(source, windows, config, work, progress)
    progress("allocate", 0, 1)
    plan = baseline_plan(analyses, config, source.config)
    calibrated = {name: (digest(known[name]), len(w)) for name, w in windows.items()}
    knowledge = knowledge_of(analyses, config, calibrated)
    progress("allocate", 1, 1)
    return plan, knowledge, analyses


def quantize(
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    known: dict[str, str],
    config: QuantizeConfig,
    progress: Progress = no_progress,
) -> tuple[QuantizedModel, dict[str, Analysis]]:
    """Calibrate a model in memory on the known texts (name -> text), allocate under the budget, quantize."""
    source = DecoderSource(model)
    config = settled(config, model.config, source.other_bytes(), list(known))
    work = MemoryWork()
    windows = known_windows(known, tokenizer, config)
    plan, knowledge, analyses = _plan_and_knowledge(source, windows, known, config, work, progress)
    experts = set(expert_parameter_names(model.config))
    quantized = QuantizedModel(
        config=model.config,
        parameters={name: a for name, a in parameters(model).items() if name not in experts},
        tokenizer=tokenizer,
        store=checkpoint.stacked_planes(work.get, model.config),
        plan=plan,
        window=config.window,
        knowledge=knowledge,
        files=side_files_of(model.config, tokenizer),
    )
    return quantized, analyses


def quantize_folder(
    folder: Path, out: Path, known: dict[str, str], config: QuantizeConfig, progress: Progress = no_progress
) -> Plan:
    """As ``quantize``, for a Hugging Face folder that memory need not hold; the result is the folder ``out``.

    Unfinished work lies in a hidden folder beside ``out``. The same call resumes it at its last finished layer,
    and the result is the same bits.
    """
    source = Source(folder)
    config = settled(config, source.config, source.other_bytes(), list(known))
    checkpoint.check_free(out)
    tokenizer = load_tokenizer(folder, source.config.vocab_size)
    windows = known_windows(known, tokenizer, config)
    out = out.absolute()
    job = {
        "format": WORK_FORMAT,
        "settings": dataclasses.asdict(config),
        "texts": [[name, digest(text)] for name, text in known.items()],  # in order: windows have that of the texts
        "model": source.fingerprint(),
    }
    with FolderWork(out.parent / f".{out.name}.partial", job) as work:
        plan, knowledge, _ = _plan_and_knowledge(source, windows, known, config, work, progress)
        checkpoint.describe_to(work.folder, source.config, plan, config.window, knowledge, side_files(folder))
        for layer in source.config.moe_layers:
            for name in ("stats", "sensitivity"):
                work.drop(f"{name}-{layer:03d}")
        work.finish()
        checkpoint.put_in_place(work.folder, out)
    return plan


def check_shapes(model: ModelConfig, config: QuantizeConfig) -> None:
    if config.quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer {config.quantizer!r}: known are {', '.join(QUANTIZERS)}")
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective {config.objective!r}: known are {', '.join(OBJECTIVES)}")
    if len(config.emphasis) != 3 or not all(math.isfinite(e) and e > 0 for e in config.emphasis):
        raise ValueError(f"emphasis {config.emphasis}: expected three positive numbers, for 2, 3 and 4 bits")
    if not (math.isfinite(config.favour) and config.favour > 0):
        raise ValueError(f"favour {config.favour}: expected a positive number, 1 for none")
    if not 1 <= config.channel_block <= model.intermediate_size:
        raise ValueError(f"channel_block {config.channel_block} is not in 1..{model.intermediate_size}, the channels")
    group_size = config.group(model.hidden_size)
    if group_size % 8 or not 8 <= group_size <= model.hidden_size:
        raise ValueError(f"group_size {group_size} is no multiple of 8 up to the hidden size {model.hidden_size}")
    if config.window > model.max_position_embeddings:
        raise ValueError(f"window {config.window} is past the model's {model.max_position_embeddings} positions")


def settled(config: QuantizeConfig, model: ModelConfig, others: int, names: list[str]) -> QuantizeConfig:
    """The settings, checked against a model and the known datasets' names, with a budget that needs no more facts.

    others: bytes of what is not quantized.
    """
    check_shapes(model, config)
    _check_weights(config, names)
    group_size = config.group(model.hidden_size)
    costs = block_costs(config.channel_block, model.hidden_size, group_size)
    blocks = filled(model.intermediate_size, config.channel_block) // config.channel_block
    least = int(costs[0]) * blocks * model.num_experts * model.num_moe_layers
    budget = config.bytes_for(model, others)
    if budget < least:
        asked = next(f"{n} {v:g}" for n in BUDGETS if (v := getattr(config, n)) is not None)
        raise ValueError(
            f"the budget, {asked}, is too small: the least is {8 * least / model.num_expert_weights:g} bits a weight "
            f"(2 bits, a scale for each group of {group_size}, whole groups and blocks), {least:,} bytes, "
            f"or {(least + others) / GIB:.4g} GiB with the {others:,} bytes that are not quantized"
        )
    if config.fits_gib is None:
        return config
    return dataclasses.replace(config, fits_gib=None, budget_bytes=int(budget))


def _check_weights(config: QuantizeConfig, names: list[str]) -> None:
    for name, value in (config.weights or {}).items():
        if name not in names:
            raise ValueError(f"weights: {name} is none of the known datasets, {', '.join(names)}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"weights: {name} = {value}, expected a number of 0 or more")
    if config.weights and not any(config.weights.get(name, 1.0) for name in names):
        raise ValueError("weights: no known dataset counts for anything")
    if config.objective == "worst" and any(v != 1 for v in (config.weights or {}).values()):
        raise ValueError("weights: the objective worst takes none; each dataset is measured by its own best plan")
