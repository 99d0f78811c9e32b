"""The functional run time: inside jit and scan, across requests, with adaptation between two steps."""

from __future__ import annotations

import dataclasses
import functools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_decoders import decoder_config

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.kernels.layout import LEVELS
from dynamo_jax.models.decoder import Decoder, with_parameters
from dynamo_jax.models.experts import ExpertForm
from dynamo_jax.models.routing import Routing
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.adapt import observe_windows
from dynamo_jax.runtime.monitor import HOP, UNKNOWN
from dynamo_jax.runtime.residency import residency, table_of
from dynamo_jax.runtime.store import page_counts, pages_of
from dynamo_jax.runtime.switch import switched_experts

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = decoder_config(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    norm_topk_prob=True,
    initializer_range=0.1,
)
SETTINGS = QuantizeConfig(
    unseen_windows=0,
    bits=3.5,
    channel_block=8,
    group_size=32,
    window=64,
    calibration_windows=16,
    quantizer="rtn",
    spare=0.5,
)


@pytest.fixture(scope="module")
def model(tokenizer_file):
    import tokenizers

    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    texts = {"low": rng.integers(3, 20, 2000), "high": rng.integers(30, 61, 2000)}
    known = {name: " ".join(f"w{i}" for i in ids) for name, ids in texts.items()}
    return quantize(decoder, tokenizers.Tokenizer.from_file(str(tokenizer_file)), known, SETTINGS)[0]


@functools.partial(jax.jit, static_argnames="config")
def step(config, params, state, tokens, mask):
    """What a user writes: logits, and the state with what the router did."""
    logits, routings = with_parameters(config, params)(tokens, mask, experts=serving.experts(state))
    return logits, serving.observe(state, routings, mask)


def two_bits(host):
    """A plan of no pages."""
    return dataclasses.replace(host.plans[0], widths=np.full_like(host.plans[0].widths, 2))


def routings_of(chosen):
    return [Routing(None, jnp.asarray(own), None) for own in chosen]


def tokens_of(seed, requests=2, length=40, low=3, high=61):
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, (requests, length)))


def run(model, state, tokens, mask=None):
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    return step(model.config, model.parameters, state, tokens, mask)


def test_switching_and_adapting_between_steps_compiles_nothing(model, compilations):
    host, state = serving.init(model, requests=2)
    windows = np.asarray(tokens_of(1, 4, 65, 20, 30))
    host, state = serving.adapt(model, host, state, windows)
    tokens = tokens_of(0)
    first, _ = run(model, serving.switch(state, 0), tokens)
    with compilations() as count:
        state = serving.switch(state, 1)
        adapted, state = run(model, state, tokens)
        state = serving.switch(state, [0, 1])
        mixed, state = run(model, state, tokens)
    assert count.compiled == 0
    np.testing.assert_array_equal(mixed[0], first[0])
    np.testing.assert_array_equal(mixed[1], adapted[1])
    assert not np.allclose(first[1], adapted[1], atol=1e-4)


def test_divergence_is_how_far_a_variant_is_from_what_8_bits_predict(model):
    windows = np.asarray(tokens_of(1, 3, 65, 20, 30))
    seen = observe_windows(model, windows)
    host, state = serving.adapt(model, *serving.init(model), windows)
    decoder = with_parameters(model.config, model.device_parameters())

    @jax.jit
    def log_p(resident, tables, number):
        experts = switched_experts(resident, tables, number)
        return jax.nn.log_softmax(decoder(jnp.asarray(windows[:, :-1]), experts=experts)[0])

    best = dataclasses.replace(model.plan, widths=np.full_like(model.plan.widths, 8))
    eight = residency(host.pages, [best])
    exact = log_p(eight.resident, (table_of(eight, best),), jnp.zeros((), jnp.int32))
    at = [log_p(state.resident, state.tables, jnp.asarray(number)) for number in (0, 1)]
    found = [float((jnp.exp(exact) * (exact - own)).sum(axis=-1).mean()) for own in at]
    assert min(found) > 0 and abs(found[0] - found[1]) > 1e-4
    for number, mean in enumerate(found):
        each = serving.divergence(model, state, windows, seen, number)
        assert each.shape == (3,) and each.sum() / windows[:, 1:].size == pytest.approx(mean, abs=1e-5)


