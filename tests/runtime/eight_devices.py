"""The run time on eight emulated devices beside one: ``test_mesh.py`` runs this file in a process that has them."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from jax.sharding import Mesh
from small_decoders import decoder_config

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.generation import quantized_language_model
from dynamo_jax.models.decoder import Decoder, new_cache, parameters, with_parameters
from dynamo_jax.models.experts import ExpertForm
from dynamo_jax.models.rest import bits_of, expanded
from dynamo_jax.models.routing import Routing
from dynamo_jax.models.stacked import stacked
from dynamo_jax.runtime import devices, memory, serving, shapes, switch
from dynamo_jax.runtime import generate as generation
from dynamo_jax.runtime.adapt import observe_windows
from dynamo_jax.runtime.generate import GenerateConfig, LanguageModel, generate, stream
from dynamo_jax.runtime.mesh import Placement, fetch, placed_parameters, put
from dynamo_jax.runtime.residency import Chunk
from dynamo_jax.runtime.store import pages_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

REQUESTS = 8
SHAPES = [(1, 8), (2, 4), (8, 1)]


def config_of(**changes):
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 2, "max_position_embeddings": 512,
        "norm_topk_prob": True, "initializer_range": 0.1,
    }  # fmt: skip
    return decoder_config(**sizes | changes)


def quantized(tokenizer_file, config, **changes):
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    arrays = parameters(decoder)
    rng = np.random.default_rng(0)
    moved = {name: a + 0.1 * rng.normal(size=a.shape) for name, a in arrays.items() if "bias" in name}
    decoder = with_parameters(config, arrays | {name: a.astype(np.float32) for name, a in moved.items()})
    texts = {"low": rng.integers(3, 20, 2000), "high": rng.integers(30, 61, 2000)}
    known = {name: " ".join(f"w{i}" for i in ids) for name, ids in texts.items()}
    settings = QuantizeConfig(
        unseen_windows=0,
        bits=3.5,
        channel_block=8,
        group_size=32,
        window=64,
        calibration_windows=16,
        quantizer="rtn",
        spare=0.5,
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    return quantize(decoder, tokenizer, known, dataclasses.replace(settings, **changes))[0]


@pytest.fixture(scope="module")
def model(tokenizer_file):
    return quantized(tokenizer_file, config_of())


@pytest.fixture(scope="module")
def few_experts(tokenizer_file):
    """Six experts of four blocks, which have biases, and two widths: a mesh of 2 x 4 splits three by their blocks."""
    return quantized(tokenizer_file, config_of(num_experts=6, expert_bias=True), per_projection=True)


@pytest.fixture(scope="module", params=[8, 4])
def small_rest(request, tokenizer_file):
    """With a rest at 8 or 4 bits, a shared expert and a head of its own."""
    config = config_of(shared_intermediate_size=32, tie_word_embeddings=False)
    return quantized(tokenizer_file, config, rest=request.param)


def mesh_of(shape):
    return Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))


def placement_of(model, shape):
    return Placement.of(mesh_of(shape), model.config.num_experts, model.plan.blocks)


def tokens_of(seed, requests=REQUESTS, length=12, low=3, high=61):
    return np.random.default_rng(seed).integers(low, high, (requests, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def step(config, params, state, tokens):
    """Prefill and one token more, of the likeliest: logits of both, and the state with what the router did."""
    decoder, placement = with_parameters(config, params), state.placement
    spread = None if placement is None else placement.spread(len(tokens))
    run = {"experts": serving.experts(state), "spread": spread}
    cache = new_cache(config, *tokens.shape[:1], 32)
    hidden, routings, cache = decoder.cached_states(tokens, tokens >= 0, cache, **run)
    logits = decoder.logits(hidden)
    more = logits[:, -1:].argmax(axis=-1)
    hidden, _, _ = decoder.cached_states(more, more >= 0, cache, **run)
    return logits, decoder.logits(hidden), serving.observe(state, routings)


def ran(model, state, tokens):
    placement = state.placement
    rows = () if placement is None else (placement.rows(len(tokens)),)
    params = model.device_parameters(placement=placement)
    logits, more, after = step(model.config, params, state, put(placement, tokens, *rows))
    return fetch(logits), fetch(more), jax.tree.map(fetch, after.watch)


def alike(ours, theirs):
    """Logits but for rounding, the monitors bit for bit."""
    for a, b in zip(ours[:2], theirs[:2]):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    for a, b in zip(ours[2], theirs[2], strict=True):
        np.testing.assert_array_equal(a, b)


def adapted(model, placement, windows):
    host, state = serving.init(model, REQUESTS, placement=placement)
    host, state = serving.adapt(model, host, state, windows)
    return host, serving.switch(state, [0, 1] * (REQUESTS // 2))


def beside_one_device(model, host, tokens):
    """What one device computes by the same plans."""
    slots = {level: has.size for level, has in pages_of(model.plan).items()}
    _, state = serving.init(model, REQUESTS, slots=slots, others=[host.plans[1]])
    return ran(model, serving.switch(state, [0, 1] * (REQUESTS // 2)), tokens)


@pytest.mark.parametrize(
    "shape", [(2, 4), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 8), (8, 1)))], ids=str
)
def test_logits_and_monitors_are_those_of_one_device(model, shape):
    host, state = adapted(model, placement_of(model, shape), tokens_of(1, 4, 65, 20, 30))
    assert (host.plans[1].widths != host.plans[0].widths).any()
    alike(ran(model, state, tokens_of(2)), beside_one_device(model, host, tokens_of(2)))


@pytest.mark.slow
def test_tokens_in_any_order_with_padding_between_are_of_their_requests(model):
    """On a mesh as on one device: two tokens of each request, padding beside them, and two variants."""
    host, state = adapted(model, placement_of(model, (2, 4)), tokens_of(1, 4, 65, 20, 30))
    slots = {level: has.size for level, has in pages_of(model.plan).items()}
    _, alone = serving.init(model, REQUESTS, slots=slots, others=[host.plans[1]])
    alone = serving.switch(alone, fetch(state.number))
    rng = np.random.default_rng(5)
    request_of = rng.permutation(np.repeat([*range(REQUESTS), -1], 2)).astype(np.int32)[: 2 * REQUESTS]
    x = rng.normal(size=(len(request_of), model.config.hidden_size)).astype(np.float32)
    routed = np.stack([rng.permutation(model.config.num_experts)[:2] for _ in request_of]).astype(np.int32)

    @jax.jit
    def run(state, request_of, x, routed):
        routing, form = Routing(None, routed, jnp.full(routed.shape, 0.5)), ExpertForm(lambda a, b: jax.nn.silu(a) * b)
        out, _ = serving.experts(state, request_of=request_of)(0, x, routing, None, form)
        return out, serving.observe(state, [routing] * model.config.num_moe_layers, request_of=request_of).watch

    here = [put(state.placement, a) for a in (request_of, x, routed)]
    (out, watch), (want, want_watch) = run(state, *here), run(alone, request_of, x, routed)
    np.testing.assert_allclose(fetch(out), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert (fetch(out)[request_of < 0] == 0).all()
    for a, b in zip(watch, want_watch, strict=True):
        np.testing.assert_array_equal(fetch(a), b)


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((4, 2), marks=pytest.mark.slow)], ids=str)
def test_few_experts_are_split_by_their_blocks(few_experts, shape):
    placement = placement_of(few_experts, shape)
    assert (placement.experts, placement.blocks) == (("data",), ("model",)) if shape == (2, 4) else placement.blocks
    windows = tokens_of(1, 4, 65, 20, 30)
    here, there = (observe_windows(few_experts, windows, p) for p in (placement, None))
    for a, b in zip(here, there):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    host, state = adapted(few_experts, placement, windows)
    assert (host.plans[1].widths != host.plans[0].widths).any()
    alike(ran(few_experts, state, tokens_of(2)), beside_one_device(few_experts, host, tokens_of(2)))


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)
def test_a_quantized_rest_is_split_as_a_float_one_is(small_rest, shape):
    """Codes, and scales where they are of columns that are split; logits are those of one device, and a step's shapes
    say where all of it lies."""
    model, placement = small_rest, placement_of(small_rest, shape)
    _, state = serving.init(model, REQUESTS, placement=placement)
    alike(ran(model, state, tokens_of(2)), ran(model, serving.init(model, REQUESTS)[1], tokens_of(2)))
    config, bits = model.config, bits_of(model.parameters)
    held = placed_parameters(placement, config, stacked(config, jax.tree.map(np.asarray, model.parameters)))
    whole = {name: a.shape for name, a in expanded(model.parameters).items()}
    said = shapes.parameter_shapes(config, whole, jnp.bfloat16, placement, bits, tpu=False)
    assert held.keys() == said.keys()
    for name, there in held.items():
        assert there.shape == said[name].shape and there.sharding.is_equivalent_to(said[name].sharding, there.ndim)
    parts = {name: a.nbytes // a.addressable_shards[0].data.nbytes for name, a in held.items()}
    ways = shape[1]
    heads = ways if config.layers[0].mixer.num_key_value_heads % ways == 0 else 1
    assert parts["embed.codes"] == parts["head.codes"] == parts["head.scales"] == ways
    of_layer = {n.removeprefix("loops.0.0."): count for n, count in parts.items() if n.startswith("loops.0.0.")}
    assert of_layer["attention.q.codes"] == of_layer["attention.q.scales"] == heads
    groups = bits == 4  # of 64 rows, which are not split
    assert of_layer["attention.o.codes"] == (1 if groups else heads) and of_layer["attention.o.scales"] == 1
    count = sum(a.addressable_shards[0].data.nbytes // (2 if a.dtype == np.float32 else 1) for a in held.values())
    assert devices.on_mesh(config, whole, model.plan, shape, REQUESTS, 32, rest=bits).share.rest == count


def test_rows_of_other_devices_are_not_held(model, monkeypatch):
    """Pieces of eight rows, of 192: several turns where all rows go to one device's experts."""
    monkeypatch.setattr(switch, "PIECE", 8)
    jax.clear_caches()
    placement = placement_of(model, (2, 4))
    _, state = serving.init(model, REQUESTS, placement=placement)
    want = ran(model, serving.init(model, REQUESTS)[1], tokens_of(3))
    alike(ran(model, state, tokens_of(3)), want)
    same = np.repeat(tokens_of(4, 1), REQUESTS, axis=0)
    alike(ran(model, state, same), ran(model, serving.init(model, REQUESTS)[1], same))
    jax.clear_caches()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_device_has_its_share(model, shape):
    placement = placement_of(model, shape)
    _, state = serving.init(model, REQUESTS, placement=placement)
    base = state.resident.base
    first = jax.devices()[0]
    lies = [s.data.nbytes for a in jax.tree.leaves(state.resident) for s in a.addressable_shards if s.device == first]
    counted = memory.device_bytes(model.plan, model.spare, placement)
    assert sum(lies) == counted.plan + counted.spare
    for array in jax.tree.leaves(base):
        assert all(s.data.nbytes * 8 == array.nbytes for s in array.addressable_shards)
    for level, pages in state.resident.pages.items():
        slots = len(pages.codes)
        assert all(len(s.data) * 8 == slots for s in pages.codes.addressable_shards)
        has = pages_of(model.plan)[level]
        assert slots // 8 <= has.sum(axis=(0, 2)).reshape(8, -1).sum(axis=1).max() + -(-has.sum() // 2 // 8) + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_plane_travels_and_there_are_two_reductions_a_layer(model, shape):
    placement = placement_of(model, shape)
    _, state = serving.init(model, REQUESTS, placement=placement)
    params = model.device_parameters(placement=placement)

    @jax.jit
    def decode(params, state, tokens):
        decoder = with_parameters(model.config, params)
        cache = new_cache(model.config, REQUESTS, 32)
        return decoder.cached_states(tokens, tokens >= 0, cache, experts=serving.experts(state))[0]

    tokens = put(placement, tokens_of(5, length=1), placement.rows(REQUESTS))
    text = decode.lower(params, state, tokens).compile().as_text()
    moved = re.findall(r" = \(?(\w+)\[([\d,]*)\].* (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert moved
    largest = max(np.prod([int(n) for n in size.split(",") if n], dtype=int) for _, size, _ in moved)
    assert {kind for kind, _, _ in moved} <= {"f32", "s32", "pred"}
    assert largest <= REQUESTS * max(model.config.hidden_size, model.config.vocab_size)  # activations, no weights
    reduced = re.findall(r"(?:all-reduce|reduce-scatter)(?:-start)?\(.*op_name=\"[^\"]*shard_map[^\"]*psum", text)
    assert 1 <= len(reduced) <= 2 * model.config.num_hidden_layers


def moved(before, after):
    """The arrays that lie elsewhere than before."""
    named = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return [
        (path, a.sharding, b.sharding) for (path, a), b in named if not a.sharding.is_equivalent_to(b.sharding, a.ndim)
    ]


@pytest.mark.parametrize(
    ("switches", "adaptations"), [(20, 3), pytest.param(1000, 20, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_switching_and_adapting_compile_nothing_and_move_no_array(model, compilations, shape, switches, adaptations):
    placement = placement_of(model, shape)
    host, begun = serving.init(model, REQUESTS, placement=placement)
    params, tokens = (
        model.device_parameters(placement=placement),
        put(placement, tokens_of(6), placement.rows(REQUESTS)),
    )
    host, state = serving.adapt(model, host, begun, tokens_of(7, 4, 65))
    _, _, state = step(model.config, params, state, tokens)
    state = serving.follow(serving.switch(serving.switch(state, 1), [1] * REQUESTS))
    assert not moved(begun, state)
    with compilations() as count:
        for number in range(switches):
            state = serving.switch(state, [(number + i) % 2 for i in range(REQUESTS)])
            if number % 10 == 0:
                _, _, state = step(model.config, params, state, tokens)
        for seed in range(adaptations):
            host, state = serving.adapt(model, host, state, tokens_of(seed, 4, 65, 3 + seed, 40 + seed))
            _, _, state = step(model.config, params, serving.switch(state, 1), tokens)
        state = serving.follow(state)
    assert count.compiled == 0 and not moved(begun, state)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4), (1, 2)], ids=str)
def test_generation_that_adapts_writes_what_one_device_writes(model, shape):
    """Texts, events and plans; five prompts do not divide over two devices, and every one has them all then."""
    signatures = model.knowledge.signatures
    near = signatures._replace(limit=np.ones_like(signatures.limit), place=signatures.place - 100)  # any text is novel
    model = dataclasses.replace(model, knowledge=dataclasses.replace(model.knowledge, signatures=near))
    found = []
    for mesh in (None, mesh_of(shape)):
        texts = [[int(t) for t in row] for row in tokens_of(8, 2, 40, 20, 30)]
        language_model, follower = quantized_language_model(model, adaptive=True, mesh=mesh)
        for _ in stream(language_model, texts, GenerateConfig(max_tokens=400, stop=()), between=follower):
            pass
        events = [(e.token, e.request, e.what, e.name, e.moved) for e in follower.events]
        language_model = dataclasses.replace(language_model, state=follower.state)  # what pages moved in
        five = generate(language_model, [[5, 6, 7 + i] for i in range(5)], GenerateConfig(max_tokens=4))
        found.append((events, five, follower.host.plans[1].widths.tolist()))
    assert any(what == "adapted" or what == "not better" for _, _, what, _, _ in found[0][0]), found[0][0]
    assert found[0][:2] == found[1][:2]


def test_a_mesh_that_cannot_be_is_an_error_in_a_line(model):
    devices = np.array(jax.devices())
    with pytest.raises(ValueError, match="the mesh has the axes x, y: expected data and model"):
        Placement.of(Mesh(devices.reshape(2, 4), ("x", "y")), 16, 4)
    with pytest.raises(ValueError, match="6 experts of 4 channel blocks do not divide over a mesh of 1 x 8"):
        Placement.of(mesh_of((1, 8)), 6, 4)
    assert Placement.of(mesh_of((1, 1)), 6, 4) is None
    with pytest.raises(ValueError, match="pages of 3 bits have to come and 1 of 1 slots are free on device 1 of 8"):
        serving.init(model, slots={3: 1, 4: 1, 8: 1}, placement=placement_of(model, (1, 8)))


def test_a_mesh_with_explicit_axes_works(model):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    placement = Placement.of(mesh, model.config.num_experts, model.plan.blocks)
    _, state = serving.init(model, REQUESTS, placement=placement)
    alike(ran(model, state, tokens_of(9)), ran(model, serving.init(model, REQUESTS)[1], tokens_of(9)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_step_takes_lies_where_its_shapes_say(model, shape):
    """State, stacked parameters and cache, so that a step compiled by shapes is the one that runs."""
    placement, config = placement_of(model, shape), model.config
    _, made = serving.init(model, REQUESTS, placement=placement)
    slots = memory.slots(model.plan, model.spare, placement)
    known, directions = (len(a) for a in (made.signatures.shares, made.signatures.damping))
    how = {"known": known, "directions": directions, "arrangement": "planes", "placement": placement}
    said = shapes.state_shapes(model.plan, REQUESTS, slots=slots, **how)
    held = placed_parameters(placement, config, stacked(config, jax.tree.map(np.asarray, model.parameters)))
    whole = {name: a.shape for name, a in model.parameters.items()}
    language = LanguageModel(config=config, parameters=held, state=made)
    cache = generation._empty_cache(language, placement, REQUESTS, 32)
    pairs = [
        (made, said),
        (held, shapes.parameter_shapes(config, whole, np.float32, placement)),
        (cache, shapes.cache_shapes(config, REQUESTS, 32, np.float32, placement)),
    ]
    for there, expected in pairs:
        for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_requests_do_not_depend_on_their_neighbours(model):
    _, state = serving.init(model, REQUESTS, placement=placement_of(model, (2, 4)))
    first, second = tokens_of(10), tokens_of(11)
    second[3] = first[3]
    for a, b in zip(ran(model, state, first)[:2], ran(model, state, second)[:2]):
        np.testing.assert_array_equal(a[3], b[3])
        assert not np.array_equal(a[2], b[2])


def test_nothing_is_put_where_it_does_not_belong(model):
    """Pages that are sent come to their own device: each chunk's part is one device's."""
    placement = placement_of(model, (2, 4))
    host, state = serving.init(model, REQUESTS, placement=placement)
    plan = dataclasses.replace(model.plan, widths=model.plan.widths.copy())
    low = np.argwhere(plan.widths == plan.widths.min())[0]
    plan.widths[tuple(low)] = 4 if 4 in state.tables[1] else plan.widths.max()
    move = serving.begin(host, state, plan)
    chunks = [chunk for chunks in move.staged.chunks.values() for chunk in chunks]
    assert chunks
    owner = int(placement.owners(plan.widths.shape, 1)[low[1], low[2]])
    for chunk in chunks:
        slots = fetch(chunk.slots).reshape(8, -1)
        capacity = len(state.resident.pages[3].codes) // 8
        filled = np.flatnonzero((slots < max(len(p.codes) // 8 for p in state.resident.pages.values())).any(axis=1))
        assert set(filled) <= {owner} or capacity == 0
        if isinstance(chunk, Chunk):  # of each level the first travels
            assert all(shard.data.nbytes * 8 == chunk.codes.nbytes for shard in chunk.codes.addressable_shards)
