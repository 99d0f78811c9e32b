"""The delta rule against its recurrence, token by token, in float64, and the mixers that have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax.models import mixers
from dynamo_jax.models.attention import Places
from dynamo_jax.models.convolution import convolved
from dynamo_jax.models.delta_rule import Tokens, chunked, inverse, step, unit
from dynamo_jax.models.specs import DeltaNet, KimiDelta

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6)
BATCH, HEADS, GROUP, KEY, VALUE = 2, 2, 2, 8, 6


def made_up(count, rows=1, seed=0):
    """Tokens with keys that repeat, decays from none to all, for a state or each of its rows, and a state to begin
    with."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, count, HEADS)
    key = rng.normal(size=(*shape, KEY))
    key[:, 1::5] = key[:, :1]
    key, query = (np.asarray(unit(jnp.asarray(a, jnp.float32))) for a in (key, rng.normal(size=(*shape, KEY))))
    value = rng.normal(size=(*shape, GROUP, VALUE))
    decay = -np.exp(rng.normal(-3, 2, size=(*shape, GROUP, rows)))
    beta = rng.uniform(size=(*shape, GROUP))
    state = rng.normal(size=(BATCH, HEADS, GROUP, KEY, VALUE))
    return Tokens(*(jnp.asarray(a, jnp.float32) for a in (query, key, value, decay, beta))), jnp.float32(state)


def recurrent(tokens, state, numpy=jnp):
    """The definition: (I - beta k k^T) exp(decay) S + beta k v^T, one token after the other; decay: a number, or a
    diagonal matrix."""
    outs = []
    for t in range(tokens.key.shape[1]):
        q, k, v, decay, beta = (part[:, t] for part in tokens)
        erased = numpy.eye(k.shape[-1]) - beta[..., None, None] * (k[:, :, :, None] * k[:, :, None, :])[:, :, None]
        written = beta[..., None, None] * k[:, :, None, :, None] * v[..., None, :]
        state = erased @ (numpy.exp(decay)[..., None] * state) + written
        outs.append(numpy.einsum("bjk,bjgkv->bjgv", q, state))
    return numpy.stack(outs, axis=1), state


@pytest.mark.parametrize(
    ("count", "rows"), [(1, 1), (63, 1), (64, 1), (65, 1), (130, 1), (1, KEY), (17, KEY), (64, KEY)]
)
def test_chunks_do_what_the_recurrence_does(count, rows):
    tokens, state = made_up(count, rows)
    want = recurrent(Tokens(*(np.asarray(a, np.float64) for a in tokens)), np.asarray(state, np.float64), np)
    for ours, theirs in zip(jax.jit(chunked)(tokens, state), want):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("rows", [1, KEY])
