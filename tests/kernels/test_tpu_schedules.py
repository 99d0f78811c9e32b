"""What TPU compilers make of the kernel and of what stands around it, and how that is counted, without a TPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (the test extra)"
)


def compiler(code, *arguments):
    """Run in a process of its own, since libtpu reads its environment once, without the flags of the tests; what the
    code prints, as JSON."""
    command, environment = [sys.executable, "-c", code, *arguments], os.environ | {"XLA_FLAGS": ""}
    found = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, env=environment, timeout=900)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@needs_compiler
def test_bundles_are_counted_where_they_run():
    """Kernels whose cost is known: a product more in every step, and one more in a ``pl.when``."""
    code = """
import bundles, json
out = []
for dots, conditional in ((2, 1), (3, 1), (4, 1), (2, 2), (2, 3)):
    function, arguments = bundles.known(dots, conditional)
    loop = bundles.compiled(bundles.CHIPS["v5e"], function, *arguments)[1]["known.1"]
    out.append([loop.always, loop.regions])
print(json.dumps(out))
"""
    (a, r), (b, _), (c, _), (d, s), (e, t) = compiler(code)
    assert len(r) == 1 and 100 < b - a == pytest.approx(c - b, rel=0.1)
    assert a == d == e and 100 < s[0] - r[0] == pytest.approx(t[0] - s[0], rel=0.15)


def test_what_holds_other_regions_is_counted_apart():
    """A schedule by hand: the pipeline's guard, in it a ``pl.when`` with a loop, and one of its own."""
    code = """
import bundles, json
branch, end = "{ %1 = sbr.rel (%p1_0) target = $region@ }", "{ nop /* Start/End empty region @ */ }"
lines = ["LB: > {}", branch.replace("@", "9"), *[": > {}"] * 5]
lines += [branch.replace("@", "1"), ": > {}", branch.replace("@", "2"), *[": > {}"] * 3, end.replace("@", "2")]
lines += [": > {}", end.replace("@", "1"), branch.replace("@", "3"), *[": > {}"] * 7]
lines += [end.replace("@", "3"), end.replace("@", "9")]
text = [f"{hex(i)} {line if line[0] in 'L:' else ': > ' + line}" for i, line in enumerate(lines)]
loop = bundles.loop_of(chr(10).join(text))
print(json.dumps([loop, loop.without_holders(), len(lines)], default=vars))
"""
    loop, without, lines = compiler(code)
    assert loop["regions"] == [3, 7] and loop["holders"] == [[4, [0]]]
    assert loop["always"] == lines - 10 and without["always"] == lines - 14 and without["regions"] == [7]


@needs_compiler
def test_operations_of_each_layer_and_those_ahead_of_all_are_counted_apart():
    """Sorts that depend on each other, in a loop and ahead of it: each is an operation of some hundred cycles."""
    code = """
import bundles, jax, jax.numpy as jnp, json
out = []
for ahead, inside in ((0, 1), (0, 3), (2, 1)):
    def run(x, ahead=ahead, inside=inside):
        for i in range(ahead):
            x = jnp.sort(x ^ i)
        def turn(at, x):
            for i in range(inside):
                x = jnp.sort(x ^ (at + i))
            return x
        return jax.lax.fori_loop(0, 5, turn, x)
    bundles.compiled(bundles.CHIPS["v6e"], run, jax.ShapeDtypeStruct((512,), jnp.int32))
    once, each, _ = bundles.around()
    out.append([[sum("sort" in name for name, _ in of.slowest), of.operations, of.cycles] for of in (once, each)])
print(json.dumps(out))
"""
    (zero, one), (_, three), (two, again) = compiler(code)
    assert [zero[0], two[0], one[0], three[0], again[0]] == [0, 2, 1, 3, 1]
    assert one[1] <= again[1] + 1 <= three[1] and two[2] > zero[2] + 200 and three[2] > one[2] + 200


@needs_compiler
@pytest.mark.slow
def test_few_operations_stand_around_the_kernel_in_each_layer():
    """Ordering, gathering and adding up of rows, and what of the kernel's grid depends on the routing: no more; page
    tables are read once for all layers, and nothing is left to another core."""
    code = """
import bundles, json, tpu_layer
from layers import SHAPES
run, arguments = tpu_layer.ours("v6e", SHAPES["olmoe-1b-7b"], 8)
bundles.compiled(bundles.CHIPS["v6e"], run, *arguments)
once, each, offloaded = bundles.around()
print(json.dumps([each.operations, each.cycles, offloaded]))
"""
    operations, cycles, offloaded = compiler(code)
    assert operations < 45 and cycles < 4000 and offloaded == 0


CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
EVERY_CASE = [
    pytest.param(chip, tokens, (), marks=pytest.mark.slow, id=f"{chip}-{tokens}-every")
    for chip, tokens in itertools.product(CHIPS, (8, 2048))
]


@needs_compiler
@pytest.mark.parametrize(
    ("chip", "tokens", "names"),
    [
        ("tpu7x", 8, ("olmoe-1b-7b",)),
        pytest.param("v5e", 8, ("gpt-oss-20b",), marks=pytest.mark.slow),
        *EVERY_CASE,
    ],
)
def test_every_shape_compiles_for_every_chip(chip, tokens, names):
    """One block a step, so that it does not take minutes; memory that does not fit is an error of the compiler. No
    names: all."""
    code = """
import bundles, json, sys
import tpu_schedule as t
chip, tokens, out = sys.argv[1], int(sys.argv[2]), {}
for name in sys.argv[3:] or t.SHAPES:
    run = lambda *a: t.quantized_experts_tpu(*a, 0, t.silu_gated, form=t.ROUNDED[chip], blocks=1)
    group = 128 if name == "gpt-oss-20b" else 256  # 23 tiles, and 16 or 32
    loops = bundles.compiled(bundles.CHIPS[chip], run, *t.arguments(t.SHAPES[name], tokens, (3, 4), group))[1]
    out[name] = [loop.total for n, loop in loops.items() if n.startswith("experts_")]
print(json.dumps(out))
"""
    found = compiler(code, chip, str(tokens), *names)
    assert len(found) == (len(names) or 6) and all(len(each) == 1 and each[0] > 100 for each in found.values()), found


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_each_activation_compiles(chip):
    code = """
import bundles, json, sys
import tpu_schedule as t
from dynamo_jax.models.experts import bounded_gated, clamped_gated, gelu_gated
chip, found = sys.argv[1], []
for activation in (clamped_gated(7.0, 1.702), gelu_gated, bounded_gated(7.0)):
    run = lambda *a: t.quantized_experts_tpu(*a, 0, activation, form=t.ROUNDED[chip], blocks=1)
    loops = bundles.compiled(bundles.CHIPS[chip], run, *t.arguments(t.SHAPES["olmoe-1b-7b"], 8, (3, 4), 256))[1]
    found += [loop.total for name, loop in loops.items() if name.startswith("experts_")]
print(json.dumps(found))
"""
    found = compiler(code, chip)
    assert len(found) == 3 and min(found) > 100, found


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_all_levels_and_both_kinds_of_pages_compile(chip):
    code = """
import bundles, functools, jax, jax.numpy as jnp, json, sys
import tpu_schedule as t
from dynamo_jax.kernels.tiles import TiledResident, empty_pages
chip, layer, of = sys.argv[1], t.SHAPES["olmoe-1b-7b"], jax.ShapeDtypeStruct
blocks, found = layer.channels // t.TILE, []
every, whole = (3, 4, 8), layer.hidden
cases = (1, every, 128, 8), (3, every, 128, 8), (3, (3,), whole, 8), (1, every, whole, 128)
for together, levels, group, rows in cases:
    base, pages = t.tiled_shapes(2, layer, {}, group)[0].base, {}
    for level in levels:
        slots = layer.experts * blocks * 3 // together
        sizes = slots, together, level, layer.hidden, layer.hidden // group
        pages[level] = jax.eval_shape(functools.partial(empty_pages, *sizes))
    table = {level: of((2, layer.experts, 3 // together * blocks), jnp.int32) for level in levels}
    x, sizes = of((64, layer.hidden), jnp.bfloat16), of((layer.experts,), jnp.int32)
    run = lambda *a: t.quantized_experts_tpu(*a, 0, t.silu_gated, form=t.ROUNDED[chip], blocks=2, tile_rows=rows)
    loops = bundles.compiled(bundles.CHIPS[chip], run, x, sizes, TiledResident(base, pages), (table,))[1]
    found += [loop.total for name, loop in loops.items() if name.startswith("experts_")]
print(json.dumps(found))
"""
    found = compiler(code, chip)
    assert len(found) == 4 and min(found) > 100, found