def test_adaptation_stays_in_the_page_budget_and_leaves_the_baseline_as_it_was(model):
    counts = page_counts(model.plan)
    slots = {level: count + 2 for level, count in counts.items()}
    host, state = serving.init(model, slots=slots)
    tokens = tokens_of(0, 1)
    before, _ = run(model, state, tokens)
    for seed in range(3):
        host, state = serving.adapt(model, host, state, np.asarray(tokens_of(seed, 4, 65, 20, 30)))
        new = host.plans[1].page_widths()
        for level in LEVELS:
            assert state.resident.pages[level].codes.shape[0] == slots[level]
            assert ((new >= level) & (model.plan.page_widths() < level)).sum() <= 2
            assert (new >= level).sum() <= slots[level]
    after, _ = run(model, serving.switch(state, 0), tokens)
    np.testing.assert_array_equal(before, after)


def test_without_a_spare_page_nothing_can_move_and_the_baseline_is_all_there_is(model):
    host, state = serving.init(model, slots=page_counts(model.plan))
    host, state = serving.adapt(model, host, state, np.asarray(tokens_of(2, 4, 65, 20, 30)))
    assert (host.plans[1].page_widths() <= model.plan.page_widths()).all()
    with pytest.raises(ValueError, match="slots are free"):
        serving.init(model, slots={level: 0 for level in LEVELS})


def test_a_damaged_page_stops_the_adaptation_and_the_baseline_serves_on(model):
    damaged = dataclasses.replace(model, store=jax.tree.map(np.array, model.store))
    host, state = serving.init(damaged)
    tokens = tokens_of(0, 1)
    before, _ = run(model, state, tokens)
    for codes in damaged.store.codes.values():
        codes[...] ^= 1
    plan = dataclasses.replace(model.plan, widths=model.plan.widths[:, ::-1])
    host_pages = dataclasses.replace(host.pages, planes=damaged.store)
    with pytest.raises(ValueError, match="is damaged in host memory"):
        serving.begin(dataclasses.replace(host, pages=host_pages), state, plan)
    np.testing.assert_array_equal(run(model, state, tokens)[0], before)


def test_the_monitor_counts_what_a_request_routed_and_not_its_padding(model):
    _, state = serving.init(model, requests=2)
    tokens = tokens_of(3, 2, 48)
    mask = jnp.arange(48)[None] >= jnp.asarray([[0], [17]])
    _, after = run(model, state, tokens, mask)
    assert after.watch.newer_tokens.tolist() == [48, 31]
    np.testing.assert_array_equal(after.watch.newer.sum(axis=2), [[96, 96], [62, 62]])
    _, alone = serving.init(model, requests=1)
    _, alone = run(model, alone, tokens[1:, 17:])
    np.testing.assert_array_equal(after.watch.newer[1], alone.watch.newer[0])


@pytest.mark.parametrize("length", [HOP - 1, HOP, 2 * HOP, 2 * HOP + 1, 3 * HOP + 5])
def test_a_long_prompt_is_watched_in_pieces(model, length):
    _, state = serving.init(model)
    tokens = tokens_of(4, 1, length, 3, 20)
    _, after = run(model, state, tokens)
    assert int(after.watch.decisions[0]) == max(0, length // HOP - 1)
    assert (int(after.watch.label[0]) == UNKNOWN) == (length < 2 * HOP)


def ragged(lengths, bucket, seed=0):
    """Tokens of requests of different lengths, mixed, with padding between: which request each is of."""
    own = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)] + [np.full(bucket - sum(lengths), -1)])
    return np.random.default_rng(seed).permutation(own)


def of_ragged(values, request_of, request):
    return np.asarray(values)[np.asarray(request_of) == request]


