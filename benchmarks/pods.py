"""Whole steps of published models, compiled for pods that are not here: do they fit, and what travels?

    python benchmarks/pods.py [--json PATH] [--only NAME ..] [--limit SECONDS] [--layers N]
    python benchmarks/pods.py --rows PATH      # the tables of docs/scale.md from rows that were written before

Each step is one of ``runtime.generate``, of all layers: the product's own decoder in loops, its TPU kernel over the
devices, its monitors and its sampling, compiled by shapes alone. Everything but the experts is bfloat16. Experts: a
third each at 2, 3 and 4 bits in the baseline, so 3 bits, the default share of spare slots, two variants, monitors of
three known datasets. Prefill is of ``tokens`` of each request into an empty cache of ``capacity``.

A step is compiled in a process of its own: one that fails, or takes longer than the limit, is a row that says so.
Bytes are those of one chip, from the compiler's memory analysis: ``arguments`` are given, of which ``aliased`` are
given back in place (the cache), ``temporaries`` are needed beside them. ``fits``: arguments, temporaries and outputs
less aliases within the chip's memory. ``predicted`` is what ``plan-devices`` counts, over the arguments. Collectives
are read from the program that the compiler dumps: ``a layer`` are those of one turn of the loop over the layers with
experts, with the bytes of their results on one chip; ``planes`` whether any carries integers of planes or pages.
Seconds are of tracing and compiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
GROUP = 256  # weights that share a scale, as in the demo
KNOWN = 3
LONG = 10_000  # characters of a constant: empty arrays are written down as brackets for each of their rows
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


class Step(NamedTuple):
    """tokens: of each request, 0 where one more is decoded."""

    model: str
    topology: str
    mesh: tuple[int, int]
    requests: int
    capacity: int
    tokens: int = 0


STEPS = {
    "qwen3-235b v6e decode": Step("qwen3-235b-a22b", "v6e:4x4", (4, 4), 64, 4096),
    "qwen3-235b v5e decode": Step("qwen3-235b-a22b", "v5e:4x4", (4, 4), 32, 2048),
    "deepseek-v3 v6e decode": Step("deepseek-v3", "v6e:8x8", (8, 8), 128, 4096),
    "kimi-k2 v6e decode": Step("kimi-k2", "v6e:16x16", (16, 16), 256, 4096),
    "qwen3-235b v6e prefill": Step("qwen3-235b-a22b", "v6e:4x4", (4, 4), 16, 4096, 256),
    "qwen3-235b v5e prefill": Step("qwen3-235b-a22b", "v5e:4x4", (4, 4), 16, 2048, 256),
    "deepseek-v3 v6e prefill": Step("deepseek-v3", "v6e:8x8", (8, 8), 32, 4096, 256),
    "kimi-k2 v6e prefill": Step("kimi-k2", "v6e:16x16", (16, 16), 64, 4096, 256),
}
TRIAL = {  # of a small model, for the tests
    "small v6e decode": Step("small", "v6e:2x2", (2, 2), 4, 128),
    "small v6e prefill": Step("small", "v6e:2x2", (2, 2), 4, 256, 128),
}


def config_of(name: str, layers: int | None) -> Any:
    from layers import LARGE

    from dynamo_jax.models.families.table import config_from

    if name == "small":
        return config_from({
            "model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 256, "moe_intermediate_size": 128,
            "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        })  # fmt: skip
    config = LARGE[name]
    return dataclasses.replace(config, layers=config.layers[:layers]) if layers else config


def plan_of(config: Any) -> Any:
    """A third of the experts at 2, 3 and 4 bits each, which is that of gate and up for some and of down for others."""
    import numpy as np

    from dynamo_jax.precision.plan import expert_plan

    sizes = config.expert_sizes
    number = np.arange(sizes.layers)[:, None] + np.arange(sizes.experts)
    widths = np.stack([2 + number % 3, 2 + (number + 1) % 3], axis=-1)
    return expert_plan(widths, sizes.channels, 128, GROUP, sizes.hidden_size)


def compiled(step: Step, layers: int | None) -> dict[str, Any]:
    """A row, of what this process compiles; its environment is ``environment()``."""
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from dynamo_jax.models.huggingface import parameter_shapes as shapes_of
    from dynamo_jax.runtime import devices, generate, shapes
    from dynamo_jax.runtime.mesh import DATA, MODEL, Placement

    config = config_of(step.model, layers)
    plan = plan_of(config)
    there = topologies.get_topology_desc(step.topology, platform="tpu").devices
    mesh = Mesh(np.array(there).reshape(step.mesh), (DATA, MODEL))
    placement = Placement.of(mesh, config.num_experts, plan.blocks)
    assert placement is not None
    rows = placement.rows(step.requests)
    whole = shapes_of(config)
    parameters = shapes.parameter_shapes(config, whole, jnp.bfloat16, placement)
    state = shapes.state_shapes(plan, step.requests, known=KNOWN, placement=placement)
    cache = shapes.cache_shapes(config, step.requests, step.capacity, jnp.bfloat16, placement)
    sampling = shapes.sampling_shapes(placement)
    size = (step.requests, step.tokens) if step.tokens else (step.requests,)
    given = [shapes.of(size, dtype, placement, rows) for dtype in (jnp.int32, jnp.bool_)]
    run = generate.prefill if step.tokens else generate.decode
    begin = time.perf_counter()
    lowered = run.lower(config, jnp.bfloat16, parameters, state, *given, cache, sampling)
    traced = time.perf_counter()
    analysis = lowered.compile().memory_analysis()
    share = devices.on_mesh(config, whole, plan, step.mesh, step.requests, step.capacity).share
    row = {
        "layers": config.num_hidden_layers,
        "experts_split": placement.expert_shards,
        "blocks_split": placement.block_shards,
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "memory": int(devices.MEMORY[step.topology.split(":")[0]] * GIB),
        "predicted": share.total,
        "predicted_cache": share.cache,
        "routed": step.requests * max(step.tokens, 1) * (2 * config.num_experts_per_tok + 1),
        "trace_seconds": traced - begin,
        "compile_seconds": time.perf_counter() - traced,
    }
    beyond = row["outputs"] - row["aliased"]
    return row | {"fits": row["arguments"] + row["temporaries"] + beyond < row["memory"]}


SHAPE = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
PLANES = re.compile(r"\b[su][248]\[|\b[su]32\[[\d,]*\b(?:8|16),128\]")  # ratios and packed bits, or words of tiles


class Collective(NamedTuple):
    """kind: of the operation; type: of its result, as HLO writes it; chain: of those that are steps of one, spread over
    other work."""

    kind: str
    type: str
    chain: str = ""

    @property
    def bytes(self) -> int:
        return sum(count * bits // 8 for _, count, bits in self.arrays())

    def arrays(self) -> list[tuple[str, int, int]]:
        """Kind, numbers and bits of each array of the result; one that starts something has its operand there too."""
        found = SHAPE.findall(self.type)
        if self.type.startswith("(") and "u32[]" in self.type:  # its operand, its result, and two numbers
            found = found[1:2]
        sizes = [math.prod(int(n) for n in size.split(",") if n) for _, size in found]
        bits = [{"pred": 8, "bf16": 16}.get(kind) or int(re.findall(r"\d+", kind)[0]) for kind, _ in found]
        return [(kind, size, each) for (kind, _), size, each in zip(found, sizes, bits)]

    def carries_planes(self, routed: int | None) -> bool:
        """Whether it may; routed: integers that say where rows go, of which a layer sends no more."""
        many = routed is not None and any(kind[0] in "su" and size > routed for kind, size, _ in self.arrays())
        return many or bool(PLANES.search(self.type))


def collectives(text: str) -> tuple[list[Collective], list[Collective]]:
    """Of a whole program, and of the turn of its loop that has most of them with what this calls."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if len(line) > LONG and " constant(" in line:
            continue
        if line.startswith(("%", "ENTRY ")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    found = re.compile(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(")
    own = {n: [of_line(m, line) for line in lines if (m := found.search(line))] for n, lines in bodies.items()}
    for name, result in re.findall(r"^%(all-reduce-scatter[\w.-]*) .* -> (.*) \{$", text, re.MULTILINE):
        own[name] = [Collective("reduce-scatter", result)]  # a fusion of its own, written with an all-reduce
    names = re.compile(r"%([\w.<>-]+)")
    calls = {n: [c for line in lines for c in names.findall(line) if c in bodies] for n, lines in bodies.items()}

    def inside(name: str, seen: frozenset[str] = frozenset()) -> list[Collective]:
        others = [n for n in dict.fromkeys(calls[name]) if n != name and n not in seen]
        return own[name] + [c for n in others for c in inside(n, seen | {name})]

    loops = {body for lines in bodies.values() for line in lines for body in re.findall(r", body=%([\w.<>-]+)", line)}
    return once([c for each in own.values() for c in each]), max((once(inside(n)) for n in loops), key=len, default=[])


def of_line(match: re.Match[str], line: str) -> Collective:
    chain = re.search(r'chain_id="(\d+)"', line)
    return Collective(match[2], match[1], chain[1] if chain else "")


def once(found: list[Collective]) -> list[Collective]:
    """Of each chain the first alone."""
    chains: set[tuple[str, str]] = set()
    out = []
    for one in found:
        key = (one.kind, one.chain)
        if not one.chain or key not in chains:
            out.append(one)
        chains.add(key)
    return out


def travelled(text: str, routed: int) -> dict[str, Any]:
    """What a program sends from chip to chip."""
    every, layer = collectives(text)
    kinds = {kind: sum(c.kind == kind for c in layer) for kind in dict.fromkeys(c.kind for c in layer)}
    planes = any(c.carries_planes(routed) for c in layer) or any(c.carries_planes(None) for c in every)
    return {
        "collectives_a_layer": kinds,
        "bytes_a_layer": sum(c.bytes for c in layer),
        "other_collectives": len(every) - len(layer),
        "planes": planes,
        "kernels": sorted(set(re.findall(r"experts_(?:bf16|int8|fp8)\b", text))),
    }


def environment(dump: str) -> dict[str, str]:
    """Of a process that compiles for TPUs without one, and has the program that it compiled written down."""
    given = {
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=false",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here touches a chip
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "XLA_FLAGS": "",
    }
    return os.environ | given


def row_of(name: str, limit: float, layers: int | None) -> dict[str, Any]:
    """What a process of its own found."""
    step = (STEPS | TRIAL)[name]
    row = {"name": name, **step._asdict()}
    with tempfile.TemporaryDirectory(prefix="pods-") as dump:
        command = [sys.executable, __file__, "--here", "--only", name, *(["--layers", str(layers)] if layers else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment(dump), timeout=limit)
        except subprocess.TimeoutExpired:
            return row | {"failed": f"not compiled in {limit:g} s"}
        if done.returncode:
            words = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            return row | {"failed": words[-1][:300]}
        row |= json.loads(done.stdout.splitlines()[-1])
        programs = [path.read_text() for path in Path(dump).glob("*-TLP-hlo.txt")]
    return row | (travelled(max(programs, key=len), row["routed"]) if programs else {})


SIZES = ("step", "split", "requests x tokens", "arguments", "cache", "temporaries", "of", "fits", "predicted")
KINDS = ("all-gather", "all-reduce", "reduce-scatter")
SENT = ("step", *KINDS, "others", "MB", "planes", "seconds")


def tables(rows: list[dict[str, Any]]) -> str:
    """What lies on a chip, in GiB, and what is sent."""
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *map(cells, rows)))
        for head, cells in ((SIZES, size_cells), (SENT, sent_cells))
    )


def step_words(row: dict[str, Any]) -> str:
    model, chip, kind = row["name"].split()
    return f"{model} {kind}, {chip} {row['topology'].split(':')[1]}"


def size_cells(row: dict[str, Any]) -> list[str]:
    """split: of experts, and of the channel blocks of each."""
    tokens = f"{row['tokens']} of {row['capacity']}" if row["tokens"] else str(row["capacity"])
    begin = [step_words(row), f"{row['requests']} x {tokens}"]
    if "failed" in row:
        return [begin[0], "", begin[1], row["failed"], *[""] * 5]
    split = f"{row['experts_split']}" + (f" x {row['blocks_split']}" if row["blocks_split"] > 1 else "")
    gib = [f"{row[name] / GIB:.2f}" for name in ("arguments", "predicted_cache", "temporaries")]
    memory, fits = f"{row['memory'] / GIB:.0f}", "yes" if row["fits"] else "no"
    return [begin[0], split, begin[1], *gib, memory, fits, f"{row['predicted'] / row['arguments']:.4f}"]


def sent_cells(row: dict[str, Any]) -> list[str]:
    if "planes" not in row:
        return [step_words(row), *[""] * 7]
    found = row["collectives_a_layer"]
    counts = [found.get(kind, 0) for kind in KINDS]
    seconds = row["trace_seconds"] + row["compile_seconds"]
    planes = "travel" if row["planes"] else "stay"
    counts.append(sum(found.values()) - sum(counts))
    return [step_words(row), *map(str, counts), f"{row['bytes_a_layer'] / 1e6:.2f}", planes, f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*STEPS, *TRIAL], metavar="NAME", help=", ".join(STEPS))
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of a step")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try it out")
    parser.add_argument("--json", type=Path, help="rows of other steps that are there stay")
    parser.add_argument("--rows", type=Path, help="only print the tables")
    parser.add_argument("--here", action="store_true", help="compile in this process, whose environment is ready")
    chosen = parser.parse_args()
    if chosen.here:
        print(json.dumps(compiled((STEPS | TRIAL)[chosen.only[0]], chosen.layers)))
        return
    if chosen.rows:
        print(tables(json.loads(chosen.rows.read_text())["rows"]))
        return
    rows = {}
    if chosen.json and chosen.json.exists():
        rows = {row["name"]: row for row in json.loads(chosen.json.read_text())["rows"]}
    for name in chosen.only or STEPS:
        rows[name] = row_of(name, chosen.limit, chosen.layers)
        ordered = [rows[name] for name in STEPS | TRIAL if name in rows]
        print(json.dumps(rows[name]), flush=True)
        if chosen.json:
            found = {"rows": ordered, **{name: version(name) for name in ("jax", "libtpu")}}
            chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(ordered))


if __name__ == "__main__":
    main()
