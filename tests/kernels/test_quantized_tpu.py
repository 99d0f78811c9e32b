"""The TPU kernel in the interpreter, against the XLA path and floats."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from flax import nnx
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import ACTIVATIONS, Case, biases_of, rows_and_sizes, widths_of
from small_decoders import decoder_config

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.calibration.pipeline import quantize
from dynamo_jax.generation import quantized_language_model
from dynamo_jax.kernels.layout import LEVELS, PLANE_BITS, BasePlanes, Pages, unpack
from dynamo_jax.kernels.quantized_tpu import pages_read, quantized_experts_tpu, tokens_through_experts
from dynamo_jax.kernels.rows import combine_rows, gather_rows, sort_by_expert
from dynamo_jax.kernels.tiles import TILE, empty_pages, tiled_base, tiled_pages
from dynamo_jax.kernels.tpu_products import FORMS
from dynamo_jax.kernels.tpu_rows import rows_of_words, sublanes_of, words_of
from dynamo_jax.kernels.tpu_steps import (
    Core,
    Shape,
    blocks_of_step,
    core,
    in_one,
    parts_of,
    reads_of,
    rows_of_tile,
    sizes_of_reads,
    tiles_of,
)
from dynamo_jax.models.bundled import BUNDLED
from dynamo_jax.models.decoder import Decoder, with_parameters
from dynamo_jax.models.experts import silu_gated
from dynamo_jax.models.stacked import is_stacked
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.runtime import serving
from dynamo_jax.runtime.generate import GenerateConfig, generate

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = {"bf16": 0.01, "int8": 0.04, "fp8": 0.08}  # of the largest output: operands have 8, about 6 and 4 bits
CHECKED = pltpu.InterpretParams(detect_races=True)
TO_TILES = QuantizeConfig(
    unseen_windows=0,
    bits=4.0,
    channel_block=128,
    group_size=256,
    window=64,
    calibration_windows=16,
    quantizer="rtn",
)


def compared(case, rows, sizes, biases=None, layer=1, tolerance=0.01, activation=silu_gated, **how):
    kernel = functools.partial(quantized_experts_tpu, **({"interpret": pltpu.InterpretParams()} | how))
    found = kernel_cases.compared(case, kernel, rows, sizes, tolerance, biases, layer, activation)
    assert how.get("interpret") is not CHECKED or not interpret_pallas_call.races.races_found
    return found


def test_tiles_hold_the_planes_bits_where_the_page_says():
    """Each plane of one expert, word by word, against the table in the module's own words."""
    rng = np.random.default_rng(0)
    hidden, groups = 3 * TILE, 3
    codes = rng.integers(0, 256, (1, 1, 3, TILE, hidden // 4)).astype(np.uint8)
    scales = rng.random((1, 1, 3, TILE, groups)).astype(jnp.bfloat16)
    base = tiled_base(BasePlanes(codes, scales))
    q2 = np.asarray(unpack(jnp.asarray(codes), 2))[0, 0]
    np.testing.assert_array_equal(
        base.scales[0, 0, 0].astype(np.float32) * 4, scales[0, 0].astype(np.float32).swapaxes(1, 2)
    )
    pages = {
        level: rng.integers(0, 256, (1, 3, TILE, hidden * PLANE_BITS[level] // 8)).astype(np.uint8) for level in LEVELS
    }
    ratios = rng.integers(0, 256, (1, 3, TILE, groups)).astype(np.uint8)
    tiles = {
        level: tiled_pages(Pages(a, ratios if level == 8 else None), level, np.arange(3)[None])
        for level, a in pages.items()
    }
    np.testing.assert_array_equal(tiles[8].ratios[0], ratios[0].swapaxes(1, 2))
    q = {level: np.asarray(unpack(jnp.asarray(a[0]), PLANE_BITS[level])) for level, a in pages.items()}
    for projection, group, row, lane in rng.integers(0, (3, groups, TILE, TILE), (500, 4)):
        at = (lane, group * TILE + row) if projection < 2 else (row, group * TILE + lane)

        def bits(words, index, shift, count=1, lane=lane):
            return int(words.view(np.uint32)[index, lane]) >> shift & (2**count - 1)

        part, word, i = row // 64, row % 64 // 8, row % 8
        found = bits(base.codes[0, 0, 0, projection, group], word, 4 * i + 2 * part, 2)
        assert found ^ 2 == q2[projection][at]
        for level in (3, 4):
            words = tiles[level].codes[0, projection, group // 2]
            assert bits(words, word, 4 * i + 2 * part + group % 2) == q[level][projection][at]
        assert bits(tiles[8].codes[0, projection, group], row // 8, 4 * i, 4) ^ 8 == q[8][projection][at]


@pytest.mark.parametrize(
    ("form", "apart"), [("bf16", True), ("int8", False), pytest.param("fp8", True, marks=pytest.mark.slow)]
)
def test_all_widths_variants_and_biases_at_once(form, apart):
    """With the interpreter's look for races between copies and their readers."""
    case = Case.of("tiles", 0, 3, 256, 384, apart, [widths_of(v, 3, 256, apart) for v in range(2)])
    rows, sizes = rows_and_sizes(1, [5, 0, 9, 1, 20, 0], 384)
    biases = biases_of(2, 3, 256, 384)
    compared(case, rows, sizes, biases, form=form, tolerance=TOLERANCE[form], interpret=CHECKED)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_is_the_kernels(activation):
    case = Case.of("tiles", 11, 1, 128, 128, False, [widths_of(0, 1, 128, False, (4,))])
    rows, sizes = rows_and_sizes(12, [6], 128)
    compared(case, rows, sizes, form="bf16", tolerance=TOLERANCE["bf16"], activation=ACTIVATIONS[activation])


@pytest.mark.parametrize(
    ("form", "hidden", "group_size", "tile_rows"),
    [
        ("fp8", 512, 256, None),
        pytest.param("bf16", 768, 384, 128, marks=pytest.mark.slow),
        pytest.param("int8", 384, 384, 8, marks=pytest.mark.slow),
        pytest.param("bf16", 512, 512, None, marks=pytest.mark.slow),
    ],
)
def test_groups_longer_than_a_tile_have_one_scale(form, hidden, group_size, tile_rows):
    """Stored once, and multiplied in one product; the whole hidden size too."""
    widths = [widths_of(v, 2, 256, True) for v in range(2)]
    case = Case.of("tiles", 16, 2, 256, hidden, True, widths, group_size=group_size)
    assert case.arranged.base.scales.shape[-2:] == (hidden // group_size, TILE)
    assert case.arranged.pages[8].ratios.size == case.resident.pages[8].ratios.size
    rows, sizes = rows_and_sizes(17, [5, 0, 9, 1], hidden)
    compared(case, rows, sizes, form=form, tile_rows=tile_rows, tolerance=TOLERANCE[form], interpret=CHECKED)


@pytest.mark.slow
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    sizes=st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any),
    all_blocks=st.sampled_from([3, 5, 7]),
    widths=st.lists(st.sampled_from([2, 3, 4, 8]), min_size=28, max_size=28),
    form=st.sampled_from(["bf16", "int8"]),
    blocks=st.sampled_from([None, 1, 2, 3]),
    tile_rows=st.sampled_from([None, 8, 16, 128]),
    shuffled=st.booleans(),
)
def test_any_widths_groups_and_tiling(sizes, all_blocks, widths, form, blocks, tile_rows, shuffled):
    """Numbers of blocks that two or three a step do not divide; pages in order and anywhere."""
    each = np.broadcast_to(np.array(widths[: 4 * all_blocks]).reshape(1, 4, all_blocks), (2, 4, all_blocks))
    case = Case.of("tiles", 3, 4, 128 * all_blocks, 128, False, [each], shuffled=shuffled)
    rows, sizes = rows_and_sizes(4, sizes, 128)
    compared(case, rows, sizes, layer=0, form=form, blocks=blocks, tile_rows=tile_rows, tolerance=TOLERANCE[form])


@pytest.mark.parametrize(
    ("form", "apart", "channels", "blocks", "tile_rows", "variants", "shuffled"),
    [
        ("int8", False, 640, 2, None, 2, True),
        pytest.param("fp8", False, 640, 2, None, 1, False, marks=pytest.mark.slow),
        pytest.param("bf16", True, 384, 2, None, 1, True, marks=pytest.mark.slow),
        pytest.param("fp8", False, 384, 9, 8, 1, True, marks=pytest.mark.slow),
        ("bf16", True, 384, 2, 128, 2, True),
        pytest.param("bf16", True, 640, 2, 128, 1, False, marks=pytest.mark.slow),
    ],
)
def test_blocks_that_do_not_divide(form, apart, channels, blocks, tile_rows, variants, shuffled):
    """Three blocks an expert: two a step, or three (no step has more), of which down has a part of one block; or five,
    two a step, so that what the step before had is not copied again. Pages in any order, and in runs."""
    widths = [widths_of(v, 2, channels, apart, (2, 3, 4, 8) if shuffled else (8,)) for v in range(variants)]
    case = Case.of("tiles", 11, 2, channels, 128, apart, widths, shuffled=shuffled)
    rows, sizes = rows_and_sizes(12, [3, 9, 4, 1][: 2 * variants], 128)
    how = {"form": form, "blocks": blocks, "tile_rows": tile_rows, "tolerance": TOLERANCE[form], "interpret": CHECKED}
    compared(case, rows, sizes, biases_of(13, 2, channels, 128), **how)


def test_each_step_reads_its_own_pages():
    """All pages of all levels, in every step of several tiles: those of the next step come while this one runs."""
    case = Case.of("tiles", 14, 2, 256, 256, True, [np.full((2, 2, 4), 8)])
    rows, sizes = rows_and_sizes(15, [17, 9], 256)
    compared(case, rows, sizes, blocks=1, tile_rows=8, interpret=CHECKED)


def test_many_rows_need_no_more_scalars():
    """What a kernel reads is of experts and steps; only what is of each tile is as much as the rows."""
    sizes = [4096 * 8, 0]
    tiles = tiles_of(jnp.array(sizes), sum(sizes), 256)
    assert sum(a.size for a in jax.tree.leaves(tiles)) == 3 * tiles.group.size + 1 < 3 * 130 + 2
    case = Case.of("tiles", 0, 2, 384, 128, False, [widths_of(0, 2, 384, False)])
    assert pages_read(case.arranged, case.tables, blocks=2).packed.shape[1] < 100


def test_pages_in_order_come_in_runs_in_a_last_step_too():
    """Three blocks an expert, two a step: the last step begins at the second block, whose pages come with the run."""
    reads = reads_of(({3: jnp.arange(9).reshape(1, 9)},), (3,), 1, 3, 3, 2)
    assert reads.fetches[3].run.tolist() == [0, 3, 6, 1, 4, 7] and reads.alone.tolist() == [0, 0]
    assert reads.widths.reshape(2, 2, 2).tolist() == [[[3, 3], [3, 3]], [[2, 2], [3, 3]]]
    reads = reads_of(({3: jnp.array([[8, 7, 6, 5, 4, 3, 2, -1, 0]])},), (3,), 1, 3, 3, 2)
    assert (reads.fetches[3].run == -1).all() and reads.alone.tolist() == [5, 3]
    shape = Shape(8, 1, 1, 3, 2, (3,), 3, "bf16")
    assert sizes_of_reads(shape, 1) == jax.tree.map(len, reads)
    one = parts_of(in_one(reads), sizes_of_reads(shape, 1))
    assert [int(one.fetches[3].page[i]) for i in range(12)] == reads.fetches[3].page.tolist()
    assert sorted(reads.fetches[3].page.reshape(2, 6)[1, :3].tolist()) == [0, 3, 6]


def test_a_row_does_not_depend_on_its_neighbours():
    case = Case.of("tiles", 5, 2, 128, 128, True, [widths_of(v, 2, 128, True) for v in range(2)])
    rows, sizes = rows_and_sizes(6, [3, 4, 2, 5], 128)
    together = compared(case, rows, sizes, tile_rows=8)
    alone = compared(case, rows[9:10], jnp.array([0, 0, 0, 1]), tile_rows=8)
    np.testing.assert_array_equal(together[9:10], alone)


def test_rows_past_the_last_group_are_zeros_and_no_rows_are_none():
    case = Case.of("tiles", 7, 2, 128, 128, False, [widths_of(0, 2, 128, False)])
    rows, sizes = rows_and_sizes(8, [3, 2], 128, jnp.bfloat16)
    run = functools.partial(quantized_experts_tpu, interpret=pltpu.InterpretParams())
    more = run(jnp.pad(rows, ((0, 4), (0, 0)), constant_values=7), sizes, case.arranged, case.tables, 0, silu_gated)
    np.testing.assert_array_equal(more[:5], run(rows, sizes, case.arranged, case.tables, 0, silu_gated))
    assert (np.asarray(more[5:], np.float32) == 0).all()
    assert (np.asarray(run(rows, sizes * 0, case.arranged, case.tables, 0, silu_gated)) == 0).all()
    assert run(rows[:0], sizes * 0, case.arranged, case.tables, 0, silu_gated).shape == (0, 128)


def test_tokens_get_the_sum_of_their_rows_but_of_those_past_the_last_group():
    """Six tokens with two rows each, of which some go to a group that no expert here has: what lies in their places
    is never written, and interpreted as NaN."""
    case = Case.of("tiles", 18, 3, 256, 128, True, [widths_of(v, 3, 256, True) for v in (3, 4)])
    rng = np.random.default_rng(19)
    x = jnp.asarray(rng.normal(size=(6, 128)), jnp.bfloat16)
    gates = jnp.asarray(rng.uniform(size=(6, 2)), jnp.float32)
    order = sort_by_expert(jnp.array([[0, 6], [4, 2], [6, 6], [5, 0], [1, 6], [0, 3]]), 7)
    sizes, how = order.group_sizes[:-1], {"interpret": pltpu.InterpretParams(), "tile_rows": 8}
    reads = pages_read(case.arranged, case.tables)
    found = tokens_through_experts(x, gates, order, sizes, case.arranged, reads, 1, silu_gated, **how)
    rows = quantized_experts_tpu(gather_rows(x, order), sizes, case.arranged, case.tables, 1, silu_gated, **how)
    np.testing.assert_allclose(found, combine_rows(rows, gates, order), rtol=1e-6, atol=1e-6)
    assert np.any(np.asarray(found), axis=1).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize(("form", "tile_rows"), [("bf16", 192), ("int8", 96)])
def test_tiles_of_many_rows_of_which_the_last_has_fewer(form, tile_rows):
    case = Case.of("tiles", 18, 2, 128, 128, False, [widths_of(0, 2, 128, False)])
    rows, sizes = rows_and_sizes(19, [70, 330], 128)
    how = {"form": form, "tile_rows": tile_rows, "tolerance": TOLERANCE[form]}
    compared(case, rows, sizes, interpret=CHECKED, **how)


def test_a_row_of_zeros_or_of_nan_stays_its_own():
    case = Case.of("tiles", 9, 1, 128, 128, False, [widths_of(0, 1, 128, False)])
    rows, sizes = rows_and_sizes(10, [4], 128)
    rows = rows.at[1].set(0).at[2].set(jnp.nan)
    for form in FORMS:
        run = functools.partial(quantized_experts_tpu, form=form, interpret=pltpu.InterpretParams())
        found = np.asarray(run(rows, sizes, case.arranged, case.tables, 0, silu_gated))
        assert (found[1] == 0).all() and np.isfinite(found[[0, 3]]).all() and np.isnan(found[2]).all()


def test_what_does_not_fit_tiles_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="192 hidden"):
        Case.of("tiles", 0, 1, 128, 192, False, [], group_size=192)
    with pytest.raises(ValueError, match="groups of 64"):
        Case.of("tiles", 0, 1, 128, 128, False, [], group_size=64)
    zeros = functools.partial(np.zeros, dtype=np.uint8)
    with pytest.raises(ValueError, match="96 channels"):
        tiled_base(BasePlanes(zeros((1, 1, 3, 96, 32)), np.zeros((1, 1, 3, 96, 1), jnp.bfloat16)))
    with pytest.raises(ValueError, match="3 bits are of 64 channels"):
        tiled_pages(Pages(zeros((1, 3, 64, 16)), None), 3, np.arange(3)[None])
    case = Case.of("tiles", 0, 2, 128, 128, False, [widths_of(0, 2, 128, False)])
    rows, sizes = rows_and_sizes(0, [1, 1], 128)
    with pytest.raises(ValueError, match="unknown form 'int4'"):
        quantized_experts_tpu(rows, sizes, case.arranged, case.tables, 0, silu_gated, form="int4")
    with pytest.raises(ValueError, match=r"planes of \(4,\) bits"):
        tables = ({4: case.tables[0][4]},)
        quantized_experts_tpu(rows, sizes, case.arranged, tables, 0, silu_gated)
    with pytest.raises(ValueError, match="tiles of 12 rows"):
        quantized_experts_tpu(rows, sizes, case.arranged, case.tables, 0, silu_gated, tile_rows=12)
    with pytest.raises(ValueError, match="3 groups"):
        quantized_experts_tpu(rows, jnp.ones(3, jnp.int32), case.arranged, case.tables, 0, silu_gated)


def test_empty_pages_have_the_shape_of_pages():
    for level in LEVELS:
        made = Case.of("tiles", 0, 1, 128, 384, True, []).arranged.pages[level]  # two layers of three pages
        assert jax.tree.map(jnp.shape, empty_pages(6, 1, level, 384, 3)) == jax.tree.map(jnp.shape, made)


@pytest.mark.parametrize("sizes", [[0, 0, 5], [16, 1, 0], [33, 0, 0], [1, 1, 1]])
def test_every_row_is_in_one_tile_of_its_group(sizes):
    tiles = jax.tree.map(np.asarray, tiles_of(jnp.array(sizes), sum(sizes), 16))
    assert tiles.used[0] == sum(-(-s // 16) for s in sizes) == (tiles.rows > 0).sum() and tiles.rows.max() <= 16
    each = list(zip(tiles.group, tiles.first, tiles.rows))[: tiles.used[0]]
    assert [row for _, first, rows in each for row in range(first, first + rows)] == list(range(sum(sizes)))
    assert [group for group, _, rows in each for _ in range(rows)] == np.repeat(np.arange(3), sizes).tolist()


@pytest.mark.parametrize("size", [128, 384, 2048, 2944])
def test_rows_as_words_are_the_rows(size):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, size)), jnp.bfloat16)
    words = words_of(rows)
    assert words.shape == (5, sublanes_of(size), TILE) and words.dtype == jnp.int32
    np.testing.assert_array_equal(rows_of_words(words, size), rows.astype(jnp.float32))


def test_tiles_of_rows_hold_most_groups_and_steps_divide_the_blocks():
    v5e, v5p, v6e, tpu7x = Core(128, True), Core(128, False), Core(256, True), Core(256, False)
    for at in (v5p, tpu7x):
        assert [rows_of_tile(n, 64, at) for n in (1, 64, 512, 1024, 2048)] == [8, 8, 16, 24, 48]
    for at in (v5e, v6e):
        assert [rows_of_tile(n, 64, at) for n in (1, 64, 512, 1024, 2048)] == [8, 8, 24, 32, 48]
    for at in (v5e, v5p):
        assert [rows_of_tile(n * 64, 64, at) for n in (64, 128, 10**4)] == [80, 96, 96]
    for at in (v6e, tpu7x):
        assert [rows_of_tile(n * 64, 64, at) for n in (64, 65, 128, 10**4)] == [80, 128, 192, 256]
    found = [blocks_of_step(g, n) for g, n in ((16, 8), (16, 6), (16, 11), (32, 112), (23, 23), (100, 1))]
    assert found == [8, 6, 11, 4, 6, 1]
    assert core() == (128, True)  # here


CONFIG = decoder_config(
    vocab_size=61,
    hidden_size=320,  # filled up to two groups
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=512,
    norm_topk_prob=True,
    initializer_range=0.1,
)


@functools.partial(jax.jit, static_argnames=("config", "form"))
def step(config, params, state, tokens, form="bf16"):
    return with_parameters(config, params)(tokens, experts=serving.experts(state, form))[0]


def test_the_run_time_adapts_and_switches_with_planes_in_tiles(tokenizer_file, compilations):
    import tokenizers

    rng = np.random.default_rng(0)
    known = {n: " ".join(f"w{i}" for i in rng.integers(a, a + 20, 2000)) for n, a in (("low", 3), ("high", 35))}
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    model = quantize(Decoder(CONFIG, rngs=nnx.Rngs(0)), tokenizer, known, TO_TILES)[0]
    tokens, windows = jnp.asarray(rng.integers(3, 61, (2, 12))), rng.integers(20, 30, (4, 65))
    found = {}
    for tiled in (False, True):
        host, state = serving.init(model, requests=2, arrangement="tiles" if tiled else "planes")
        host, state = serving.adapt(model, host, state, windows)
        with pltpu.force_tpu_interpret_mode():
            first = [step(CONFIG, model.parameters, serving.switch(state, number), tokens) for number in (0, 1)]
            with compilations() as count:
                mixed = step(CONFIG, model.parameters, serving.switch(state, [0, 1]), tokens)
            assert count.compiled == 0
        if tiled:
            np.testing.assert_array_equal(mixed[0], first[0][0])
            np.testing.assert_array_equal(mixed[1], first[1][1])
        found[tiled] = [*first, mixed], host.plans
    np.testing.assert_array_equal(found[False][1][1].widths, found[True][1][1].widths)
    for a, b in zip(found[False][0], found[True][0]):
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(a).max()))
    planes = jax.tree.map(np.array, host.pages.planes)
    planes.codes[3][0, 1] ^= 1
    with pytest.raises(ValueError, match="3-bit page of layer 0, expert 1"):
        dataclasses.replace(host.pages, planes=planes).arrays(3, np.array([[0, 0, 0], [0, 1, 0]]))


@pytest.mark.slow
def test_generation_runs_the_kernel_in_a_loop_over_the_layers(monkeypatch):
    """As on a TPU, where planes lie in tiles and layers are stacked: the tokens of the XLA path."""
    rng = np.random.default_rng(0)
    known = {n: " ".join(f"word{i}" for i in rng.integers(a, a + 20, 3000)) for n, a in (("low", 3), ("high", 35))}
    tokenizer = load_tokenizer(BUNDLED)
    decoder = Decoder(dataclasses.replace(CONFIG, vocab_size=tokenizer.get_vocab_size()), rngs=nnx.Rngs(0))
    model = quantize(decoder, tokenizer, known, TO_TILES)[0]
    found = {}
    for arrangement in ("planes", "tiles"):
        monkeypatch.setattr(serving, "arrangement_for", lambda *_, own=arrangement: own)
        language, _ = quantized_language_model(model, adaptive=True)
        assert is_stacked(language.parameters) == (arrangement == "tiles")
        with pltpu.force_tpu_interpret_mode():
            prompts, config = [[5, 9, 33, 7, 50], [40, 6]], GenerateConfig(max_tokens=4)
            found[arrangement] = generate(language, prompts, config, capacity=64)
    assert found["planes"] == found["tiles"]