@pytest.mark.parametrize(("lengths", "top_k"), [((1, 1, 0, 0), 1), ((40, 7, 0, 65), 2)])
def test_tokens_of_ragged_requests_get_what_each_request_gets_alone(model, lengths, top_k):
    """Whatever order they lie in, with padding between that holds no numbers: few rows and many."""
    host, state = serving.init(model, requests=4)
    host, state = serving.finish(host, state, serving.begin(host, state, two_bits(host)))
    state = serving.switch(state, [0, 1, 0, 1])
    request_of = ragged(lengths, sum(lengths) + 1)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(len(request_of), 64)).astype(np.float32)
    x[request_of < 0] = np.nan
    chosen = np.stack([rng.permutation(6)[:top_k] for _ in request_of])
    gates = rng.uniform(size=chosen.shape).astype(np.float32)
    gates[request_of < 0] = np.nan

    @jax.jit
    def run(state, x, chosen, gates, request_of=None):
        experts = serving.experts(state, request_of=request_of)
        return experts(0, x, Routing(None, chosen, gates), None, ExpertForm(lambda gate, up: nnx.silu(gate) * up))[0]

    with jax.default_matmul_precision("highest"):
        both = run(state, x, chosen, gates, jnp.asarray(request_of))
        assert (of_ragged(both, request_of, -1) == 0).all()
        for request, length in enumerate(lengths):
            if length:
                own = (of_ragged(values, request_of, request) for values in (x, chosen, gates))
                alone = serving.for_requests(state, 1)
                alone = serving.switch(alone, int(state.number[request]))
                want = run(alone, *own)
                np.testing.assert_allclose(of_ragged(both, request_of, request), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [(1, 0, 1), (HOP - 1, 1, 0), (3 * HOP + 5, 2, HOP)])
def test_monitors_of_ragged_requests_see_what_each_request_routed(model, lengths):
    """Each monitor as if its request had been alone; and twice, so that a hop goes on from step to step."""
    _, state = serving.init(model, requests=3)
    alone = [serving.init(model, requests=1)[1] for _ in lengths]
    for seed in range(2):
        request_of = ragged(lengths, sum(lengths) + 3, seed)
        chosen = np.random.default_rng(seed).integers(0, 6, (2, len(request_of), 2))
        state = serving.observe(state, routings_of(chosen), request_of=jnp.asarray(request_of))
        for request, length in enumerate(lengths):
            if length:
                own = routings_of(chosen[:, request_of == request])
                alone[request] = serving.observe(alone[request], own)
    for field, values in state.watch._asdict().items():
        for request, one in enumerate(alone):
            np.testing.assert_array_equal(values[request], getattr(one.watch, field)[0], field)


def test_another_request_begins_in_the_place_of_one_that_has_ended(model):
    _, state = serving.init(model, requests=3)
    _, seen = run(model, serving.switch(state, [1, 1, 0]), tokens_of(6, 3, 2 * HOP + 9))
    ended = np.array([False, True, True])
    for after in (serving.renew(seen, ended), jax.jit(serving.renew)(seen, ended)):
        assert after.number.tolist() == [1, 0, 0]
        for now, before, new in zip(after.watch, seen.watch, state.watch):
            np.testing.assert_array_equal(now, np.concatenate([before[:1], new[1:]]))
    nobody = serving.renew(seen._replace(watch=None), ended)
    assert nobody.watch is None and nobody.number.tolist() == [1, 0, 0]
    for wrong in ([True], [1, 0, 0], np.zeros((3, 1), bool)):
        with pytest.raises(ValueError, match="expected a truth value for each of 3 requests"):
            serving.renew(seen, wrong)


def test_a_state_can_be_given_away(model):
    """Donated to a step that hands it back; what the model and another state know is not touched."""
    host, state = serving.init(model, requests=2)
    _, other = serving.init(model, requests=2)
    donating = jax.jit(step.__wrapped__, static_argnums=0, donate_argnums=2)
    want, _ = run(model, other, tokens_of(7))
    for _ in range(2):
        got, state = donating(model.config, model.parameters, state, tokens_of(7), jnp.ones((2, 40), bool))
        np.testing.assert_array_equal(got, want)
    _, state = serving.adapt(model, host, state, np.asarray(tokens_of(8, 4, 65)))
    got, _ = donating(model.config, model.parameters, state, tokens_of(7), jnp.ones((2, 40), bool))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(run(model, other, tokens_of(7))[0], want)


