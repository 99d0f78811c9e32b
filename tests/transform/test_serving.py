"""Quantized models that are not ours, at run time: variants, monitors, adaptation, gradients, devices, files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import tpu as pltpu
from own_models import Model, StackedModel, batches, forward, known, nll

from dynamo_jax import transform
from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.kernels import quantized_gpu
from dynamo_jax.precision.plan import Plan
from dynamo_jax.quant.planes import dequantize, quantize
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.monitor import HOP

pytestmark = pytest.mark.usefixtures("quick_compilation")

BLOCK, GROUP = 8, 16
SETTINGS = QuantizeConfig(channel_block=BLOCK, group_size=GROUP, favour=1.0)
TEXT = jnp.asarray(np.random.default_rng(3).integers(0, 50, (3, 16)))


def random_plan(model, seed):
    plan = transform.uniform(model, 2, BLOCK, GROUP)
    (own,) = plan.plans
    shape = (*own.widths.shape[:2], own.blocks)
    widths = np.random.default_rng(seed).choice([2, 3, 4, 8], shape).astype(np.int8)
    return dataclasses.replace(plan, plans=(dataclasses.replace(own, widths=widths, apart=False),))


def at_widths(weights, widths, read):
    """Experts (.., F, D), rounded for all widths that are read of each, at the widths (.., N) of its blocks."""
    if weights.ndim > 2:
        return jnp.stack([at_widths(*each) for each in zip(weights, widths, read)])
    planes = quantize(weights, GROUP, tuple(read.ravel().tolist()))
    wide = np.repeat(widths, BLOCK)[:, None]
    return sum(jnp.where(wide == w, dequantize(planes, w).astype(jnp.bfloat16), 0) for w in (2, 3, 4, 8))


def put(experts, plan: Plan, read, layers=...):
    """The planes' values for the weights of ``experts``."""
    for name in ("gate", "up", "down"):
        own = getattr(experts, name)
        major = own[...] if name == "down" else own[...].swapaxes(-2, -1)
        value = at_widths(major, plan.widths[layers], read[layers]).astype(jnp.float32)
        own.set_value(value if name == "down" else value.swapaxes(-2, -1))


def read_of(plans):
    return np.concatenate([plan.plans[0].widths for plan in plans], axis=-1)


def with_dequantized(model, plan, plans):
    """The user's own model with the planes' values at one of the plans that it was quantized for."""
    model = nnx.clone(model)
    for layer, block in enumerate(model.blocks):
        put(block.experts, plan.plans[0], read_of(plans), layer)
    return model


@pytest.fixture(scope="module")
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def analysis(model):
    return transform.analyze(model, known(count=12), nll, SETTINGS)


@pytest.fixture
def served(model, analysis):
    """A fresh one: four requests."""
    return transform.quantize(model, transform.plan(analysis, bits=3.6), analysis, requests=4)


@nnx.jit
def step(model, tokens):
    with transform.observe(model):
        return model(tokens)


@pytest.mark.parametrize(
    "shape", [pytest.param((3, 16), marks=pytest.mark.slow), (2, 1), (1, 1)], ids=["many", "few", "one"]
)
def test_a_quantized_model_computes_with_its_dequantized_weights(model, shape):
    """Also where so few tokens come that only their own experts are unpacked."""
    plan, text = random_plan(model, 0), TEXT[: shape[0], : shape[1]]
    got = transform.quantize(model, plan)[0](text)
    np.testing.assert_allclose(got, with_dequantized(model, plan, [plan])(text), atol=3e-4)
    assert not np.allclose(got, model(text), atol=1e-2)


def test_eight_bits_that_are_read_alone_are_as_good_as_int8(model):
    quantized = transform.quantize(model, transform.uniform(model, 8, BLOCK, GROUP))[0]
    int8 = nnx.clone(model)
    for block in int8.blocks:
        for part in ("gate", "up", "down"):
            own = getattr(block.experts, part)
            axis = -1 if part == "down" else -2  # groups lie along the hidden size
            groups = jnp.moveaxis(own[...], axis, -1).reshape(-1, GROUP)
            step = jnp.abs(groups).max(axis=1, keepdims=True) / 127
            shape = jnp.moveaxis(own[...], axis, -1).shape
            own.set_value(jnp.moveaxis((jnp.round(groups / step) * step).reshape(shape), -1, axis))
    error, of_int8 = (float(jnp.linalg.norm(other(TEXT) - model(TEXT))) for other in (quantized, int8))
    assert error < 1.1 * of_int8


