"""Modules of somebody else, taken by rule: the outputs stay, or an error names the module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_models import CHANNELS, EXPERTS, HIDDEN, TOP, Model, top_k, weight

from dynamo_jax.transform import Experts, ExpertsRule, uniform, with_experts

pytestmark = pytest.mark.usefixtures("quick_compilation")


def dense(x, gate, up, down, ids, gates):
    """Every expert on every token, then a choice."""
    hidden = jax.nn.silu(jnp.einsum("...d,edf->...ef", x, gate)) * jnp.einsum("...d,edf->...ef", x, up)
    out = jnp.einsum("...ef,efd->...ed", hidden, down)
    return jnp.einsum("...kd,...k->...d", jnp.take_along_axis(out, ids[..., None], axis=-2), gates)


class Foreign(nnx.Module):
    """As tunix has it: 3-D inputs, the router inside, a loss on the side, a keyword."""

    def __init__(self, rngs):
        self.router = nnx.Linear(HIDDEN, EXPERTS, use_bias=False, rngs=rngs)
        self.wi_0, self.wi_1 = weight(rngs, EXPERTS, HIDDEN, CHANNELS), weight(rngs, EXPERTS, HIDDEN, CHANNELS)
        self.wo = weight(rngs, EXPERTS, CHANNELS, HIDDEN)
        self.shared = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)

    def balance(self, ids):
        return jnp.bincount(ids.reshape(-1), length=EXPERTS).max() / ids.size

    def __call__(self, x, *, scale=1.0):
        ids, gates = top_k(self.router(x), TOP)
        out = dense(x, self.wi_0[...], self.wi_1[...], self.wo[...], ids, gates)
        return (out + self.shared(x)) * scale, self.balance(ids)


class Fused(nnx.Module):
    """As Gemma has it: gate and up in one transposed array."""

    def __init__(self, rngs):
        self.router = nnx.Param(jax.random.normal(rngs.params(), (HIDDEN, EXPERTS)))
        self.gating_einsum = nnx.Param(0.2 * jax.random.normal(rngs.params(), (EXPERTS, 2, CHANNELS, HIDDEN)))
        self.linear = weight(rngs, EXPERTS, CHANNELS, HIDDEN)

    def __call__(self, x):
        ids, gates = top_k(x @ self.router[...], TOP)
        gate, up = (self.gating_einsum[...][:, i].swapaxes(1, 2) for i in range(2))
        return dense(x, gate, up, self.linear[...], ids, gates)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = Foreign(rngs), Fused(rngs)

    def __call__(self, x):
        y, loss = self.first(x, scale=0.5)
        return x + y + self.second(x), loss


def call_foreign(m, experts, x, *, scale=1.0):
    ids, gates = top_k(m.router(x), TOP)
    return (experts(x, ids, gates) + m.shared(x)) * scale, m.balance(ids)


FOREIGN = ExpertsRule(Foreign, experts=lambda m: Experts(m.wi_0, m.wi_1, m.wo), call=call_foreign)
FUSED = ExpertsRule(
    "second",
    experts=lambda m: Experts(m.gating_einsum, m.linear, layout="e2fd"),
    call=lambda m, experts, x: experts(x, *top_k(x @ m.router[...], TOP)),
)
X = jax.random.normal(jax.random.key(5), (2, 7, HIDDEN))


def test_rules_by_type_and_by_path_keep_the_outputs():
    net = Net(nnx.Rngs(0))
    taken = with_experts(net, [FOREIGN, FUSED], X)
    for want, got in zip(net(X), taken(X)):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    assert isinstance(taken.first.experts, Experts) and not hasattr(taken.first.inner, "wo")
    assert taken.first.shared is taken.first.inner.shared  # what else the module has is found where it was
    assert isinstance(net.first, Foreign) and net.first.wo.shape == (EXPERTS, CHANNELS, HIDDEN)
    assert len(uniform(taken, 4, 8, 16).layers[0]) == 2


def test_a_call_that_drops_something_is_refused_by_the_modules_name():
    dropped = ExpertsRule(
        Foreign,
        experts=FOREIGN.experts,
        call=lambda m, experts, x, scale: (experts(x, *top_k(m.router(x), TOP)) * scale, jnp.zeros(())),
    )
    with pytest.raises(ValueError, match=r"first, output 0: with Experts the outputs differ by \d\.\d+ of their size"):
        with_experts(Net(nnx.Rngs(0)), [dropped], X)


def test_a_call_that_returns_something_else_is_refused():
    other = ExpertsRule(Foreign, FOREIGN.experts, lambda m, experts, x, scale: x)
    with pytest.raises(ValueError, match="first: with Experts it returns"):
        with_experts(Net(nnx.Rngs(0)), [other], X)


def test_rules_that_match_nothing_and_models_without_experts_say_what_there_is():
    with pytest.raises(ValueError, match=r"no module of the model matches the rule for 'third'; it has Foreign, Fused"):
        with_experts(Net(nnx.Rngs(0)), [ExpertsRule("third", FOREIGN.experts, call_foreign)], X)
    with pytest.raises(
        ValueError, match=r"first \(Foreign\) has wi_0 \(6, 32, 24\), .*\n.*second \(Fused\) has gating"
    ):
        uniform(Net(nnx.Rngs(0)), 4)
    with pytest.raises(ValueError, match="no module of it has weights of three axes"):
        uniform(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 4)
    with pytest.raises(ValueError, match="the rule's experts are Linear"):
        with_experts(Net(nnx.Rngs(0)), [ExpertsRule(Foreign, lambda m: m.shared, call_foreign)], X)


def test_a_model_that_calls_experts_itself_needs_no_rule():
    assert uniform(Model(nnx.Rngs(0)), 4, 8, 16).layers == (("blocks.0.experts", "blocks.1.experts"),)


def test_an_abstract_model_is_taken_without_a_comparison():
    """So that ``load`` needs no float experts."""
    taken = nnx.eval_shape(lambda: with_experts(Net(nnx.Rngs(0)), [FOREIGN, FUSED], X))
    again = with_experts(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), [FOREIGN, FUSED])
    for each in (taken, again):
        assert uniform(each, 4, 8, 16).layers == (("first.experts", "second.experts"),)


def test_weights_in_a_module_of_the_module_are_taken_and_copies_are_refused():
    class Outer(nnx.Module):
        def __init__(self):
            self.own = Foreign(nnx.Rngs(0))

        def __call__(self, x):
            return self.own(x)[0]

    def call(m, experts, x):
        return call_foreign(m.own, experts, x)[0]

    taken = with_experts(Outer(), [ExpertsRule(Outer, lambda m: Experts(m.own.wi_0, m.own.wi_1, m.own.wo), call)], X)
    assert not hasattr(taken.inner.own, "wo") and taken.experts.down.shape == (EXPERTS, CHANNELS, HIDDEN)
    with pytest.raises(ValueError, match="the model: the rule's Experts hold weights that are no Params of the module"):
        copies = ExpertsRule(Outer, lambda m: Experts(m.own.wi_0[...], m.own.wi_1[...], m.own.wo[...]), call)
        with_experts(Outer(), [copies], X)
    with pytest.raises(ValueError, match="own: it lies in the model, which matches a rule, too"):
        with_experts(Outer(), [ExpertsRule(Outer, FOREIGN.experts, call), FOREIGN], X)


def test_attributes_that_are_set_reach_the_module_and_a_module_at_two_paths_is_one():
    class Twice(nnx.Module):
        def __init__(self):
            self.a = Foreign(nnx.Rngs(0))
            self.b = self.a
            self.rest = nnx.List([self.a])

        def __call__(self, x):
            return self.b(x)[0]

    taken = with_experts(Twice(), [FOREIGN], X)
    assert taken.a is taken.b and taken.rest[0] is taken.a
    taken.a.training = True
    assert taken.a.inner.training and taken.b.training


def test_an_example_call_leaves_the_state_as_it_was():
    """Of a cache or a counter of dropout, which the module and the call of the rule both move on."""

    class Counting(Foreign):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)[0] * self.calls[...]

    def call(m, experts, x):
        m.calls[...] += 1
        return call_foreign(m, experts, x)[0] * m.calls[...]

    own = Counting(nnx.Rngs(0))
    taken = with_experts(own, [ExpertsRule(Counting, FOREIGN.experts, call)], X)
    assert int(own.calls[...]) == 0 and int(taken.calls[...]) == 0
