"""``Experts`` in float: layouts, ids of no expert, stacked layers, and what is refused."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamo_jax.transform import Experts

pytestmark = pytest.mark.usefixtures("quick_compilation")

E, D, F, N, K = 5, 16, 12, 9, 2


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    gate, up, down = (rng.normal(size=s).astype(np.float32) for s in ((E, D, F), (E, D, F), (E, F, D)))
    return gate, up, down


def routing(seed=1, count=N):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, D)).astype(np.float32)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(count)]).astype(np.int32)
    return jnp.asarray(x), jnp.asarray(ids), jnp.asarray(rng.random((count, K), np.float32))


def by_hand(x, ids, gates, weights, activation=lambda a, u: jax.nn.silu(a) * u, biases=None):
    gate, up, down = weights
    out = np.zeros(x.shape, np.float32)
    for n, k in itertools.product(range(len(x)), range(K)):
        e = int(ids[n, k])
        if e < 0:
            continue
        a, u = x[n] @ gate[e], x[n] @ up[e]
        if biases is not None:
            a, u = a + biases[0][e], u + biases[1][e]
        y = activation(a, u) @ down[e]
        out[n] += gates[n, k] * (y if biases is None else y + biases[2][e])
    return out


LAYOUTS = {
    "edf": lambda g, u, d: (g, u, d),
    "efd": lambda g, u, d: (g.swapaxes(1, 2), u.swapaxes(1, 2), d),
    "e2fd": lambda g, u, d: (np.stack([g.swapaxes(1, 2), u.swapaxes(1, 2)], axis=1), d),
    "e2df": lambda g, u, d: (np.stack([g, u], axis=1), d),
    "ed2f": lambda g, u, d: (np.concatenate([g, u], axis=2), d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_experts(layout):
    given = routing()
    experts = Experts(*LAYOUTS[layout](*arrays()), layout=layout)
    assert tuple(experts.sizes) == (1, E, F, D)
    np.testing.assert_allclose(experts(*given), by_hand(*given, arrays()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("count", [N, 1], ids=["many", "one token"])
def test_biases_an_activation_and_ids_of_no_expert(count):
    x, ids, gates = routing(count=count)
    ids = ids.at[0, 1].set(-1)
    rng = np.random.default_rng(3)
    biases = tuple(rng.normal(size=s).astype(np.float32) for s in ((E, F), (E, F), (E, D)))

    def activation(a, u):
        return jax.nn.gelu(a) * (u + 1)

    experts = Experts(*arrays(), activation=activation, biases=biases)
    want = by_hand(x, ids, gates, arrays(), activation, biases)
    np.testing.assert_allclose(experts(x, ids, gates), want, rtol=2e-5, atol=2e-5)


def test_tokens_of_no_expert_get_zeros_and_leading_axes_stay():
    x, _, gates = routing()
    experts = Experts(*arrays())
    none = experts(x.reshape(3, 3, D), jnp.full((3, 3, K), -1), gates.reshape(3, 3, K))
    assert none.shape == (3, 3, D) and not none.any()


def test_a_param_stays_the_same_param():
    """So that an optimizer's state, annotations of sharding and references go on to be of it."""
    param = nnx.Param(jnp.asarray(arrays()[0]))
    assert Experts(param, *arrays()[1:]).gate is param


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_weights_have_a_layer_each(axis):
    layers = [arrays(seed) for seed in range(3)]
    stacked = Experts(*(np.stack(own, axis=axis) for own in zip(*layers)), stacked=axis)
    assert stacked.layers == 3 and tuple(stacked.sizes) == (1, E, F, D)
    for index, own in enumerate(layers):
        weights, _ = stacked.one_layer(index)
        np.testing.assert_array_equal(weights.gate, own[0].swapaxes(1, 2))
        np.testing.assert_array_equal(weights.down, own[2])


def test_what_does_not_fit_is_refused():
    gate, up, down = arrays()
    with pytest.raises(ValueError, match="layout 'fde': known are edf, efd"):
        Experts(gate, up, down, layout="fde")
    with pytest.raises(ValueError, match=r"3 weights: the layout ed2f has gate_up, down"):
        Experts(gate, up, down, layout="ed2f")
    with pytest.raises(ValueError, match=r"gate \(5, 16, 12\), up \(5, 16, 12\), down \(5, 16, 12\): these do not fit"):
        Experts(gate, up, gate)
    experts, (x, ids, gates) = Experts(gate, up, down), routing()
    with pytest.raises(ValueError, match=r"inputs \(9, 15\) for experts of hidden size 16"):
        experts(x[:, 1:], ids, gates)
    with pytest.raises(ValueError, match=r"ids \(9, 2\), gates \(9, 1\)"):
        experts(x, ids, gates[:, 1:])
    with pytest.raises(ValueError, match="ids are float32"):
        experts(x, gates, gates)