def test_the_users_model_and_the_rest_stay_as_they_were(model):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    quantized, _ = transform.quantize(model, random_plan(model, 0))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    rest = nnx.to_pure_dict(nnx.state(quantized, nnx.Param))
    np.testing.assert_array_equal(rest["embed"]["embedding"], before["embed"]["embedding"])
    assert "experts" not in rest["blocks"][0]
    assert quantized.blocks[0].experts.served is quantized.blocks[1].experts.served


def test_variants_of_requests_switches_and_moves_compile_nothing(model, served, compilations):
    """What a request gets is what it gets alone, bit for bit."""
    quantized, host = served
    transform.adapt(quantized, host, batches(5, 30, 50), forward)
    text = jnp.asarray(np.random.default_rng(3).integers(0, 50, (4, 16)))
    alone = []
    for variant in (0, 1):
        transform.switch(quantized, [variant] * 4)
        alone.append(np.asarray(step(quantized, text)))
    assert not np.array_equal(*alone)
    warm = batches(6, 10, 30)
    transform.adapt(quantized, host, warm, forward)
    step(quantized, text)
    with compilations() as count:
        transform.adapt(quantized, host, batches(5, 30, 50), forward)
        transform.switch(quantized, [0, 1, 1, 0])
        mixed = np.asarray(step(quantized, text))
        transform.switch(quantized, np.array(1))
        step(quantized, text)
    assert count.compiled == 0
    for request, variant in enumerate([0, 1, 1, 0]):
        np.testing.assert_array_equal(mixed[request], alone[variant][request])


@pytest.mark.slow
def test_the_monitors_see_what_the_run_time_would_be_told(served):
    """``observe`` is ``serving.observe`` of the model's own routings; steps of any length, padding left out."""
    quantized, _ = served
    state = quantized.blocks[0].experts.served.state()
    rng = np.random.default_rng(0)
    for tokens in (1, 7, HOP + 3):
        text = jnp.asarray(rng.integers(0, 50, (4, tokens)))
        mask = jnp.asarray(rng.random((4, tokens)) < 0.8)
        with transform.observe(quantized, mask):
            x = quantized.embed(text)
            routings = []
            for block in quantized.blocks:
                before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
                mixed = x + block.mix(jnp.concatenate([x, before], axis=-1))
                logits = 4 * block.router(block.norm(mixed))
                ids = jax.lax.top_k(logits, 2)[1].reshape(-1, 2)
                routings.append(serving.Routing(ids, ids, ids))
                x = block(x)
        state = serving.observe(state, routings, mask)
        mine = quantized.blocks[0].experts.served.state()
        jax.tree.map(np.testing.assert_array_equal, mine.watch, state.watch)
    assert not any(hasattr(block.experts, "tap") for block in quantized.blocks)