def test_a_scan_of_steps_follows_the_text(model):
    """Known text keeps the baseline, novel text gets variant 1: in one compiled loop."""
    _, state = serving.init(model)
    state = state._replace(signatures=state.signatures._replace(limit=jnp.full(2, 4.0)))

    def one(state, tokens):
        decoder = with_parameters(model.config, model.parameters)
        _, routings = decoder.hidden_states(tokens, experts=serving.experts(state))
        state = serving.follow(serving.observe(state, routings))
        return state, (state.watch.label[0], state.number[0], state.watch.score[0])

    known = tokens_of(5, 12, 64, 3, 20)
    novel = jnp.broadcast_to(jnp.asarray([25]), (12, 64))
    both = jnp.concatenate([known, novel])[:, None]
    _, (labels, numbers, scores) = jax.jit(lambda s, t: jax.lax.scan(one, s, t))(state, both)
    assert labels[4:12].tolist() == [0] * 8 and numbers[4:12].tolist() == [0] * 8
    assert labels[-6:].tolist() == [2] * 6 and numbers[-6:].tolist() == [1] * 6
    assert (scores[-4:] > 1).all()


def test_pages_travel_while_steps_go_on(model):
    host, state = serving.init(model)
    plan = dataclasses.replace(model.plan, widths=model.plan.widths[:, ::-1])
    host, state = serving.init(model, slots={n: 2 * c for n, c in page_counts(model.plan).items()})
    tokens = tokens_of(0, 1)
    move = serving.begin(host, state, plan)
    before, state = run(model, state, tokens)
    host, state = serving.finish(host, state, move)
    assert host.plans[1] is plan and host.plans[0] is model.plan
    np.testing.assert_array_equal(run(model, state, tokens)[0], before)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_only_variants_that_are_there_can_change_and_the_baseline_never(model, number):
    host, state = serving.init(model)
    with pytest.raises(ValueError, match=rf"variant {number}: those that can change are 1\.\.1"):
        serving.begin(host, state, dataclasses.replace(model.plan), number)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="0 requests"):
        serving.init(model, requests=0)
    host, state = serving.init(model)
    with pytest.raises(ValueError, match="no tokens to adapt to: 0 windows of 65 tokens"):
        serving.adapt(model, host, state, np.zeros((0, 65), np.int32))
    with pytest.raises(ValueError, match="routings of 0 layers; the monitor knows 2"):
        serving.observe(state, [])
    host, state = serving.adapt(model, host, state, np.full((1, 17), 7))  # 16 tokens, all the same
    assert host.plans[1].stored_bytes() <= model.plan.stored_bytes()
    assert serving.switch(state, jnp.asarray(9)).number.tolist() == [1]  # a jitted step cannot look at it
    with pytest.raises(ValueError, match="arrangement 'x': known are"):
        serving.init(model, arrangement="x")
    with pytest.raises(ValueError, match="0 requests"):
        serving.for_requests(state, 0)


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (np.full((1, 9), 61), "token ids 61 to 61: the model has 0 to 60"),
        (np.full((1, 9), -1), "token ids -1 to -1"),
        (np.full((1, 9), 2**40), "token ids"),
        (np.full((1, 9), 7.0), "windows are float64"),
        (np.full((1, 9), True), "windows are bool"),
        (np.full(9, 7), r"of the shape \(9,\)"),
        (np.full((1, 2, 9), 7), r"of the shape \(1, 2, 9\)"),
        (np.full((1, 514), 7), "windows of 513 tokens: the model has 512 positions"),
        ([], "windows are"),
        ([[1, 2], [3]], "windows|inhomogeneous"),
        (None, "windows are object"),
    ],
)
def test_windows_that_cannot_be_are_named(model, windows, said):
    host, state = serving.init(model)
    with pytest.raises(ValueError, match=said):
        serving.adapt(model, host, state, windows)


@pytest.mark.parametrize("number", [2, -1, [0, 2], [0], [0, 0, 0], 0.5, float("nan"), [0.0, 1.0], True, None, "1", []])
def test_variants_that_cannot_be_are_named(model, number):
    _, state = serving.init(model, requests=2)
    with pytest.raises(ValueError, match="variant"):
        serving.switch(state, number)


