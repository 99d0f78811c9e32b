"""The GPU kernels in Pallas' interpreter, against the XLA path; what they compile to, where JAX's CUDA plugin is."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from kernel_cases import ACTIVATIONS, Case, biases_of, compared, rows_and_sizes, widths_of
from small_decoders import decoder_config

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.kernels import arrangements, gpu_registers, quantized_gpu
from dynamo_jax.kernels.fragments import THREADS, WORDS, empty_pages, fragment_base, fragment_pages
from dynamo_jax.kernels.gpu_unpack import LAST_TWICE, Reading, last_weights, offset_word, reading, weights
from dynamo_jax.kernels.layout import LEVELS, PLANE_BITS, BasePlanes, Pages, unpack
from dynamo_jax.kernels.quantized_gpu import quantized_experts_gpu, rows_of_tile
from dynamo_jax.kernels.rows import rows_in_tiles
from dynamo_jax.models.decoder import Decoder, with_parameters
from dynamo_jax.models.experts import silu_gated
from dynamo_jax.runtime import serving

pytestmark = pytest.mark.usefixtures("quick_compilation")

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
INTERPRETED = functools.partial(quantized_experts_gpu, interpret=InterpretGPUParams(), blocks=2)
TOLERANCE = 0.01  # of the largest output: operands have eight bits


def test_fragments_hold_the_planes_bits_where_the_page_says():
    """Each plane of one expert, word by word, against the table in the module's own words."""
    rng = np.random.default_rng(0)
    hidden = 384
    codes = rng.integers(0, 256, (1, 1, 3, 128, hidden // 4)).astype(np.uint8)
    scales = rng.random((1, 1, 3, 128, hidden // 128)).astype(jnp.bfloat16)
    base = fragment_base(BasePlanes(codes, scales))
    pages = {
        level: rng.integers(0, 256, (1, 3, 128, hidden * PLANE_BITS[level] // 8)).astype(np.uint8) for level in LEVELS
    }
    ratios = rng.integers(0, 256, (1, 3, 128, hidden // 128)).astype(np.uint8)
    own = {
        level: fragment_pages(Pages(a, ratios if level == 8 else None), level, np.arange(3)[None])
        for level, a in pages.items()
    }
    q = {2: np.asarray(unpack(jnp.asarray(codes), 2))[0, 0]}
    q |= {level: np.asarray(unpack(jnp.asarray(a[0]), PLANE_BITS[level])) for level, a in pages.items()}
    words = {2: base.codes[0, 0, 0], **{level: pages.codes[0] for level, pages in own.items()}}
    words = {level: a.view(np.uint32) for level, a in words.items()}
    for projection, tile, t, i, p, e in rng.integers(0, (3, hidden // 64, THREADS, 8, 4, 2), (500, 6)):
        row = 16 * (t // 32) + 8 * (p % 2) + t % 32 // 4
        inner = 16 * i + 8 * (p // 2) + 2 * (t % 4) + e
        half, group = divmod(tile, hidden // 128)
        at = (64 * half + row, 128 * group + inner) if projection < 2 else (inner, 64 * tile + row)
        nibble = 4 * p + 16 * e
        bits = {2: 2 - 2 * (i % 2), 3: (3, 1, 2, 0)[i % 4], 4: (2, 0, 3, 1)[i % 4], 8: 0}
        for level, word, bit in ((level, i * WORDS[level] // 8, bit) for level, bit in bits.items()):
            once = min(4, WORDS[level])
            place = word // once * THREADS * once + t * once + word % once
            found = int(words[level][projection, tile, place]) >> (nibble + bit) & (2 ** PLANE_BITS[level] - 1)
            assert found == q[level][projection][at]
    for projection, channel, group in rng.integers(0, (3, 128, hidden // 128), (50, 3)):
        half, row = divmod(channel, 64)
        at = 128 * group + channel if projection == 2 else (half * (hidden // 128) + group) * 64 + row
        assert float(base.scales[0, 0, 0, projection, at]) * 8 == float(scales[0, 0, projection, channel, group])
        assert float(own[8].ratios[0, projection, at]) == ratios[0, projection, channel, group]


@pytest.mark.parametrize("apart", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_widths_variants_and_biases_at_once(apart):
    case = Case.of("fragments", 0, 2, 256, 256, apart, [widths_of(v, 2, 256, apart) for v in range(2)], shuffled=True)
    rows, sizes = rows_and_sizes(1, [5, 0, 20, 1], 256, jnp.bfloat16)
    compared(case, INTERPRETED, rows, sizes, TOLERANCE, biases_of(2, 2, 256, 256))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_is_the_kernels(activation):
    case = Case.of("fragments", 11, 1, 128, 128, False, [widths_of(0, 1, 128, False, (4,))])
    rows, sizes = rows_and_sizes(12, [6], 128, jnp.bfloat16)
    compared(case, INTERPRETED, rows, sizes, TOLERANCE, activation=ACTIVATIONS[activation])


@pytest.mark.parametrize("choices", [(2, 3, 4), pytest.param((8,), marks=pytest.mark.slow)])
def test_many_rows(choices):
    """So many that weights are scaled, not sums of them; a hidden size of an odd number of groups."""
    case = Case.of("fragments", 3, 2, 128, 384, False, [widths_of(0, 2, 128, False, choices)])
    rows, sizes = rows_and_sizes(4, [0, 131], 384, jnp.bfloat16)
    assert rows_of_tile(131, 2) == 128
    compared(case, INTERPRETED, rows, sizes, TOLERANCE)


def test_parts_of_the_channels_are_added_up():
    """With so many blocks of threads that each takes a part of the channels."""
    case = Case.of("fragments", 5, 1, 512, 256, True, [widths_of(0, 1, 512, True, (2, 3, 4))])
    rows, sizes = rows_and_sizes(6, [7], 256, jnp.bfloat16)
    compared(case, functools.partial(INTERPRETED, blocks=3), rows, sizes, TOLERANCE)


def test_levels_that_no_variant_reads_are_not_in_the_program():
    case = Case.of("fragments", 7, 1, 128, 128, False, [widths_of(0, 1, 128, False, (2,))])
    case.tables = ({},)
    rows, sizes = rows_and_sizes(8, [3], 128, jnp.bfloat16)
    compared(case, INTERPRETED, rows, sizes, TOLERANCE)


def test_a_row_does_not_depend_on_its_neighbours_and_rows_without_a_group_are_zeros():
    case = Case.of("fragments", 9, 2, 128, 128, False, [widths_of(0, 2, 128, False)])
    rows, sizes = rows_and_sizes(10, [4, 3], 128, jnp.bfloat16)
    whole = np.asarray(INTERPRETED(rows, sizes, case.arranged, case.tables, 0, silu_gated))
    poisoned = rows.at[2].set(jnp.nan).at[5].set(0)
    found = np.asarray(INTERPRETED(poisoned, jnp.asarray([4, 2]), case.arranged, case.tables, 0, silu_gated))
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    assert np.isnan(found[2].astype(np.float32)).all() and (found[5:] == 0).all()
    assert INTERPRETED(rows[:0], jnp.zeros(2, jnp.int32), case.arranged, case.tables, 0, silu_gated).shape == (0, 128)


@pytest.mark.slow
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(st.data())
def test_any_widths_and_groups(data):
    experts, variants = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    channels, hidden = 128 * data.draw(st.integers(1, 3)), 128 * data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=experts * variants, max_size=experts * variants))
    apart, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    choices = data.draw(st.sampled_from([(2, 3, 4, 8), (2, 3), (4,)]))
    widths = [widths_of(seed + v, experts, channels, apart, choices) for v in range(variants)]
    case = Case.of("fragments", seed, experts, channels, hidden, apart, widths, shuffled=True)
    if sum(sizes):
        compared(case, INTERPRETED, *rows_and_sizes(seed, sizes, hidden, jnp.bfloat16), TOLERANCE)


@pytest.mark.parametrize("sizes", [[0, 0, 5], [16, 1, 0], [33, 0, 0], [1, 1, 1]])
def test_every_row_has_one_place_in_a_tile_of_its_group(sizes):
    lie = jax.tree.map(np.asarray, rows_in_tiles(jnp.array(sizes), sum(sizes), 16))
    assert lie.used == sum(-(-size // 16) for size in sizes)
    np.testing.assert_array_equal(lie.source[lie.place], np.arange(sum(sizes)))
    assert (lie.source == sum(sizes)).sum() == len(lie.source) - sum(sizes)
    np.testing.assert_array_equal(lie.group[lie.place // 16], np.repeat(np.arange(3), sizes))


def test_what_does_not_fit_fragments_is_an_error_that_says_so(monkeypatch):
    with pytest.raises(ValueError, match="192 hidden"):
        Case.of("fragments", 0, 1, 128, 192, False, [], group_size=192)
    with pytest.raises(ValueError, match="groups of 64"):
        Case.of("fragments", 0, 1, 128, 128, False, [], group_size=64)
    case = Case.of("fragments", 0, 1, 128, 128, False, [widths_of(0, 1, 128, False)])
    with pytest.raises(ValueError, match="float32"):
        INTERPRETED(jnp.ones((1, 128)), jnp.ones(1, jnp.int32), case.arranged, case.tables, 0, silu_gated)
    with pytest.raises(ValueError, match="3 groups"):
        INTERPRETED(jnp.ones((1, 128), jnp.bfloat16), jnp.ones(3, jnp.int32), case.arranged, case.tables, 0, silu_gated)


def test_planes_are_arranged_for_the_device_that_is_there(monkeypatch):
    class Hopper:
        compute_capability = "9.0"

    class Ada:
        compute_capability = "8.9"

    sizes = [(256, 128, 128), (256, 128, 64), (192, 128, 128), (256, 64, 128)]
    assert {arrangements.arrangement_for(*s) for s in sizes} == {"planes"}
    for backend, device, first in (("tpu", None, "tiles"), ("gpu", Hopper, "fragments"), ("gpu", Ada, "planes")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert [arrangements.arrangement_for(*s) for s in sizes] == [first, "planes", "planes", "planes"]


def test_empty_pages_have_the_shape_of_pages():
    for level in LEVELS:
        codes = np.zeros((2, 3, 128, 256 * PLANE_BITS[level] // 8), np.uint8)
        ratios = np.zeros((2, 3, 128, 2), np.uint8) if level == 8 else None
        full, empty = fragment_pages(Pages(codes, ratios), level, np.arange(3)[None]), empty_pages(2, 3, level, 256)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), full) == jax.tree.map(lambda a: (a.shape, a.dtype), empty)


def test_weights_are_those_of_their_width():
    """A tile of words that are all ones: the largest weight of each width, in eighths of a step."""
    words = {level: jnp.full(WORDS[level] * THREADS, -1) for level in (2, 3, 4)}
    for width, largest in ((2, 12), (3, 14), (4, 15)):
        how: Reading = reading({3: jnp.asarray(width >= 3), 4: jnp.asarray(width >= 4)})
        tile = weights(words, how, jnp.ones(64, jnp.bfloat16), rows=True)
        assert (tile == 2 * largest - 16 + {2: 4, 3: 2, 4: 1}[width]).all()


CONFIG = decoder_config(
    vocab_size=61,
    hidden_size=128,
    intermediate_size=192,  # filled up to 256
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=2,
    num_experts_per_tok=1,
    max_position_embeddings=64,
)


def test_the_run_time_adapts_and_switches_with_planes_in_fragments(tokenizer_file, monkeypatch):
    import tokenizers

    monkeypatch.setattr(quantized_gpu, "quantized_experts_gpu", INTERPRETED)
    rng = np.random.default_rng(0)
    known = {n: " ".join(f"w{i}" for i in rng.integers(a, a + 20, 2000)) for n, a in (("low", 3), ("high", 35))}
    settings = QuantizeConfig(
        unseen_windows=0,
        bits=4.0,
        channel_block=128,
        group_size=128,
        window=64,
        calibration_windows=16,
        quantizer="rtn",
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    model = quantize(Decoder(CONFIG, rngs=nnx.Rngs(0)), tokenizer, known, settings)[0]
    tokens, windows = jnp.asarray(rng.integers(3, 61, (2, 5))), rng.integers(20, 30, (4, 65))
    found = {}
    for arrangement in ("planes", "fragments"):
        host, state = serving.init(model, requests=2, arrangement=arrangement)
        host, state = serving.adapt(model, host, state, windows)
        own = with_parameters(CONFIG, model.parameters)
        found[arrangement] = own(tokens, experts=serving.experts(serving.switch(state, [0, 1])))[0]
    size = float(jnp.abs(found["planes"]).max())
    np.testing.assert_allclose(found["planes"], found["fragments"], atol=0.02 * size)


needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins.xla_cuda13") is None if importlib.util.find_spec("jax_plugins") else True,
    reason='JAX\'s CUDA plugin is not installed: pip install "jax[cuda13]" in an environment of its own',
)


@pytest.mark.cuda
@needs_plugin
@pytest.mark.parametrize("what", ["--cases", "--model"])
def test_the_benchmarks_cases_and_a_whole_model_compile_for_an_h200(what):
    """The 8-bit plane, both kinds of pages, biases and variants; whole steps of a model."""
    command = [sys.executable, "h200.py", what]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.cuda
@needs_plugin
@pytest.mark.parametrize("tokens", [1, 64, 2048])
@pytest.mark.parametrize("layer", ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"])
def test_both_kernels_compile_for_an_h200(layer, tokens):
    """In a process of its own, since JAX reads once where its compilers write."""
    command = [sys.executable, "h200.py", "--only", layer, str(tokens)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["tiles"] in (2, 4)


class Threads:
    """Stands in for the compiler's terms in ``gpu_registers``: runs each instruction at once, for all 128 threads."""

    class ir:
        class VectorType:
            def __new__(cls, other=None):
                return object.__new__(cls) if other is None else other

            get = staticmethod(lambda shape, of: "two")

        class IntegerType:
            get_signless = staticmethod(lambda bits: bits)

        class IntegerAttr:
            get = staticmethod(lambda word, value: np.uint32(value % 2**32))

        class BF16Type:
            get = staticmethod(lambda: "bf16")

    class arith:
        constant = staticmethod(lambda word, value: value)
        andi = staticmethod(np.bitwise_and)
        shli = staticmethod(np.left_shift)
        shrui = staticmethod(np.right_shift)
        subf = staticmethod(lambda a, b: (a - b).astype(jnp.bfloat16))
        mulf = staticmethod(lambda a, b: (a * b).astype(jnp.bfloat16))

    class vector:
        extract = staticmethod(lambda register, _, at: register.parts[at[0]])
        broadcast = staticmethod(lambda _, value: np.stack([value, value], axis=-1))

    class llvm:
        @staticmethod
        def inline_asm(word, operands, text, *_, **__):
            table = int(text.removeprefix("lop3.b32 $0, $1, $2, $3, ").removesuffix(";"))
            a, b, c = operands
            found = np.zeros_like(a | b | c)
            for row in range(8):  # of the table, by the bits of the three operands
                same = [own if row >> place & 1 else ~own for own, place in ((a, 2), (b, 1), (c, 0))]
                found |= (same[0] & same[1] & same[2]) * np.uint32(table >> row & 1)
            return found

        @staticmethod
        def bitcast(_, word):
            halves = np.stack([word & np.uint32(0xFFFF), word >> np.uint32(16)], axis=-1).astype(np.uint16)
            return halves.view(jnp.bfloat16)

    class mgpu:
        class WGMMA_LAYOUT:
            registers_shape = staticmethod(lambda shape: (shape[0] * shape[1] // 256, THREADS, 2))

        class FragmentedArray:
            def __init__(self, _registers, **_):
                self.found = _registers


@pytest.mark.parametrize("rows", [None, True, False])
@pytest.mark.parametrize("last", [False, True])
def test_instructions_leave_in_each_thread_what_the_definition_says(monkeypatch, rows, last):
    rng = np.random.default_rng(0)
    for name in ("ir", "arith", "vector", "llvm", "mgpu"):
        monkeypatch.setattr(gpu_registers, name, getattr(Threads, name))
    taken = {}
    monkeypatch.setattr(gpu_registers, "_inlined", lambda run, *_: taken.setdefault("run", run))
    thread = np.arange(THREADS)

    class Held:
        """An array whose registers hold, for each thread, what its layout gives it: vectors of some parts each."""

        class Register:
            def __init__(self, parts):
                self.parts, self.type = parts, Threads.ir.VectorType()
                self.type.shape = (len(parts),)

        def __init__(self, *registers):
            self.registers = np.empty(len(registers), object)
            self.registers[:] = [self.Register(parts) for parts in registers]

    def words(level):
        flat = rng.integers(0, 2**32, WORDS[level] * THREADS, dtype=np.uint32)
        once = min(4, WORDS[level])  # words that a thread holds in one register
        return flat, Held(*flat.reshape(-1, THREADS, once).swapaxes(1, 2))

    flat, held = {}, {}
    for level in (2, 3, 4, 8):
        flat[level], held[level] = words(level)
    how = reading({3: jnp.asarray(True), 4: jnp.asarray(False)})
    scales = rng.uniform(0.5, 2, 64 if rows else 128).astype(jnp.bfloat16)
    scale_held = (
        Held(*[[scales[16 * (thread // 32) + 8 * h + thread % 32 // 4]] for h in (0, 1)]) if rows else Held(*[None] * 0)
    )
    if rows is False:  # one register of two neighbours for each eight of the inner dimension
        scale_held.registers = np.empty(16, object)
        scale_held.registers[:] = [
            np.stack([scales[8 * c + 2 * (thread % 4) + e] for e in (0, 1)], axis=-1) for c in range(16)
        ]
    twice = LAST_TWICE if last else int(how.twice)
    scalar = lambda value: Held([np.full(THREADS, value % 2**32, np.uint32)])  # noqa: E731
    scaling = () if rows is None else (scalar(offset_word(twice)), scale_held)
    own_scales = None if rows is None else jnp.asarray(scales)
    if last:
        gpu_registers.last_weights_in_registers(rows)
        found = taken["run"](None, held[8], *scaling).found
        expected = last_weights(jnp.asarray(flat[8].view(np.int32)), own_scales, bool(rows))
    else:
        gpu_registers.weights_in_registers((3, 4), rows)
        masks = [scalar(int(how.masks[level])) for level in (3, 4)]
        found = taken["run"](None, held[2], held[3], held[4], *masks, *scaling).found
        planes = {level: jnp.asarray(flat[level].view(np.int32)) for level in (2, 3, 4)}
        expected = weights(planes, how, own_scales, bool(rows))
    expected = np.asarray(expected)
    for register in range(32):  # as the instruction set has them: 64 x 16 a product, four registers of two numbers
        i, p = divmod(register, 4)
        row = 16 * (thread // 32) + 8 * (p % 2) + thread % 32 // 4
        for e in (0, 1):
            inner = 16 * i + 8 * (p // 2) + 2 * (thread % 4) + e
            np.testing.assert_array_equal(
                found[register][:, e].astype(np.float32), expected[row, inner].astype(np.float32)
            )
