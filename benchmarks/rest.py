"""What a rest at 8 or 4 bits costs, and what its bytes win where experts get them: quality of the whole model.

    python benchmarks/rest.py --corpus FOLDER [--deployment prose] [--bits 3] [--limit 8] [--json PATH]

FOLDER holds KIND.heldout.txt for each kind of text, and deployments are those of unseen.py: calibrated on some kinds of
text, evaluated on later windows of these and on far kinds. Rows:

    float experts   embeddings with the head at 4 bits, layers at 4 bits, or the rest as --rest 8 and --rest 4 make it
    rest 16, 8, 4   experts at --bits, calibrated behind that rest
    before          the same, experts calibrated behind the float rest
    equal           experts at the bits that make the whole model as large as in the row that is named
    embeddings 4    the same with embeddings and head at 4 bits, in groups of 64, where --rest 4 gives them 8

"bytes" are those of the whole model on the device: the experts' planes, slots and tables, and all else. Excess loss is
nats a token above bfloat16, "kl" the divergence from its predictions, means of the kinds; "difference" is the excess
above the row that is named, on the same windows, with a standard error by window.

    python benchmarks/rest.py --compile [--json PATH]

compiles the decoding step of a model of 16 layers with Qwen3-30B-A3B's attention, embeddings and head, without experts,
for a TPU v5e that need not be there (libtpu must), and says what it takes: arguments, temporaries, bytes that it reads
and writes. A form of the rest whose floats are written to memory shows in the temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from deployments import Sweeps, at_widths, weights_of
from float_changes import changes
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from unseen import DEPLOYMENTS, Bench, bench_of

from dynamo_jax.calibration import plans
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import analyze_layers
from dynamo_jax.files import write_json
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import parameters, without_experts
from dynamo_jax.models.families.table import config_from
from dynamo_jax.models.huggingface import load_decoder, parameter_shapes
from dynamo_jax.models.rest import FLOAT, REST_BITS, expanded, quantized
from dynamo_jax.models.sources import DecoderSource
from dynamo_jax.models.stacked import stacked_decoder
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import num_weights
from dynamo_jax.runtime import shapes
from dynamo_jax.runtime.memory import device_bytes
from dynamo_jax.storage.bundles import stacked_planes

EMBEDDINGS = ("embed", "head")
TOPOLOGY = {  # nothing here touches a chip
    **{"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"},
    **{"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
}
SIZES = {  # of Qwen3-30B-A3B, but for the number of layers and of experts
    **{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144},
    **{"moe_intermediate_size": 768, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"head_dim": 128, "num_experts": 8, "num_experts_per_tok": 8, "max_position_embeddings": 40960},
}


@dataclasses.dataclass
class Run:
    """A deployment and its rows. sweeps: of each rest, for quantizations at other budgets; found: by row, loss,
    accuracy and divergence of each window (3, S)."""

    bench: Bench
    name: str
    base: QuantizeConfig
    sweeps: dict[int, Sweeps] = dataclasses.field(default_factory=dict)
    found: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def others(self) -> dict[str, Any]:
        """Parameters but the experts'."""
        own = without_experts(self.bench.model.config, parameters(self.bench.model))
        return {name: np.asarray(a) for name, a in own.items()}

    def rest_of(self, bits: int, embeddings: int | None = None) -> tuple[dict[str, Any], int]:
        """Parameters but the experts' with a rest of so many bits, as float32, and their bytes. embeddings: bits of
        these instead, 4."""
        own, turned = self.others(), {}
        if embeddings:
            turned = {f"{n}.turned": own.pop(n).T for n in EMBEDDINGS if n in own}
        stored = quantized(own, bits) | quantized(turned, embeddings or bits)
        size = sum(a.nbytes for a in stored.values())
        floats = {n: jnp.asarray(a, jnp.float32) for n, a in expanded(stored, jnp.float32).items()}
        return {n.removesuffix(".turned"): a.T if n in turned else a for n, a in floats.items()}, size

    def quantize(self, rest: int, **budget: Any) -> tuple[np.ndarray, float, int]:
        """Experts' weights behind a rest, their bits a weight and their bytes on the device."""
        config = dataclasses.replace(self.base, rest=rest, **budget)
        model = self.bench.model.config
        before = self.sweeps.setdefault(rest, Sweeps())
        work = before.again()
        analyses = analyze_layers(DecoderSource(self.bench.model), self.bench.calibration, config, work)
        before.keep(work)
        plan = plans.plan(analyses, model, config)
        held = device_bytes(plan, config.spare).total
        weights = weights_of(at_widths(model, stacked_planes(work.get, model)), plan)
        return weights, 8 * held / num_weights(plan), held

    def add(
        self, method: str, rest: dict[str, Any], weights: np.ndarray | None, beside: str | None, **more: Any
    ) -> None:
        """Rows of known and of far kinds. weights: of the experts, None for float ones; beside: the row that the
        difference is to."""
        bench = self.bench
        params = bench.params if weights is None else peers.with_experts(bench.model, bench.params, weights)
        found = changes(bench.model.config, params | rest, bench.windows, bench.reference)
        self.found[method] = found
        excess = found[0] - bench.exact[0]
        above = excess if beside is None else found[0] - self.found[beside][0]
        near = list(bench.calibration)
        for far, kinds in ((False, near), (True, [k for k in dict.fromkeys(bench.kinds) if k not in near])):
            at = [bench.kinds == kind for kind in kinds]
            error = math.sqrt(sum(above[w].var(ddof=1) / w.sum() for w in at)) / len(at)
            row = {"deployment": self.name, "method": method, "kinds": "far" if far else "known", "beside": beside}
            row |= {"excess_nll": float(np.mean([excess[w].mean() for w in at]))}
            row |= {"kl": float(np.mean([found[2][w].mean() for w in at]))}
            row |= {"difference": float(np.mean([above[w].mean() for w in at])), "standard_error": error} | more
            self.rows.append(row)
            bits, size = (f"{more[n]:{form}}" if n in more else "" for n, form in (("bits", ".2f"), ("bytes", ",")))
            line = f"{method:38s} {bits:>5s} {size:>11s}  {row['kinds']:5s}  {row['excess_nll']:+.4f}  {row['kl']:.4f}"
            print(f"{line}  {row['difference']:+.4f} ± {error:.4f}", flush=True)