def test_a_plan_of_another_model_is_refused(model):
    host, state = serving.init(model)
    fewer = dataclasses.replace(model.plan, widths=model.plan.widths[:1])
    coarser = dataclasses.replace(model.plan, group_size=16)
    for plan, said in ((fewer, "widths"), (coarser, "group_size 16, the model's baseline 32")):
        with pytest.raises(ValueError, match=said):
            serving.begin(host, state, plan)


def test_variants_share_the_spare_slots_and_moves_do_not_cross(model):
    host, state = serving.init(model, variants=3)
    free = serving.spare(host, state)
    host, state = serving.adapt(model, host, state, np.asarray(tokens_of(7, 4, 65, 20, 30)), variant=1)
    left = serving.spare(host, state, variant=2)
    new = {n: int(((host.plans[1].page_widths() >= n) & (model.plan.page_widths() < n)).sum()) for n in LEVELS}
    assert left == {level: free[level] - new[level] for level in LEVELS} and sum(new.values()) > 0
    early = serving.begin(host, state, model.plan, variant=2)
    host, state = serving.adapt(model, host, state, np.asarray(tokens_of(8, 4, 65, 40, 50)), variant=2)
    with pytest.raises(ValueError, match="pages were moved since this move began"):
        serving.finish(host, state, early)
    first, state = run(model, serving.switch(state, 1), tokens_of(0, 1))
    second, _ = run(model, serving.switch(state, 2), tokens_of(0, 1))
    assert not np.allclose(first, second, atol=1e-4)


def test_a_level_that_the_baseline_does_not_read_is_refused_before_anything_moves(model):
    low = dataclasses.replace(model.plan, widths=np.minimum(model.plan.widths, 3))
    host, state = serving.init(dataclasses.replace(model, plan=low), slots={3: page_counts(low)[3], 4: 4, 8: 4})
    plan = dataclasses.replace(low, widths=low.widths.copy())
    plan.widths[0, 0, 0] = 4
    with pytest.raises(ValueError, match="reads pages of 4 bits, which the program of variant 1 does not read"):
        serving.begin(host, state, plan)


def test_requests_may_be_sharded_over_devices(model):
    """One device in most test runs; JAX_NUM_CPU_DEVICES=2 gives two."""
    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("requests",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, own = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("requests")
    _, state = serving.init(model, requests=2 * count)
    state = serving.switch(state, [0, 1] * count)
    tokens = tokens_of(6, 2 * count)

    def local(params, state, tokens):
        logits, routings = with_parameters(model.config, params)(tokens, experts=serving.experts(state))
        return logits, serving.observe(state, routings).watch

    specs = serving.State(whole, whole, own, whole, own)
    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(whole, specs, own), out_specs=(own, own), check_vma=False)
    )
    logits, watch = sharded(model.parameters, state, tokens)
    expected, after = run(model, state, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for one, two in zip(watch, after.watch):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_the_baseline_lends_its_slots_and_gets_them_back(model):
    """While nobody needs it: more pages move than there are spare slots, what is left of it is valid, and once they
    are back it computes the same bits."""
    host, state = serving.init(dataclasses.replace(model, spare=0.0), requests=2)
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8) + 30
    mask = jnp.ones((2, 8), bool)
    params = model.device_parameters()
    before, _ = step(CONFIG, params, state, tokens, mask)
    windows = np.random.default_rng(1).integers(30, 61, (4, 65))
    assert (adapted_without(model, windows) == host.plans[0].widths).all()
    host, state = serving.adapt(model, host, state, windows, lend=True)
    assert serving.lent(host) and not (host.plans[1].widths == host.plans[0].widths).all()
    assert host.plans[0] is model.plan
    for number in (0, 1):
        out, _ = step(CONFIG, params, serving.switch(state, number), tokens, mask)
        assert np.isfinite(np.asarray(out)).all()
        assert not (np.asarray(out) == np.asarray(before)).all()
    compiled = step._cache_size()
    host, state = serving.whole(host, state)
    assert not serving.lent(host)
    after, _ = step(CONFIG, params, state, tokens, mask)
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    again = serving.whole(host, state)
    assert again[0] is host and again[1] is state
    assert step._cache_size() == compiled


