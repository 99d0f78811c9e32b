"""What ``dynamo-jax analyze`` reports: routing and significance of several datasets side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers

from dynamo_jax.calibrate import LayerSource, Progress
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.pipeline import QuantizeConfig, analyze, check_shapes, known_windows
from dynamo_jax.runtime.monitor import routing_divergence
from dynamo_jax.work import MemoryWork


def analyze_texts(
    source: LayerSource,
    tokenizer: tokenizers.Tokenizer,
    texts: dict[str, str],
    config: QuantizeConfig,
    progress: Progress,
) -> dict[str, Any]:
    """JSON-ready: for each dataset routing counts (L, E), busiest share and predicted loss (L, E, W) in nats
    a token at each width; between datasets the routing divergence in bits a layer."""
    check_shapes(source.config, config)
    windows = known_windows(texts, tokenizer, config)
    runs = analyze(source, windows, config, MemoryWork(unwanted=("layer-", "top")), progress)
    layers = range(source.config.num_moe_layers)
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
