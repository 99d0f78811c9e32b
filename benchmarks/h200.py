"""Compile for an NVIDIA H200 that is not here: what a kernel's program needs, without a GPU and without a driver.

    python -m venv cuda && cuda/bin/pip install -e . "jax[cuda13]" absl-py nvidia-cuda-nvdisasm
    JAX_PLATFORMS=cpu cuda/bin/python benchmarks/h200.py [--json PATH]

compiles both kernels for the shapes of ``gpu.py`` and prints, for each, registers, bytes spilled, and instructions a
weight: those of the innermost loop that holds the tensor cores' over the weights that one thread unpacks in it. That
count repeats exactly; a processor starts at most four instructions a cycle, each for 32 threads. ``--model`` compiles a
decode step and a prefill of the whole synthetic OLMoE-1B-7B of ``gpu.py``, mixed widths, switched and watched.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
WARP, PROCESSORS, CLOCK = 32, 132, 1.755e9
NEEDS = 'jax[cuda13], in an environment of its own: pip install "jax[cuda13]" absl-py'


def compiled(function: Any, *args: Any, donated: tuple[int, ...] = ()) -> Any:
    """``function`` compiled for one H200; ``args``: shapes; ``donated``: which of them the outputs may take the memory
    of. RuntimeError where JAX has no CUDA plugin."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

    jax.devices()  # loads the plugins
    try:
        found = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology="1x1x1")
    except NotImplementedError as error:
        raise RuntimeError(f"JAX has no CUDA plugin here; it needs {NEEDS}") from error
    axes = ("x",), (AxisType.Auto,)
    mesh = Mesh(np.array(found.devices[:1]), axes[0], axis_types=axes[1])
    device = AbstractDevice("NVIDIA H200", PROCESSORS, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), *axes, abstract_device=device)):
        whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
        return (
            jax.jit(function, in_shardings=whole, donate_argnums=donated)
            .trace(*args)
            .lower(lowering_platforms=("cuda",))
            .compile()
        )


def experts_compiled(layer: str, tokens: int) -> Any:
    """The experts of one layer of ``gpu.py``'s shapes."""
    import gpu
    import jax

    from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu
    from dynamo_jax.models.experts import silu_gated

    shape = gpu.SHAPES[layer]
    table = gpu.table(gpu.widths_of(1, shape, (2, 3, 4)), shape)
    args = jax.eval_shape(lambda: (*gpu.quantized_inputs(shape, tokens), (table,)))
    return compiled(lambda *args: quantized_experts_gpu(*args, 0, silu_gated), *args)


def compile_cases() -> None:
    """All that ``gpu.py`` checks: the 8-bit plane, both kinds of pages, biases, two variants, 16 to 128 rows a tile."""
    import gpu
    import jax
    import jax.numpy as jnp

    from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu
    from dynamo_jax.models.experts import silu_gated

    for number, case in enumerate(gpu.CASES):
        own, rows, counts, biases = gpu.case_of(number, 0)
        args = (rows.astype(jnp.bfloat16), counts, own.arranged, own.tables, biases)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        compiled(lambda r, c, a, t, b: quantized_experts_gpu(r, c, a, t, 1, silu_gated, b), *shapes)
        print(case, flush=True)


