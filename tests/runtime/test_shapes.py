"""What a step takes, by shapes alone; no device is needed but the one that is here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh

from dynamo_jax.models.experts import ExpertForm, ExpertWeights, silu_gated
from dynamo_jax.models.routing import Routing
from dynamo_jax.precision.plan import expert_plan
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.mesh import Placement
from dynamo_jax.runtime.quantized import QuantizedExperts
from dynamo_jax.runtime.shapes import of, state_shapes
from dynamo_jax.runtime.store import quantize_experts


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("arrangement", ["planes", "tiles", "fragments"])
def test_a_state_has_the_shapes_that_are_said(arrangement, apart):
    rng = np.random.default_rng(0)
    layers = [ExpertWeights(*(rng.normal(size=(3, 256, 200)).astype(np.float32) for _ in range(3))) for _ in range(2)]
    widths = rng.choice([2, 3, 8], (2, 3, 2) if apart else (2, 3))
    plan = expert_plan(widths, 256, 128, 128, 200)
    model = QuantizedExperts(store=quantize_experts(layers, 128, 128, [plan]), plan=plan, knowledge=None)
    made = serving.init(model, 5, 3, arrangement=arrangement)[1]
    said = state_shapes(plan, 5, 3, known=0, arrangement=arrangement)
    assert jax.tree.structure(made) == jax.tree.structure(said)
    both = zip(jax.tree.leaves(made), jax.tree.leaves(said), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in both)


def rows_of_kernels(jaxpr, hidden):
    """The rows of each Pallas kernel's tiles, by the memory that holds them in the form that is multiplied."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            scratch = equation.params["grid_mapping"].scratch_avals
            yield next(a.shape[0] for a in scratch if a.shape[1:] == (hidden,))
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from rows_of_kernels(inner, hidden)


def kernel_rows(placement, tokens):
    """Of a layer of 128 small experts."""
    plan = expert_plan(np.resize([2, 3, 4], (1, 128)), 128, 128, 256, 256)
    state = state_shapes(plan, tokens, known=0, placement=placement)

    def run(state, x, chosen, gates):
        routing = Routing(gates, chosen, gates)
        return serving.experts(state, "int8")(0, x, routing, None, ExpertForm(silu_gated, None))[0]

    inputs = of((tokens, 256), jnp.bfloat16), of((tokens, 8), jnp.int32), of((tokens, 8), jnp.float32)
    (rows,) = rows_of_kernels(jax.make_jaxpr(run)(state, *inputs).jaxpr, 256)
    return rows


def test_tiles_have_the_rows_of_what_a_device_is_likely_to_have():
    """Of 512 rows to 128 experts, 4 an expert, on one device and on each of sixteen, whose eight experts would have 64
    each if all rows were theirs."""
    mesh = AbstractMesh((4, 4), ("data", "model"))
    assert kernel_rows(Placement.of(mesh, 128, 1), 64) == kernel_rows(None, 64) == 16
    assert kernel_rows(None, 16 * 64) > 64
