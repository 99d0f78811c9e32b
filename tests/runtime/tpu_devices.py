"""The TPU kernel on four emulated devices beside one: ``test_mesh.py`` runs this file in a process that has eight.

The interpreter waits for all devices of a mesh in threads, of which JAX has one a device: with none to spare it would
wait for ever.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from dynamo_jax.models.experts import ExpertForm, ExpertWeights, silu_gated
from dynamo_jax.models.routing import Routing
from dynamo_jax.precision.plan import expert_plan
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.mesh import Placement, fetch, put
from dynamo_jax.runtime.quantized import QuantizedExperts
from dynamo_jax.runtime.store import quantize_experts

pytestmark = pytest.mark.usefixtures("quick_compilation")

REQUESTS, TOKENS, HIDDEN = 4, 3, 128


def routed(experts):
    """Inputs of all tokens and where they go."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(REQUESTS * TOKENS, HIDDEN)).astype(np.float32)
    chosen = np.stack([rng.choice(experts, 2, replace=False) for _ in x]).astype(np.int32)
    return x, chosen, rng.random(chosen.shape).astype(np.float32)


def outputs(model, other, placement, rows):
    """Of requests at both variants."""
    slots = {3: 12, 4: 12, 8: 0}
    state = serving.init(model, REQUESTS, 2, slots, "tiles", [other], placement)[1]
    state = serving.switch(state, [0, 1, 1, 0])
    spec = () if placement is None else (placement.rows(REQUESTS),)

    @jax.jit
    def run(state, x, chosen, gates):
        return serving.experts(state)(0, x, Routing(gates, chosen, gates), None, ExpertForm(silu_gated, None))[0]

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        return fetch(run(state, *(put(placement, a, *spec) for a in rows)))


@pytest.mark.parametrize(
    ("experts", "split"),
    [
        (4, (("data", "model"), ())),
        pytest.param(2, (("data",), ("model",)), marks=pytest.mark.slow),
    ],
    ids=["experts", "blocks"],
)
def test_the_tpu_kernel_over_devices_gives_what_one_device_gives(experts, split):
    """Experts split over all, or over some and their blocks over others. (The interpreter's kernels wait for each
    other, so devices that take their rows in different numbers of pieces are compared without it, by XLA's path.)"""
    rng, channels = np.random.default_rng(0), 256 // (experts // 2)
    weights = ExpertWeights(*(rng.normal(0, 0.1, (experts, channels, HIDDEN)).astype(np.float32) for _ in range(3)))
    plan, other = (expert_plan(rng.choice([2, 3, 4], (1, experts)), channels, 128, 128, HIDDEN) for _ in range(2))
    model = QuantizedExperts(store=quantize_experts([weights], 128, 128, [plan, other]), plan=plan, knowledge=None)
    placement = Placement.of(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model")), experts, plan.blocks)
    assert (placement.experts, placement.blocks) == split
    rows = routed(experts)
    one, several = (outputs(model, other, where, rows) for where in (None, placement))
    tolerance = 1e-6 if placement.blocks == () else 0.01  # parts of an expert's outputs are bfloat16 each
    np.testing.assert_allclose(several, one, rtol=0, atol=tolerance * np.abs(one).max())
