"""What benchmarks of deployments share: texts from a corpus, quantizations of one model, finished parts that are kept.

A deployment is a model calibrated on some kinds of text. FOLDER of a corpus holds KIND.heldout.txt: docs/training.md
says how it is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peers
from drawn import and_drawn
from quality import groups_of

from dynamo_jax.calibration import plans
from dynamo_jax.calibration.analyses import Analysis
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.knowledge import knowledge_of
from dynamo_jax.calibration.pipeline import analyze_layers
from dynamo_jax.files import write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.config import ModelConfig
from dynamo_jax.models.decoder import Decoder, parameters, without_experts
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.grids import GridSpec
from dynamo_jax.quant.planes import Planes, dequantize
from dynamo_jax.runtime.quantized import QuantizedModel
from dynamo_jax.storage.bundles import Bundle, stacked_planes
from dynamo_jax.storage.work import FolderWork, MemoryWork
from dynamo_jax.texts.reading import read_text
from dynamo_jax.texts.windows import token_windows

DECIDED = ("stats-", "layer-", "emphasis")  # bundles that a quantization with other settings makes anew


class Sweeps(MemoryWork):
    """Work that keeps what the sweeps over a model found, for quantizations that differ in budget or weight.

    folder: where one quantization is kept too, so that a stopped run goes on with it; ``job`` says what it is of.
    """

    def __init__(self, folder: Path | None = None, job: Any = None):
        super().__init__()
        self._folder = None
        if folder:
            kept(folder.with_name(f"{folder.name}.json"), job, lambda: None)
            folder.mkdir(exist_ok=True)
            self._folder = FolderWork(folder)
            for name in self._folder.names():
                super().put(name, self._folder.get(name))

    def put(self, name: str, bundle: Bundle) -> None:
        super().put(name, bundle)
        if self._folder:
            self._folder.put(name, bundle)

    def drop(self, name: str) -> None:
        """Nothing: the next quantization needs it."""

    def again(self, folder: Path | None = None, job: Any = None) -> Sweeps:
        """The sweeps alone, for another quantization."""
        other = Sweeps(folder, job)
        other.keep(self)
        return other

    def keep(self, work: Sweeps) -> None:
        """The sweeps of ``work`` too."""
        self._bundles |= {name: b for name, b in work._bundles.items() if not name.startswith(DECIDED)}


def heldout_windows(corpus: Path, kind: str, tokenizer: Any, window: int) -> np.ndarray:
    """Windows (S, T1) of a kind of text."""
    return token_windows(read_text(corpus / f"{kind}.heldout.txt"), tokenizer, window, kind)


def quantized_model(
    decoder: Decoder, tokenizer: Any, known: dict[str, np.ndarray], settings: QuantizeConfig, work: MemoryWork
) -> tuple[QuantizedModel, dict[str, Analysis]]:
    """What ``quantize`` makes of a model, from windows (S, T1) of known kinds and of text that it draws, and what it
    finds on the way."""
    analyses = analyze_layers(DecoderSource(decoder), and_drawn(decoder, known, settings), settings, work)
    found = QuantizedModel(
        config=decoder.config,
        parameters=without_experts(decoder.config, parameters(decoder)),
        tokenizer=tokenizer,
        store=stacked_planes(work.get, decoder.config),
        plan=plans.plan(analyses, decoder, settings),
        window=settings.window,
        knowledge=knowledge_of(analyses, settings, {}),
        files={},
        spare=settings.spare,
    )
    return found, analyses


def at_widths(config: ModelConfig, store: Planes) -> list[np.ndarray]:
    """Weights (L, E, P, F, D) of all experts at each width."""
    sizes = np.s_[..., : config.intermediate_size, : config.hidden_size]
    return [np.asarray(dequantize(store, width).astype(jnp.bfloat16))[sizes] for width in WIDTHS]


def weights_of(options: list[np.ndarray], plan: Plan) -> np.ndarray:
    """Of ``at_widths`` those that the plan chooses."""
    at = np.searchsorted(WIDTHS, plan.channel_widths()[..., : plan.channels, None])
    out = options[0]
    for index, option in enumerate(options[1:], 1):
        out = np.where(at == index, option, out)
    return out


def uniform_gptq(
    model: Decoder, params: dict[str, Any], known: np.ndarray
) -> Callable[[float], tuple[np.ndarray, float]]:
    """A function of bits: GPTQ weights of one width, of the grid nearest to these, and its bits a weight.

    known: windows of calibration. They are run once, and not before the function is called.
    """
    config, weights = model.config, peers.expert_weights(model)
    grids = [GridSpec(bits, group, False, False) for bits in WIDTHS[:3] for group in groups_of(config)]
    found: list[peers.Sums] = []

    def uniform(bits: float) -> tuple[np.ndarray, float]:
        if not found:
            found.append(peers.sums_of(config, weights, peers.observed(config, params, known)))
        grid = min(grids, key=lambda g: abs(peers.bits_of(g, weights) - bits))
        return peers.gptq_weights(weights, found[0], grid), peers.bits_of(grid, weights)

    return uniform


def kept(path: Path | None, job: dict[str, Any], run: Callable[[], Any]) -> Any:
    """What ``run`` returns, JSON-ready, from the file of an earlier run of the same job if there is one."""
    if path and path.exists():
        before = json.loads(path.read_text())
        if before["job"] != job:
            raise SystemExit(f"{path}: of another job: {before['job']}, expected {job}")
        return before["found"]
    found = run()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"job": job, "found": found})
    return found
