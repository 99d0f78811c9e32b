"""One of two processes that serve a model together, or the only one: ``test_mesh.py`` starts them.

    python two_processes.py OUT TOKENIZER RANK PORT [blocks]    # RANK -1: alone

OUT gets what was generated, the events, the plans and tables, and the errors that faults on process 1 led to. blocks: a
model whose experts' channel blocks are split, over the processes too, and one prompt.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax

out, tokenizer, rank, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
alone, blocks = rank < 0, "blocks" in sys.argv[5:]
if not alone:
    jax.distributed.initialize(f"localhost:{port}", 2, rank, heartbeat_timeout_seconds=10)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import eight_devices as shared  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from dynamo_jax.generation import quantized_language_model  # noqa: E402
from dynamo_jax.runtime import serving  # noqa: E402
from dynamo_jax.runtime.generate import GenerateConfig, stream  # noqa: E402
from dynamo_jax.runtime.mesh import Placement  # noqa: E402
from dynamo_jax.storage import checkpoint  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)


def text_that_is_novel(model):
    known = model.knowledge.signatures
    near = known._replace(limit=np.ones_like(known.limit), place=np.asarray(known.place) - 100)
    return dataclasses.replace(model, knowledge=dataclasses.replace(model.knowledge, signatures=near))


def generated(model, mesh):
    language_model, follower = quantized_language_model(model, adaptive=True, mesh=mesh)
    texts = [[int(t) for t in row] for row in shared.tokens_of(8, 1 if blocks else 2, 40, 20, 30)]
    tokens = list(stream(language_model, texts, GenerateConfig(max_tokens=260, stop=()), between=follower))
    events = [[e.token, e.request, e.what, e.name, e.moved] for e in follower.events]
    return tokens, events, follower.host.plans[1].widths.tolist()


def error_of(run):
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def faults(model, mesh, folder):
    """The words of the errors where process 1 has something else than process 0."""
    path = folder / "layer-001.safetensors"
    content = path.read_bytes()
    if rank == 1:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = {"damaged file": error_of(lambda: checkpoint.load(folder, mesh))}
    path.write_bytes(content)
    if rank == 1:
        checkpoint.save(folder, dataclasses.replace(made, spare=0.25), overwrite=True)
    found["other folder"] = error_of(lambda: checkpoint.load(folder, mesh))
    texts = [[5, 6, 7 + rank]]
    language_model, _ = quantized_language_model(model, mesh=mesh)
    found["other prompt"] = error_of(lambda: list(stream(language_model, texts, GenerateConfig(max_tokens=1))))
    found["no mesh"] = error_of(lambda: serving.init(model))
    found["save"] = error_of(lambda: checkpoint.save(folder.with_suffix(".again"), model))
    some = Mesh(np.array([jax.devices()[0], jax.devices()[1]]).reshape(1, 2), ("data", "model"))
    found["some processes"] = error_of(lambda: Placement.of(some, 16, 4))
    return found


def damaged(model, mesh):
    """The words of the error where process 1 has a page that is not what it was."""
    placement = Placement.of(mesh, model.config.num_experts, model.plan.blocks)
    host, state = serving.init(model, 2, placement=placement)
    plan = dataclasses.replace(model.plan, widths=model.plan.widths.copy())
    layer, expert, block = np.argwhere(plan.widths == plan.widths.min())[-1]  # of the last experts, which process 1 has
    plan.widths[layer, expert, block] = model.plan.widths.max()
    if rank == 1:
        planes = jax.tree.map(np.array, host.pages.planes)
        for level in (3, 4, 8):
            planes.codes[level][layer, host.pages.place[expert]] ^= 1
        host = dataclasses.replace(host, pages=dataclasses.replace(host.pages, planes=planes))
    return error_of(lambda: serving.begin(host, state, plan))


with jax.default_device(jax.local_devices()[0]):
    made = shared.quantized(tokenizer, shared.config_of(**{"num_experts": 6} if blocks else {}))
devices = np.array(jax.devices()).reshape(2, -1)
mesh = None if alone else Mesh(devices.T if blocks else devices, ("data", "model"))
checkpoint.save(out.with_suffix(""), made)
if "folder" in sys.argv[5:]:  # that is all
    sys.exit()
model = text_that_is_novel(checkpoint.load(out.with_suffix(""), mesh))
tokens, events, widths = generated(model, mesh)
held = range(made.config.num_experts) if model.held is None else model.held.tolist()
assert len(held) == model.store.scales.shape[1]
found = {"tokens": tokens, "events": events, "widths": widths, "experts": list(held)}
if not alone and not blocks:
    found["faults"] = {"damaged page": damaged(model, mesh)} | faults(model, mesh, out.with_suffix(""))
out.write_text(json.dumps(found))
if os.environ.get("THEN_WAIT"):  # to be killed: the others notice at the next step
    out.with_suffix(".ready").touch()
    generated(model, mesh)