def adapted_without(model, windows):
    """The widths of the variant that is adapted without spare slots and without lending."""
    host, state = serving.init(dataclasses.replace(model, spare=0.0))
    return serving.adapt(model, host, state, windows)[0].plans[1].widths


def test_a_damaged_page_is_found_before_the_baseline_has_lent_anything(model):
    host, state = serving.init(dataclasses.replace(model, spare=0.0))
    windows = np.random.default_rng(1).integers(30, 61, (4, 65))
    plan = serving.adapted(model, host, state, observe_windows(model, windows), lend=True)
    level = next(level for level, has in pages_of(plan).items() if (has & (host.slots[level] < 0)).any())
    place = tuple(np.argwhere(pages_of(plan)[level] & (host.slots[level] < 0))[0])
    sums = {k: v.copy() for k, v in host.pages.checksums.items()}
    sums[level][place] += 1
    broken = dataclasses.replace(host, pages=dataclasses.replace(host.pages, checksums=sums))
    with pytest.raises(ValueError, match=f"the {level}-bit page of layer {place[0]}, expert {place[1]}"):
        serving.begin(broken, state, plan, lend=True)
    assert not serving.lent(host)


@pytest.mark.slow
def test_a_soak_of_switches_and_adaptations_on_damaged_memory(model, compilations):
    """100,000 switches and 300 adaptations of one state, while bits of random pages are wrong in host memory: what it
    computes is what a fresh state computes, it takes no more memory, and nothing compiles."""
    served = dataclasses.replace(model, store=jax.tree.map(np.array, model.store))
    rng = np.random.default_rng(seed := np.random.SeedSequence().entropy)
    host, state = serving.init(served, requests=2)
    tokens, windows = tokens_of(0), [np.asarray(tokens_of(n, 2, 33, *sorted(rng.choice(58, 2) + 3))) for n in range(9)]
    refused = lends = 0

    def adapt(host, state):
        nonlocal refused, lends
        codes = served.store.codes[int(rng.choice(LEVELS))].reshape(-1)
        at, bit = rng.choice(codes.size, rng.integers(20, 100), replace=False), np.uint8(1 << rng.integers(8))
        codes[at] ^= bit
        lend = bool(rng.integers(2))
        try:
            host, state = serving.adapt(served, host, state, windows[rng.integers(9)], lend=lend)
            lends += serving.lent(host)
        except ValueError as error:
            assert "is damaged in host memory" in str(error)
            refused += 1
        codes[at] ^= bit
        return serving.whole(host, state)

    def compare(host, state):
        fresh_host, fresh = serving.init(model, requests=2)
        if all((host.slots[level] >= 0)[has].all() for level, has in pages_of(host.plans[1]).items()):
            fresh_host, fresh = serving.finish(fresh_host, fresh, serving.begin(fresh_host, fresh, host.plans[1]))
        else:  # what the variant gave back to the baseline it is read without
            fresh = serving.switch(fresh, 0)
            state = serving.switch(state, 0)
        ours, theirs = run(model, state, tokens)[0], run(model, fresh._replace(number=state.number), tokens)[0]
        np.testing.assert_array_equal(ours, theirs, err_msg=f"seed {seed}")
        return serving.switch(state, 0)

    for _ in range(10):
        host, state = adapt(host, state)
    state = compare(host, state)
    run(model, state, tokens)
    arrays, memory = len(jax.live_arrays()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with compilations() as count:
        for number in range(1, 100_001):
            state = serving.switch(state, rng.integers(2, size=2) if number % 3 else int(rng.integers(2)))
            if number % 333 == 0:
                host, state = adapt(host, state)
            if number % 100 == 0:
                state = compare(host, state)
    assert count.compiled == 0
    assert refused > 10 and lends > 10, (
        f"seed {seed}: {refused} damaged pages were met, the baseline lent {lends} times"
    )
    assert len(jax.live_arrays()) == arrays
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 64 * 1024