def test_known_text_is_known_and_other_text_is_novel_and_followed(served):
    quantized, host = served
    assert host.datasets == ("low", "high") and host.blind() is None
    rng = np.random.default_rng(8)

    def some(lows):
        return jnp.asarray(np.stack([rng.integers(low, low + width, 32) for low, width in lows]))

    for _ in range(3 * HOP // 32):
        step(quantized, some([(0, 20), (0, 20), (25, 20), (25, 20)]))
    assert np.asarray(transform.labels(quantized)).tolist() == [0, 0, 1, 1]
    for _ in range(5 * HOP // 32):
        step(quantized, some([(0, 20), (46, 4), (25, 20), (25, 20)]))
    assert np.asarray(transform.is_novel(quantized)).tolist() == [False, True, False, False]
    nnx.jit(transform.follow)(quantized)
    assert np.asarray(quantized.blocks[0].experts.served.state().number).tolist() == [0, 1, 0, 0]


def test_adaptation_brings_novel_text_nearer_to_the_users_model(model, analysis):
    quantized, host = transform.quantize(model, transform.plan(analysis, bits=3.6), analysis, spare=1.0)
    seen = batches(5, 40, 50, count=4)
    later = jnp.concatenate(batches(6, 40, 50, count=8))[:, :-1]
    transform.adapt(quantized, host, seen, forward)
    assert (host.parts[0].here.plans[1].widths != host.parts[0].here.plans[0].widths).any()
    p = jax.nn.log_softmax(model(later))
    far = []
    for variant in (0, 1):
        transform.switch(quantized, variant)
        far.append(float((jnp.exp(p) * (p - jax.nn.log_softmax(quantized(later)))).sum()))
    assert far[1] < 0.98 * far[0]


@pytest.mark.slow
def test_plans_by_hand_are_variants(model):
    plans = [random_plan(model, seed) for seed in range(3)]
    quantized, host = transform.quantize(model, plans[0], None, *plans[1:])
    for number, plan in enumerate(plans):
        transform.switch(quantized, number)
        want = with_dequantized(model, plan, plans)(TEXT)
        np.testing.assert_allclose(quantized(TEXT), want, atol=3e-4)
    transform.take(quantized, host, plans[0], 2)
    few, more = (transform.uniform(model, width, BLOCK, GROUP) for width in (3, 8))  # of other levels than the baseline
    mixed, pages = transform.quantize(model, few, None, more)
    transform.take(mixed, pages, few, 1)
    transform.take(mixed, pages, more, 1)
    transform.switch(mixed, 1)
    alone, _ = transform.quantize(model, more, None, few)
    np.testing.assert_array_equal(mixed(TEXT), alone(TEXT))
    with pytest.raises(ValueError, match=r"variant 0: those that can change are 1\.\.1"):
        transform.take(mixed, pages, more, 0)
    transform.switch(quantized, 2)
    np.testing.assert_allclose(quantized(TEXT), with_dequantized(model, plans[0], plans)(TEXT), atol=3e-4)
    assert host.parts[0].here.plans[2] is plans[0].plans[0]


@pytest.mark.slow
def test_gradients_go_through_to_what_is_around_the_experts(model):
    """As those through float experts with the same weights."""
    plans = [random_plan(model, seed) for seed in (0, 1)]
    quantized, _ = transform.quantize(model, plans[0], None, plans[1], requests=3)
    transform.switch(quantized, [0, 1, 0])
    floats = [with_dequantized(model, plan, plans) for plan in plans]

    def gradients(model, rows):
        def loss(model):
            return (model(TEXT)[rows] ** 2).sum()

        found = nnx.to_pure_dict(nnx.grad(loss)(model))
        return found["embed"], [b["router"] for b in found["blocks"].values()]

    for number, rows in ((0, np.array([0, 2])), (1, np.array([1]))):
        got, want = gradients(quantized, rows), gradients(floats[number], rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max())), got, want)


def test_gradients_by_a_kernels_planes_say_what_to_do():
    experts = transform.Experts(*(jnp.ones((2, 128, 128)) for _ in range(3)))
    tiled, _ = transform.quantize(experts, transform.uniform(experts, 4, 128, 128), arrangement="tiles")
    ids, gates = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
    with pytest.raises(ValueError, match='quantize with arrangement="planes"'):
        jax.grad(lambda x: tiled(x, ids, gates).sum())(jnp.ones((3, 128)))


def test_stacked_layers_compute_as_their_dequantized_weights(compilations):
    model = StackedModel(nnx.Rngs(0))
    plans = [random_plan(model, seed) for seed in range(2)]
    quantized, _ = transform.quantize(model, plans[0], None, plans[1])
    run = nnx.jit(forward)
    for number, plan in enumerate(plans):
        want = nnx.clone(model)
        put(want.blocks.experts, plan.plans[0], read_of(plans))
        transform.switch(quantized, number)
        np.testing.assert_allclose(run(quantized, TEXT), want(TEXT), atol=3e-4)
    with compilations() as count:
        transform.switch(quantized, 0)
        run(quantized, TEXT)
    assert count.compiled == 0


def test_batches_are_of_as_many_sequences_as_there_are_requests(served):
    quantized, _ = served
    with pytest.raises(ValueError, match=r"inputs \(3, 16, 32\) are of 3 sequences; the model serves 4 requests"):
        quantized(TEXT)
    transform.for_requests(quantized, 3)
    assert step(quantized, TEXT).shape == (3, 16, 50)
    with (
        pytest.raises(ValueError, match="the mask is float32: expected bool"),
        transform.observe(quantized, jnp.ones((3, 16))),
    ):
        quantized(TEXT)
    with pytest.raises(ValueError, match=r"48 tokens and the mask is \(3, 8\)"):
        with transform.observe(quantized, jnp.ones((3, 8), bool)):
            quantized(TEXT)


def test_a_pass_that_failed_leaves_nothing(served):
    quantized, _ = served
    transform.for_requests(quantized, 3)
    with pytest.raises(KeyError), transform.observe(quantized):
        quantized(TEXT)
        raise KeyError
    with pytest.raises(ValueError, match=r"blocks\.1\.experts: these experts were not called"):
        with transform.observe(quantized):
            quantized.blocks[0](quantized.embed(TEXT))
    step(quantized, TEXT)
    assert not any(hasattr(b.experts, "tap") or b.experts.listening for b in quantized.blocks)