def measured(run: Run, bits: float) -> None:
    """All rows of a deployment."""
    run.add("float experts, embeddings 4", run.rest_of(FLOAT, 4)[0], None, None)
    mixed = run.rest_of(4)[0] | {n: run.bench.params[n] for n in EMBEDDINGS if n in run.bench.params}
    run.add("float experts, layers 4", mixed, None, None)
    for rest in (8, 4):
        run.add(f"float experts, rest {rest}", run.rest_of(rest)[0], None, None)
    sizes: dict[str, int] = {}
    first = None
    for rest in REST_BITS:
        weights, held, experts = run.quantize(rest, bits=bits)
        first = weights if rest == FLOAT else first
        others, size = run.rest_of(rest)
        name, beside = f"rest {rest}", None if rest == FLOAT else f"rest {FLOAT}"
        sizes[name] = experts + size
        run.add(name, others, weights, beside, bits=held, bytes=sizes[name])
        if rest != FLOAT:
            run.add(f"{name}, before", others, first, name, bits=held, bytes=sizes[name])
    for rest, embeddings, larger in ((8, None, 16), (4, None, 16), (4, None, 8), (4, 4, 8), (4, 4, 4)):
        others, size = run.rest_of(rest, embeddings)
        weights, held, experts = run.quantize(rest, bits=None, budget_bytes=sizes[f"rest {larger}"] - size)
        name = f"rest {rest}{', embeddings 4' if embeddings else ''}, equal to rest {larger}"
        run.add(name, others, weights, f"rest {larger}", bits=held, bytes=experts + size)


def compiled(batch: int, rest: int) -> dict[str, Any]:
    """Bytes of a decoding step for a TPU, as its compiler counts them."""
    for name, value in TOPOLOGY.items():
        os.environ.setdefault(name, value)
    device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    config = config_from(SIZES)

    def there(tree: Any) -> Any:
        lies = SingleDeviceSharding(device)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=lies), tree)

    def no_experts(_: Any, x: Any, routing: Any, *__: Any) -> Any:
        return x, routing

    def step(arrays: Any, cache: Any, tokens: Any) -> Any:
        model = stacked_decoder(config, arrays)
        hidden, _, cache = model.cached_states(tokens, tokens >= 0, cache, experts=no_experts, dtype=jnp.bfloat16)
        return model.logits(hidden).argmax(axis=-1), cache

    arrays = there(shapes.parameter_shapes(config, parameter_shapes(config), jnp.bfloat16, rest=rest))
    cache = there(shapes.cache_shapes(config, batch, 256, jnp.bfloat16))
    tokens = there(jax.ShapeDtypeStruct((batch, 1), jnp.int32))
    found = jax.jit(step, donate_argnums=1).lower(arrays, cache, tokens).compile()
    memory = found.memory_analysis()
    row = {"batch": batch, "rest": rest, "arguments": memory.argument_size_in_bytes}
    cost = int(found.cost_analysis()["bytes accessed"])
    row |= {"temporaries": memory.temp_size_in_bytes, "accessed": cost}
    print(f"batch {batch:3d}  rest {rest:2d}  " + "  ".join(f"{n} {row[n]:>13,}" for n in list(row)[2:]), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", type=Path, help="folder with KIND.heldout.txt")
    what.add_argument("--compile", action="store_true", help="say what a decoding step takes on a TPU")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint folder; the bundled model by default")
    parser.add_argument("--deployment", action="append", choices=list(DEPLOYMENTS), help="prose by default")
    parser.add_argument("--bits", type=float, default=3.0, help="of the experts, a weight on the device")
    parser.add_argument("--limit", type=int, default=8, help="evaluated windows of each kind at most")
    parser.add_argument("--calibration-windows", type=int, default=32, help="of each known kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    if arguments.compile:
        found = [compiled(batch, rest) for batch in (1, 64) for rest in REST_BITS]
        if arguments.json:
            write_json(arguments.json, {"results": found, "jax": jax.__version__})
        return
    model, tokenizer = load_decoder(arguments.model), load_tokenizer(arguments.model)
    base = QuantizeConfig(calibration_windows=arguments.calibration_windows)
    rows: list[dict[str, Any]] = []
    print(f"{'':38s}  bits       bytes  kinds   excess      kl  difference")
    for name in arguments.deployment or ["prose"]:
        bench = bench_of(model, tokenizer, arguments.corpus, name, base, arguments.limit)
        run = Run(bench, name, base)
        measured(run, arguments.bits)
        rows += run.rows
    if arguments.json:
        settings = {"bits": arguments.bits, "limit": arguments.limit, "calibration_windows": base.calibration_windows}
        settings |= {"model": arguments.model.name, "jax": jax.__version__, "seconds": time.perf_counter() - begin}
        write_json(arguments.json, settings | {"results": rows})


if __name__ == "__main__":
    main()
