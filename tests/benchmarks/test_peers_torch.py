"""What benchmarks/peers_torch.py makes of the weights that other projects' packages wrote; none of them runs here."""

from __future__ import annotations

import numpy as np
import pytest


def test_experts_come_back_from_the_file_that_a_process_wrote(benchmarks, bundled, tmp_path):
    peers, own, torch = (benchmarks(name) for name in ("peers", "peers_own", "peers_torch"))
    weights = peers.expert_weights(bundled[0])
    own.write_experts(tmp_path, bundled[0].config, weights)
    assert np.array_equal(torch.experts_in(tmp_path, bundled[0].config), weights)  # bfloat16 already


@pytest.mark.slow
def test_the_models_own_weights_change_nothing_and_zeros_do(benchmarks, bundled, tmp_path):
    peers, own, torch = (benchmarks(name) for name in ("peers", "peers_own", "peers_torch"))
    model = bundled[0]
    windows = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 17))
    texts = {"a": torch.Text("known", windows[:1], windows), "b": torch.Text("novel", windows[:1], windows)}
    weights = peers.expert_weights(model)
    own.write_experts(tmp_path / "same", model.config, weights)
    own.write_experts(tmp_path / "zeros", model.config, 0 * weights)
    folders = {"": tmp_path / "same", "b": tmp_path / "zeros"}
    found = torch.Measure(model, texts).of(torch.Method("x", 3.0, {}, folders))
    assert np.allclose(found["a"], 0, atol=1e-3)  # the reference is kept in float16
    assert found["b"][1].min() > 0.01


def test_a_peer_is_compared_with_ours_of_no_more_bits_window_by_window(benchmarks):
    torch = benchmarks("peers_torch")
    random = np.random.default_rng(0)
    texts = {name: torch.Text(kind, None, None) for name, kind in (("a", "known"), ("b", "known"), ("c", "novel"))}
    methods = [torch.Method("dynamo", bits, {}, {}) for bits in (4.1, 3.1, 2.1)]
    methods.append(torch.Method("GPTQ", 3.2, {}, {}))
    found = [{name: random.normal(size=(2, 8)) for name in texts} for _ in methods]
    (row,) = torch.pairs(methods, found, texts)
    assert (row["ours"], row["our_bits"]) == ("dynamo", 3.1)
    apart = [found[3][name] - found[1][name] for name in "ab"]
    assert row["known"]["excess_nll"] == pytest.approx(np.mean([d[0].mean() for d in apart]))
    error = np.sqrt(sum(d[1].var(ddof=1) / 8 for d in apart)) / 2
    assert row["known"]["kl_standard_error"] == pytest.approx(error)
    assert row["novel"]["kl"] == pytest.approx((found[3]["c"] - found[1]["c"])[1].mean())