def compile_model(requests: int = 8) -> None:
    """What ``gpu.py`` runs of a model with two variants and a monitor; prints the GiB that each program needs."""
    import gpu
    import jax
    from random_model import batch_of, model_arrays

    def inputs(length: int) -> Any:
        planes = gpu.planes(config.num_hidden_layers, layer, jax.random.key(0))
        state = gpu.state_of(layer, config.num_hidden_layers, requests, gpu.PLANS["mixed"], planes)
        return model_arrays(config), state, *batch_of(config, requests, length)

    config, layer = gpu.MODELS["olmoe-1b-7b"], gpu.SHAPES["olmoe-1b-7b"]
    for name, length in (("decode", 1), ("prefill", gpu.PREFILL // requests)):
        shapes = jax.eval_shape(functools.partial(inputs, length))
        program = compiled(functools.partial(gpu.step, config, True), *shapes, donated=(4,))  # the cache
        memory = program.memory_analysis()
        more = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        given, more = (size / 2**30 for size in (memory.argument_size_in_bytes, more))
        print(f"{name}, {requests} requests of {length} tokens: {given:.2f} GiB given, {more:.2f} more", flush=True)


def counts_of(folder: Path, kernel: int) -> dict[str, Any]:
    """Of a kernel's dump: registers, bytes spilled, instructions of its loop, and by name."""
    said = (folder / f"body_{kernel}.ptxas").read_text()
    found = {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", said).group(1)),
        "serialized": "serialized" in said,
    }
    loop = hot_loop((folder / f"body_{kernel}.sass_ctrl").read_text())
    return found | {"loop": sum(loop.values()), "loop_by_name": dict(loop.most_common(12))}


def hot_loop(text: str) -> collections.Counter:
    """Instructions by name of the smallest loop that holds all of the tensor cores' instructions."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(names)
        if own := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)(.*)", line):
            if own.group(1) == "BRA" and (target := re.search(r"\.L_x_\d+", own.group(2))):
                branches.append((len(names), target.group(0)))
            names.append(own.group(1))
    products = [i for i, name in enumerate(names) if name == "HGMMA"]
    around = [
        (labels[target], at)
        for at, target in branches
        if target in labels and products and labels[target] <= products[0] and at >= products[-1]
    ]
    if not around:
        raise ValueError("no loop holds all of the tensor cores' instructions")
    first, last = min(around, key=lambda pair: pair[1] - pair[0])
    return collections.Counter(names[first : last + 1])


def measured(layer: str, tokens: int) -> list[dict[str, Any]]:
    """Rows of both kernels of one shape; the compiler runs in a process of its own, which reads where to dump."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1"}
        tools = [str(path) for path in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu13/bin")]
        search = os.pathsep.join([*tools, os.environ.get("PATH", "")])
        command = [sys.executable, __file__, "--only", layer, str(tokens)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | dump | {"JAX_PLATFORMS": "cpu", "PATH": search}
        )
        if done.returncode:
            raise RuntimeError(f"{layer}, {tokens} tokens: {done.stderr[-2000:]}")
        rows = []
        for kernel, name in enumerate(("gate and up", "down")):
            counts = counts_of(Path(folder), kernel)
            tiles = json.loads(done.stdout.splitlines()[-1])["tiles"]
            row = {"shape": layer, "tokens": tokens, "kernel": name, **counts}
            rows.append(row | {"instructions_a_weight": counts["loop"] / (64 * tiles)})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs=2, help="compile one shape and print its tiles a step; used from within")
    parser.add_argument("--cases", action="store_true", help="compile all cases that gpu.py checks, and nothing else")
    parser.add_argument("--model", action="store_true", help="compile the whole model that gpu.py runs, nothing else")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.cases:
        return compile_cases()
    if arguments.model:
        return compile_model()
    if arguments.only:
        layer, tokens = arguments.only
        import gpu

        from dynamo_jax.kernels.gpu_jobs import tiles_of_step
        from dynamo_jax.kernels.quantized_gpu import rows_of_tile

        experts_compiled(layer, int(tokens))
        shape = gpu.SHAPES[layer]
        rows = rows_of_tile(int(tokens) * shape.chosen, shape.experts)
        print(json.dumps({"tiles": tiles_of_step(rows, shape.hidden)}))
        return
    import gpu

    print(f"{'shape':17s} tokens {'kernel':12s} registers  spilled  serialized  instructions a weight")
    rows = []
    for layer in gpu.SHAPES:
        for tokens in (1, 64, 2048):
            for row in measured(layer, tokens):
                rows.append(row)
                print(
                    f"{layer:17s} {tokens:6d} {row['kernel']:12s} {row['registers']:9d} "
                    f"{row['spilled_bytes']:8d}  {row['serialized']!s:>10s} {row['instructions_a_weight']:10.2f}",
                    flush=True,
                )
            if arguments.json:
                arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
