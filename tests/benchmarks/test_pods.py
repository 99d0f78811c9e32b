"""Steps compiled for slices of TPUs that are not here, where libtpu is; and what is read of a program."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (the test extra)"
)


def ran(*words):
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=BENCHMARKS, timeout=900)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@needs_compiler
@pytest.mark.parametrize("kind", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_a_step_over_four_chips_has_one_cache_and_no_plane_travels(kind, tmp_path):
    ran("pods.py", "--only", f"small v6e {kind}", "--json", str(tmp_path / "rows.json"))
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert "failed" not in row, row
    assert row["fits"] and not row["planes"] and row["kernels"]
    assert row["predicted_cache"] <= row["aliased"] < 1.01 * row["predicted_cache"]
    assert row["predicted"] == pytest.approx(row["arguments"], rel=0.05)
    reduced = row["collectives_a_layer"]
    assert reduced.get("all-reduce", 0) + reduced.get("reduce-scatter", 0) <= 3  # attention's, and two of the experts
    assert row["bytes_a_layer"] < 20 * row["requests"] * max(row["tokens"], 1) * 256


def test_a_plane_that_travels_is_seen():
    """Programs by hand: a loop that sends rows, and one that gathers an expert's planes or pages."""
    code = """
import json, pods
body = '''%all-reduce-scatter.2 (p: f32[64,4096]) -> f32[16,4096] {
  %f = f32[64,4096]{1,0} all-reduce(%p)
}

%turn.1 (p: s32[]) -> s32[] {
  %a = bf16[64,4096]{1,0:T(8,128)} all-gather(%p), dimensions={0}
  %h = f32[8]{0} all-reduce(%p), frontend_attributes={chain_id="0"}
  %i = f32[8]{0} all-reduce(%p), frontend_attributes={chain_id="0"}
  %b = s32[64,17]{1,0} all-gather(%p), dimensions={0}
  %c = (f32[2,1]{0,1}, f32[4,1]{0,1}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p)
  %g = f32[16,4096]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2
  OTHER
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%cond.2, body=%turn.1
  %d = s32[1,4,4,37984]{3,2,0,1} all-to-all(%p)
}
'''
others = ("", "%e = s32[3,16,8,128]{3,2,1,0} all-gather(%p)", "%e = u8[9,3,128]{2,1,0} all-reduce(%p)",
          "%e = s32[4096,128]{1,0} all-gather(%p)")
print(json.dumps([pods.travelled(body.replace("OTHER", other), 64 * 17) for other in others]))
"""
    plain, *planes = json.loads(ran("-c", code).splitlines()[-1])
    kinds = ("all-reduce", "collective-permute", "reduce-scatter")
    assert plain["collectives_a_layer"] == dict.fromkeys(kinds, 1) | {"all-gather": 2}
    assert plain["bytes_a_layer"] == 64 * 4096 * 2 + 32 + 64 * 17 * 4 + 16 + 16 * 4096 * 4
    assert plain["other_collectives"] == 1
    assert not plain["planes"] and all(found["planes"] for found in planes)
