"""What ``dynamo-jax analyze`` reports: routing and significance of several datasets side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers

from dynamo_jax.data import token_windows
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.decoder import Decoder
from dynamo_jax.pipeline import Progress, QuantizeConfig, analyze, candidate_weights, check_shapes, layer_weights
from dynamo_jax.runtime.monitor import routing_divergence
from dynamo_jax.runtime.store import quantize_experts


def analyze_texts(
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    texts: dict[str, str],
    config: QuantizeConfig,
    progress: Progress,
) -> dict[str, Any]:
    """JSON-ready: for each dataset routing counts (L, E), busiest share and predicted loss (L, E, W) in nats
    a token at each width; between datasets the routing divergence in bits a layer."""
    check_shapes(model.config, config)
    windows = {n: token_windows(t, tokenizer, config.window, n, config.calibration_windows) for n, t in texts.items()}
    layers = range(model.config.num_moe_layers)
    store = quantize_experts([layer_weights(model, i) for i in layers], config.group_size)
    candidates = candidate_weights(store)
    runs = {n: analyze(model, candidates, w, config.batch_size, n, progress) for n, w in windows.items()}
    counts = {n: np.asarray(r.stats.counts) for n, r in runs.items()}
    names = list(runs)
    return {
        "widths": list(WIDTHS),
        "datasets": {
            n: {
                "tokens": int(r.stats.tokens[0]),
                "counts": counts[n].tolist(),
                "busiest_share": busiest_share(counts[n]).tolist(),
                "expert_significance": r.expert_significance().tolist(),
            }
            for n, r in runs.items()
        },
        "routing_divergence": {
            f"{a} | {b}": [float(routing_divergence(counts[a][i : i + 1], counts[b][i : i + 1])) for i in layers]
            for i_a, a in enumerate(names)
            for b in names[i_a + 1 :]
        },
    }


def busiest_share(counts: np.ndarray) -> np.ndarray:
    """For each layer, the busiest expert's tokens over the mean expert's."""
    return counts.max(axis=-1) / counts.mean(axis=-1)


def summary(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = []
    for name, data in result["datasets"].items():
        significance = np.asarray(data["expert_significance"])
        lines.append(f"{name}: {data['tokens']} tokens")
        for layer, (busiest, loss) in enumerate(zip(data["busiest_share"], significance)):
            widths = ", ".join(f"{w} bits {total:.4f}" for w, total in zip(result["widths"], loss.sum(axis=0)))
            top = ", ".join(map(str, np.argsort(-loss[:, 0])[:5]))
            lines.append(
                f"  layer {layer}: busiest x{busiest:.1f}; predicted loss, nats a token: {widths}; top experts {top}"
            )
    for pair, layers in result["routing_divergence"].items():
        lines.append(f"{pair}: routing divergence, bits a layer: " + " ".join(f"{d:.3f}" for d in layers))
    return lines
