"""Several devices: one quantized model over a mesh, stepped, adapted and switched as on one device.

    python examples/pod.py --model quantized --mesh 2x4 --emulate 8     # eight devices of this CPU
    python examples/pod.py --model quantized --mesh 4x4                 # the devices that there are

docs/scale.md says what lies where. On several hosts run it on each, after `jax.distributed.initialize()`.
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder that quantize wrote")
    parser.add_argument("--mesh", default="2x4", metavar="DATAxMODEL")
    parser.add_argument("--emulate", type=int, help="so many devices of the CPU")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=16)
    given = parser.parse_args()

    import jax

    if given.emulate:
        jax.config.update("jax_num_cpu_devices", given.emulate)
    import dynamo_jax as dj

    shape = tuple(int(size) for size in given.mesh.split("x"))
    mesh = jax.make_mesh(shape, ("data", "model"))
    model = dj.load_text_model(given.model, adapt=True, mesh=mesh)
    placement = model.model.state.placement
    print(f"{mesh.size} devices: experts in {placement.expert_shards} parts, their blocks in {placement.block_shards}")
    prompts = [given.prompt] * shape[0]  # a row of the mesh serves its own requests
    for text in dj.generate(model, prompts, dj.GenerateConfig(max_tokens=given.max_tokens)):
        print(text)


if __name__ == "__main__":
    main()