def test_a_host_and_a_model_that_are_no_pair_are_refused(served, tmp_path):
    """Else pages that another plan reads would be written over."""
    quantized, host = served
    clone = nnx.clone(quantized)
    text = batches(5, 30, 50)
    for wrong in ({"batch": 0}, {"reads": float("nan")}, {"variant": 0}, {"variant": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            transform.adapt(quantized, host, text, forward, **wrong)
    transform.adapt(quantized, host, text, forward)
    for call in (
        lambda: transform.adapt(clone, host, text, forward),
        lambda: transform.save(tmp_path / "saved", clone, host),
    ):
        with pytest.raises(ValueError, match="no pair: pages were moved 0 and 1 times"):
            call()
    transform.adapt(quantized, host, text, forward, lend=True)
    transform.adapt(quantized, host, text, forward)


def test_ids_of_no_expert_add_nothing_when_quantized(model, served):
    """Whether they are -1 or past the last one, and whatever other requests run."""
    quantized, host = served
    transform.adapt(quantized, host, batches(5, 30, 50), forward)
    transform.switch(quantized, [0, 1, 0, 1])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 5, 32)), jnp.float32)
    ids, gates = jnp.asarray(rng.integers(0, 6, (4, 5, 2))), jnp.asarray(rng.random((4, 5, 2)), jnp.float32)
    experts = quantized.blocks[0].experts
    without = experts(x, ids, gates.at[:, :, 1].set(0))
    for none in (-1, 6, 99):
        np.testing.assert_array_equal(experts(x, ids.at[:, :, 1].set(none), gates), without)


class Keeping(nnx.Module):
    """Has what is no Param: a key, a tuple, an array of its own, a number."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.model = Model(rngs)
        self.rngs = nnx.Rngs(seed + 7)
        self.pair = nnx.Variable((jnp.full(2, float(seed)), jnp.zeros(3)))
        self.table = nnx.data(jnp.arange(4.0) + seed)
        self.half = nnx.Param(jnp.full(3, seed, jnp.bfloat16))

    def __call__(self, tokens):
        return self.model(tokens)


@pytest.mark.parametrize("abstract", [True, False])
def test_all_that_a_model_has_comes_back(abstract, tmp_path):
    own = Keeping(1)
    transform.save(tmp_path / "saved", *transform.quantize(own, transform.uniform(own, 4, BLOCK, GROUP)))
    other = nnx.eval_shape(lambda: Keeping(2)) if abstract else Keeping(2)
    back, _ = transform.load(tmp_path / "saved", other)
    np.testing.assert_array_equal(back.table, own.table)
    np.testing.assert_array_equal(back.pair.get_value()[0], own.pair.get_value()[0])
    assert back.half.dtype == jnp.bfloat16 and float(back.half[0]) == 1
    assert back.rngs() == own.rngs()
    assert back(TEXT).shape == (3, 16, 50)


def test_a_saved_model_comes_back_without_float_experts(served, tmp_path):
    quantized, host = served
    transform.adapt(quantized, host, batches(5, 30, 50), forward)
    folder = tmp_path / "saved"
    transform.save(folder, quantized, host)
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    again, back = transform.load(folder, abstract)
    text = jnp.asarray(np.random.default_rng(3).integers(0, 50, (4, 16)))
    for number in ([0, 0, 0, 0], [1, 0, 1, 0]):
        for each in (quantized, again):
            transform.switch(each, number)
        np.testing.assert_array_equal(step(again, text), step(quantized, text))
    assert back.datasets == host.datasets and back.blind() is None
    jax.tree.map(
        np.testing.assert_array_equal,
        back.parts[0].experts.knowledge.signatures,
        host.parts[0].experts.knowledge.signatures,
    )
    transform.adapt(again, back, batches(6, 30, 50), forward)
    with pytest.raises(ValueError, match="holds a finished result"):
        transform.save(folder, quantized, host)
    transform.save(folder, quantized, host, overwrite=True)
    with pytest.raises(ValueError, match=r"is of another model: it has experts at blocks\.0\.experts"):
        transform.load(folder, StackedModel(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"has layers, experts, channels and hidden size \(2, 6, 24, 32\) there"):
        transform.load(folder, Model(nnx.Rngs(0), blocks=((6, 16), (6, 16))))


@pytest.mark.parametrize("name", ["dynamo_jax_nnx.json", "part-000.safetensors", "state"])
def test_a_damaged_file_is_named(served, tmp_path, name):
    folder = tmp_path / "saved"
    transform.save(folder, *served)
    path = folder / name
    if path.is_dir():
        path = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=path.name):
        transform.load(folder, Model(nnx.Rngs(0)))


def test_without_an_analysis_nothing_is_watched(model):
    quantized, host = transform.quantize(model, transform.uniform(model, 3, BLOCK, GROUP), requests=3)
    assert host.datasets == () and "without an analysis" in host.blind()
    step(quantized, TEXT)
    with pytest.raises(ValueError, match="nobody watches"):
        transform.follow(quantized)
    with pytest.raises(ValueError, match="quantized without an analysis"):
        transform.adapt(quantized, host, [TEXT], forward)
    with pytest.raises(ValueError, match="no batch to adapt to"):
        transform.adapt(quantized, host, [], forward)
    with pytest.raises(ValueError, match=r"variant 2: there are 0\.\.1"):
        transform.switch(quantized, 2)
    with pytest.raises(ValueError, match=r"blocks\.0\.experts: these experts are not quantized"):
        transform.switch(model, 0)


SPLIT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from own_models import Model, forward
from dynamo_jax import transform

def made(mesh):
    model = Model(nnx.Rngs(0), blocks=((8, 24), (8, 24)))
    for block in model.blocks if mesh else ():
        for name in ("gate", "up", "down"):
            own = getattr(block.experts, name)
            own.set_value(jax.device_put(own[...], NamedSharding(mesh, P("expert"))))
    return transform.quantize(model, transform.uniform(model, 3, 8, 16))[0]

mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
split, whole = made(mesh), made(None)
served = split.blocks[0].experts.served
assert served.resident_base_codes[...].sharding.spec == P(None, "expert")
assert served.resident_base_codes[...].addressable_shards[0].data.shape[1] == 2
flat = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(split)))
specs = {".".join(map(str, path)): own.get_value() for path, own in flat}
assert specs["blocks.0.experts.served.resident_base_scales"] == P(None, "expert")
text = jnp.arange(48).reshape(3, 16)
run = nnx.jit(forward)
np.testing.assert_array_equal(run(split, text), run(whole, text))
transform.switch(split, 1)
run(split, text)
print("split")
"""