def test_a_step_is_a_chunk_of_one_token(rows):
    tokens, state = made_up(1, rows)
    for ours, theirs in zip(jax.jit(step)(tokens, state), jax.jit(chunked)(tokens, state)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_same_key_again_and_again_loses_no_digits():
    """The system of a chunk is then as far from the identity as it can be."""
    tokens, state = made_up(64)
    tokens = tokens._replace(
        key=jnp.broadcast_to(tokens.key[:, :1], tokens.key.shape),
        decay=jnp.zeros_like(tokens.decay),
        beta=jnp.full_like(tokens.beta, 0.999),
    )
    want = recurrent(Tokens(*(np.asarray(a, np.float64) for a in tokens)), np.asarray(state, np.float64), np)
    for ours, theirs in zip(jax.jit(chunked)(tokens, state), want):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_inverse_of_a_triangle_is_that_of_numpy():
    rng = np.random.default_rng(0)
    lower = np.tril(rng.normal(size=(3, 16, 16)), -1).astype(np.float32)
    whole = lower + np.triu(rng.normal(size=(3, 16, 16))).astype(np.float32)  # what it must not read
    want = np.linalg.inv(np.eye(16) + lower.astype(np.float64))
    np.testing.assert_allclose(jax.jit(inverse)(whole), want, atol=1e-5 * np.abs(want).max())
    for size in (1, 2):
        np.testing.assert_allclose(inverse(whole[:, :size, :size]), want[:, :size, :size], atol=1e-6)


@pytest.mark.parametrize(("count", "size", "rows"), [(4, 64, 1), (11, 4, 1), (11, 4, KEY)])
def test_gradients_of_chunks_are_those_of_the_recurrence(count, size, rows):
    arguments = made_up(count, rows)

    def total(rule):
        return lambda tokens, state: sum(jnp.sum(jnp.sin(a)) for a in rule(tokens, state))

    rules = (lambda *a: chunked(*a, size), recurrent)
    ours, theirs = (jax.jit(jax.grad(total(rule), (0, 1)))(*arguments) for rule in rules)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.fixture
def optimized():
    """Memory as in real runs."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("rows", [1, KEY])
def test_a_decay_that_forgets_all_has_a_finite_gradient(rows):
    tokens, state = made_up(65, rows)
    tokens = tokens._replace(decay=tokens.decay * 1e6)
    found = jax.jit(jax.grad(lambda *a: sum(jnp.sum(x) for x in chunked(*a)), (0, 1)))(tokens, state)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (128, 16)])
def test_the_gradient_keeps_one_state_a_chunk(optimized, rows, size):
    """Of heads as published, so that a state is more than what each of its tokens has beside it."""
    count = 1024
    shape = (1, count, 1)
    vectors = jax.ShapeDtypeStruct((*shape, 128), jnp.float32)
    decays, betas = (jax.ShapeDtypeStruct((*shape, 2, *own), jnp.float32) for own in ((rows,), ()))
    tokens = Tokens(vectors, vectors, jax.ShapeDtypeStruct((*shape, 2, 128), jnp.float32), decays, betas)
    state = jax.ShapeDtypeStruct((1, 1, 2, 128, 128), jnp.float32)

    def total(tokens, state):
        return jnp.sum(chunked(tokens, state)[0] ** 2)

    held = jax.jit(jax.grad(total, (0, 1))).lower(tokens, state).compile().memory_analysis().temp_size_in_bytes
    a_state, a_token = 4 * 2 * 128 * 128, 4 * 2 * (2 * 128 + 128 + rows + 1)  # of each value head
    assert held < count // size * a_state + 8 * count * a_token
    assert held < count * a_state / 4


KIMI = dict(linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=3)
SPECS = {
    "separate": DeltaNet(**SIZES),
    "fused": DeltaNet(**SIZES, fused_projections=True),
    "kimi's": KimiDelta(**KIMI),
    "kimi's with a limit": KimiDelta(**KIMI, low_rank=False, decay_limit=2.0),
}


@pytest.fixture(scope="module", params=SPECS)
def mixer(request):
    spec = SPECS[request.param]
    config = decoder_config(vocab_size=8, hidden_size=16, intermediate_size=8, num_attention_heads=2, num_experts=2,
                            num_key_value_heads=2, num_experts_per_tok=1, max_position_embeddings=64,
                            initializer_range=0.5)  # fmt: skip
    return mixers.mixer(config, spec, nnx.Rngs(0))


@nnx.jit
def run(mixer, x, mask, cache=None):
    nowhere = jnp.zeros(x.shape[:2], jnp.int32)
    return mixer(x, Places(nowhere, nowhere, (), mask=mask), cache)


def states(count):
    return jax.random.normal(jax.random.key(1), (3, count, 16))


def empty(mixer, batch=3):
    return mixers.empty_cache(mixer.spec, batch, 0, jnp.float32)


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 4], [2, 7]], ids=str)
def test_step_by_step_is_as_at_once(mixer, pieces):
    x = states(9)
    whole, at_end = run(mixer, x, None, empty(mixer))
    assert_same(whole, run(mixer, x, None)[0])
    cache, found = empty(mixer), []
    for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
        out, cache = run(mixer, piece, None, cache)
        found.append(out)
    assert_same((jnp.concatenate(found, axis=1), cache), (whole, at_end))


def test_padding_anywhere_changes_nothing(mixer):
    """Three sequences of 9 tokens in steps with padding before, after and between; in one step two have no token."""
    x = states(9)
    whole, at_end = run(mixer, x, None, empty(mixer))
    plans = [
        [[0, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]],
        [[0], [1], [0]],
        [[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1]],
        [[1], [1], [1]],
    ]
    rows = [0, 0, 0]
    cache, found = empty(mixer), [[], [], []]
    for plan in plans:
        mask = np.array(plan, bool)
        piece = np.full((*mask.shape, 16), 1e3, np.float32)
        for row in range(3):
            count = int(mask[row].sum())
            piece[row][mask[row]] = x[row, rows[row] : rows[row] + count]
            rows[row] += count
        out, cache = run(mixer, jnp.asarray(piece), jnp.asarray(mask), cache)
        for row in range(3):
            found[row].append(np.asarray(out)[row][mask[row]])
    assert rows == [9, 9, 9]
    assert_same((np.stack([np.concatenate(own) for own in found]), cache), (whole, at_end))


def test_padding_in_a_pass_without_a_cache_changes_nothing(mixer):
    x = states(9)
    whole, _ = run(mixer, x[:1], None)
    for before, after in ((3, 0), (0, 4), (2, 60)):
        wide = jnp.pad(x[:1], ((0, 0), (before, after), (0, 0)), constant_values=1e3)
        mask = jnp.zeros(wide.shape[:2], bool).at[:, before : before + 9].set(True)
        assert_same(run(mixer, wide, mask)[0][:, before : before + 9], whole)


def test_the_convolution_is_that_of_numpy():
    x, weights = (np.asarray(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate([(1, 12, 5), (5, 4)]))
    out, window = convolved(jnp.asarray(x), jnp.asarray(weights), jnp.zeros((1, 3, 5)))
    for channel in range(5):
        want = np.convolve(x[0, :, channel], weights[channel, ::-1])[:12]
        np.testing.assert_allclose(out[0, :, channel], want / (1 + np.exp(-want)), atol=1e-5)
    np.testing.assert_array_equal(window, x[:, -3:])


def test_bfloat16_keeps_its_state_in_float32(mixer):
    cache = mixers.empty_cache(mixer.spec, 3, 0, jnp.bfloat16)
    out, after = run(mixer, states(5).astype(jnp.bfloat16), None, cache)
    full, _ = run(mixer, states(5), None)
    assert (out.dtype, after.window.dtype, after.state.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert float(jnp.linalg.norm(out - full) / jnp.linalg.norm(full)) < 0.03


def test_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match="linear_num_key_heads=3 does not divide 4"):
        DeltaNet(**SIZES | {"linear_num_key_heads": 3})