@pytest.mark.slow
def test_the_split_of_experts_over_devices_is_kept():
    """On four devices, in a process of its own, since their number is set when JAX begins."""
    tests = Path(__file__).parent.parent
    code = f"import sys; sys.path.insert(0, {str(tests)!r})" + SPLIT
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | flags)
    assert done.stdout.strip() == "split", done.stderr[-2000:]


@pytest.mark.parametrize("arrangement", ["tiles", pytest.param("fragments", marks=pytest.mark.slow)])
def test_the_kernels_of_accelerators_serve_experts_of_a_model(arrangement, monkeypatch):
    """In their interpreters: requests at mixed variants, as the path of a CPU gives them."""
    if arrangement == "fragments":
        gpu = quantized_gpu.quantized_experts_gpu
        interpreted = functools.partial(gpu, interpret=InterpretGPUParams(), blocks=2)
        monkeypatch.setattr(quantized_gpu, "quantized_experts_gpu", interpreted)
    rng = np.random.default_rng(0)
    experts = transform.Experts(*(jnp.asarray(rng.normal(size=(4, 256, 256)) * 0.06, jnp.float32) for _ in range(3)))
    plans = [transform.uniform(experts, width, 128, 128) for width in (4, 2)]
    x, gates = jnp.asarray(rng.normal(size=(2, 6, 256)), jnp.float32), jnp.asarray(rng.random((2, 6, 2)), jnp.float32)
    ids = jnp.asarray(rng.integers(-1, 4, (2, 6, 2)))
    found = {}
    for kind in ("planes", arrangement):
        served, _ = transform.quantize(experts, plans[0], None, plans[1], requests=2, arrangement=kind)
        transform.switch(served, [0, 1])
        with pltpu.force_tpu_interpret_mode() if kind == "tiles" else contextlib.nullcontext():
            found[kind] = nnx.jit(lambda m, *given: m(*given))(served, x, ids, gates)
    size = float(jnp.abs(found["planes"]).max())
    np.testing.assert_allclose(found[arrangement], found["planes"], atol=0.02 * size)
