"""The report: what it says is what the rows say, the page is whole, and nothing that is missing stops it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_reports import Page, checked, group, made_up_dynamics, make, says

from dynamo_jax.analysis.dynamics import Significance, dynamics
from dynamo_jax.report import charts
from dynamo_jax.report.content import Line, ReportContent
from dynamo_jax.report.findings import block_concentration, byte_text, headline, moved_pages, reading, span
from dynamo_jax.report.page import render, write_report

# The page


def test_tags_balance_and_nothing_is_loaded_or_run() -> None:
    content = make()
    page, source = checked(content), render(content)
    assert "://" not in source and "@import" not in source and "url(" not in source
    assert "<script" not in source
    assert not [a for a in page.attributes if a[1] == "src" or a[1].startswith("on")]


def test_the_checker_of_balance_sees_an_open_tag() -> None:
    with pytest.raises(AssertionError):
        Page("<div><p>words</div>")
    with pytest.raises(AssertionError):
        Page("<div><p>words</p>")


def test_every_row_is_in_the_table() -> None:
    content = make()
    body = [line for line in re.findall(r"<tr.*?</tr>", render(content)) if "<td" in line]
    for r in content.rows:
        assert any(f">{r['variant']}<" in line and f">{r['nll']:.4f}<" in line for line in body), r
    results = [line for line in body if "10,240" in line]
    assert len(results) == len(content.rows)


def test_every_expert_of_every_dataset_has_a_cell_with_its_number() -> None:
    content = make()
    source = render(content)
    for values in content.significance.values():
        for (layer, expert), value in np.ndenumerate(values):
            shown = charts.text(f"layer {layer}, expert {expert}: {charts.number(float(value), '.3g')} nats a token")
            assert shown in source


def test_every_figure_has_a_caption() -> None:
    source = render(make())
    figures = re.findall(r"<figure.*?</figure>", source, re.DOTALL)
    assert len(figures) == source.count("<figure") >= 8
    assert all(re.search(r"<figcaption>.{20,}</figcaption></figure>", f) for f in figures)


def test_the_facts_the_rule_and_the_command_are_shown() -> None:
    words = checked(make()).text()
    shown = ("3.0 bits a weight", "dynamo-jax demo --bits 3", "above 1 twice in a row", "dynamo-jax inspect --model")
    for part in shown:
        assert part in words


def test_all_text_is_escaped() -> None:
    evil = '<b onmouseover="x">&amp;\'</b>'
    content = make(known=(evil, "code"), novel={"</svg><script>": (0.5, 0.01)})
    content = dataclasses.replace(content, model=evil, command=evil, facts={evil: evil})
    page, source = checked(content), render(content)
    assert evil not in source and "<script" not in source and "</svg><script" not in source
    words = page.text()
    assert evil in words and "</svg><script>" in words


def test_text_that_has_no_utf8_is_written_all_the_same(tmp_path: Path) -> None:
    content = dataclasses.replace(make(), model="name\udce9")
    write_report(tmp_path / "r.html", content)
    assert "name?" in (tmp_path / "r.html").read_text(encoding="utf-8")


# What it says


def test_a_difference_counts_past_two_standard_errors_only() -> None:
    def marked(difference: float | None, error: float | None) -> str:
        return reading({"difference": difference, "standard_error": error})

    assert marked(-0.021, 0.01) == "better" and marked(0.021, 0.01) == "worse"
    assert marked(-0.02, 0.01) == marked(0.02, 0.01) == "noise"
    assert marked(0.0, 0.0) == "same"
    assert marked(0.01, None) == marked(math.nan, 0.01) == marked(0.01, math.inf) == "unknown"
    assert marked(None, None) == "none"


def test_the_headline_names_what_got_better_what_got_worse_and_what_is_noise() -> None:
    content = make(novel={"good": (-0.02, 0.002), "bad": (0.02, 0.002), "unclear": (-0.003, 0.002)})
    found = headline(content)
    marks = {name: f for f in found for name in ("good", "bad", "unclear") if name in f.words}
    assert marks["good"].mark == "better" and "helped on good" in marks["good"].words
    assert marks["bad"].mark == "worse" and "made bad worse" in marks["bad"].words
    assert marks["unclear"].mark == "noise" and "noise" in marks["unclear"].words
    assert "helped on unclear" not in says(content)
    assert "better on 1, worse on 1, and on 1 there is no sure difference" in says(content)
    assert "made bad worse" in checked(content).text()


def test_the_headline_gives_bytes_and_price_against_bf16() -> None:
    words = says(make())
    assert "18.8% of the expert bytes" in words
    assert f"+{math.expm1(0.05):.1%} on known data and +{math.expm1(0.05):.1%} on novel data" in words


def test_the_headline_owns_up_to_plain_rounding_that_beats_the_baseline() -> None:
    content = make()
    rows = [r | {"nll": 2.04} if (r["variant"], r["dataset"]) == ("rtn3", "code") else r for r in content.rows]
    finding = next(f for f in headline(dataclasses.replace(content, rows=rows)) if "rounding" in f.words)
    assert "2 of 3 datasets, but not on code" in finding.words and finding.mark == "worse"


def test_the_section_on_movement_gives_the_numbers_of_the_pairs() -> None:
    content = make()
    moved = content.dynamics
    assert moved is not None
    words = checked(content).text()
    (shift,), (orders,) = moved.routing.values(), moved.significance.values()
    line = re.search(r"prose and code ([0-9.]+) ([0-9.]+) \S+ \S+ (\S+)", words)
    assert line and line.groups() == (
        f"{shift.divergence.mean():.3f}",
        f"{shift.divergence.max():.3f}",
        charts.number(float(orders.experts.correlation.mean()), "z.2f"),
    )
    assert "In 3 of 3 layers every pair of datasets is further apart than any dataset is from itself" in words
    titles = re.findall(r"layer \d, within code: [0-9.]+ bits", render(content))
    assert len(titles) == 3
    half = charts.number(np.mean([o.experts.correlation for o in moved.halves.within.values()]), "z.2f")
    assert f"On half of their windows, the ranks of experts correlate at {half} within a dataset" in words
    assert len(re.findall(r"layer \d, halves of code: ", render(content))) == 3


def test_datasets_that_do_not_move_are_not_called_apart() -> None:
    counts = np.random.default_rng(0).poisson(100, (2, 8, 3, 5))
    flat = Significance(np.ones((3, 5)), np.ones((3, 5, 1)))
    moved = dynamics(dict(zip("ab", counts)), {"a": flat, "b": flat}, {"a": (flat, flat), "b": (flat, flat)})
    words = checked(dataclasses.replace(make(("a", "b")), dynamics=moved)).text()
    assert "In 3 of 3" not in words and "significance correlate" not in words


def test_two_widths_an_expert_are_two_maps() -> None:
    content = make(shape=(3, 5, 4))
    pages = np.repeat(np.stack([np.full((3, 5), 2), np.full((3, 5), 2), np.full((3, 5), 4)], axis=2), 4, axis=2)
    adapted = {"recipes": pages[:, :, ::-1]}
    words = checked(dataclasses.replace(content, baseline_bits=pages, adapted_bits=adapted, apart=True)).text()
    assert "Width of each expert's gate and up" in words and "Width of each expert's down" in words
    assert "baseline, two widths an expert, one of gate with up and one of down" in words
    assert "+60 \N{MINUS SIGN}60 of 60" in words  # of each of the two levels up to 4 bits


def test_a_false_alarm_and_a_missed_novelty_are_said() -> None:
    content = make(novel={"recipes": (0.0, 0.0)})
    shape = next(iter(content.adapted_bits.values())).shape
    rows = [r for r in content.rows if r["dataset"] != "code"] + group("code", "known", 0.01, 0.001)
    verdicts = content.verdicts | {"code": ("prose", 1.7, True), "recipes": ("prose", 0.3, False)}
    adapted = {"code": np.full(shape, 3)}
    content = dataclasses.replace(content, rows=rows, verdicts=verdicts, adapted_bits=adapted)
    assert "made code worse (a false alarm" in says(content)
    assert "No adaptation on recipes, though novel" in says(content)
    words = checked(content).text()
    assert "false alarm 1.70" in words and "missed 0.30" in words
    sure = dataclasses.replace(content, verdicts=content.verdicts | {"code": ("prose", 0.7, False)})
    assert "made code worse (taken for prose, but the gain was sure)" in says(sure)


def test_an_auto_row_without_a_standard_error_shows_nothing() -> None:
    content = make()
    rows = [r | {"standard_error": None} if r["variant"] == "auto" else r for r in content.rows]
    words = says(dataclasses.replace(content, rows=rows))
    assert "shows nothing" in words and "helped" not in words


def test_numbers_read_well() -> None:
    assert byte_text(999.0) == "999\N{NO-BREAK SPACE}B" and byte_text(231_400).startswith("231\N{NO-BREAK SPACE}kB")
    assert byte_text(999_900).endswith("MB") and byte_text(math.nan) == "missing"
    assert span([0.01, 0.01001], ".1%") == "1.0%" and span([0.03, 0.01], ".1%") == "1.0% to 3.0%"
    assert charts.number(-1.5) == "\N{MINUS SIGN}1.5" and charts.number(None) == charts.number(math.nan) == "missing"


# What may be missing


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 2), (4, 1, 3), (2, 300, 1), (40, 3, 2)])
def test_any_number_of_layers_and_experts(shape: tuple[int, int, int]) -> None:
    checked(make(shape=shape))


def test_no_novel_data() -> None:
    content = make(novel={})
    page = checked(content)
    assert "No novel dataset was evaluated" in page.text() and "No dataset was adapted to" in page.text()


def test_one_dataset_has_no_agreement_to_show() -> None:
    words = checked(make(known=("prose",), novel={})).text()
    assert "no agreement between datasets" in words and "nothing moves between datasets" in words


def test_nothing_at_all() -> None:
    empty = ReportContent(
        model="",
        facts={},
        expert_weights=0,
        rows=[],
        significance={},
        block_significance={},
        baseline_bits=np.zeros((0, 0, 0), np.int8),
        adapted_bits={},
        verdicts={},
        dynamics=None,
        command="",
    )
    checked(empty)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize(
    "field", ["nll", "perplexity", "bytes_per_token", "device_bits", "difference", "standard_error"]
)
def test_numbers_that_are_not_finite_in_rows(field: str, bad: float) -> None:
    content = make()
    for variant in ("bf16", "rtn3", "baseline", "auto"):
        rows = [r | {field: bad} if r["variant"] == variant else r for r in content.rows]
        checked(dataclasses.replace(content, rows=rows))
    checked(dataclasses.replace(content, rows=[r | {field: bad} for r in content.rows]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_numbers_that_are_not_finite_in_arrays(bad: float) -> None:
    content = make()
    for some in (slice(0, 1), slice(None)):
        maps = {n: a.copy() for n, a in content.significance.items()}
        blocks = {n: a.copy() for n, a in content.block_significance.items()}
        maps["prose"][some], blocks["prose"][some] = bad, bad
        checked(dataclasses.replace(content, significance=maps, block_significance=blocks))
    everywhere = {n: np.full_like(a, bad) for n, a in content.significance.items()}
    verdicts = {n: ("prose", bad, False) for n in content.verdicts}
    page = checked(
        dataclasses.replace(
            content,
            significance=everywhere,
            verdicts=verdicts,
            dynamics=made_up_dynamics(("prose", "code"), (3, 5, 4), bad),
        )
    )
    assert "expert 0" in page.text()


@pytest.mark.parametrize("variant", ["bf16", "rtn3", "baseline", "auto"])
def test_a_variant_that_was_not_evaluated(variant: str) -> None:
    content = make()
    checked(dataclasses.replace(content, rows=[r for r in content.rows if r["variant"] != variant]))


def test_arrays_of_another_shape_are_an_error_that_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"significance\['prose'\] has shape \(2, 2\), expected 2 axes"):
        dataclasses.replace(make(), significance={"prose": np.ones((2, 2))})
    with pytest.raises(ValueError, match="baseline_bits has shape"):
        dataclasses.replace(make(), baseline_bits=np.ones(3))


# What the arrays say


def test_moved_pages_counts_each_level_once() -> None:
    adapted = np.array([[[2, 8, 4, 3]]])  # from 4: loses 3 and 4; gains 8; as it was; loses 4
    assert moved_pages(np.full((1, 1, 4), 4), adapted) == {3: (0, 1), 4: (0, 2), 8: (1, 0)}


def test_block_concentration_is_one_where_blocks_are_alike_and_n_where_one_has_all() -> None:
    assert block_concentration(np.ones((2, 3, 4))) == [1.0] * 5
    assert block_concentration(np.eye(4)[None]) == [4.0] * 5
    assert all(map(math.isnan, block_concentration(np.zeros((2, 3, 4)))))


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_ticks_are_few_and_lie_inside(low: float, length: float) -> None:
    high = low + length
    found = charts.ticks(low, high)
    assert len(found) <= 12
    slack = 1e-6 * max(length, abs(low) * 1e-6)
    assert all(low - slack <= t <= high + slack for t in found)


@given(st.floats(1e-200, 1e200), st.floats(1.001, 1e9))
def test_log_ticks_are_few_and_lie_inside(low: float, ratio: float) -> None:
    found = charts.log_ticks(low, low * ratio)
    assert len(found) <= 8 and all(low * 0.99 <= t <= low * ratio * 1.01 for t in found)


def test_one_colour_scale_serves_all_maps() -> None:
    scale = charts.log_colours([np.array([1e-3, 0.0]), np.array([1e-1, np.nan])])
    assert (scale.low, scale.high) == (1e-3, 1e-1)
    assert scale.paint(1e-3).fill == charts.SEQUENTIAL[0] and scale.paint(1e-1).fill == charts.SEQUENTIAL[-1]
    assert scale.paint(0.0) == scale.paint(math.nan) == charts.NO_DATA


# The file


def test_it_is_written_in_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, make())
    Page(path.read_text(encoding="utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_text

    def half(self: Path, data: str, **options: str) -> int:
        whole(self, data[: len(data) // 2], **options)
        raise KeyboardInterrupt

    older = tmp_path / "older.html"
    older.write_text("old")
    monkeypatch.setattr(Path, "write_text", half)
    for path in (tmp_path / "new.html", older):
        with pytest.raises(KeyboardInterrupt):
            write_report(path, make())
    assert [p.name for p in tmp_path.iterdir()] == ["older.html"] and older.read_text() == "old"


def test_the_timeline_has_a_dot_for_each_stretch_and_shades_what_ran_adapted() -> None:
    content = make()
    page = render(content)
    start, end = page.index('id="timeline"'), page.index('id="facts"')
    section = page[start:end]
    assert section.count("<polyline") == 3 and section.count("to token ") == 27
    line = content.timelines["recipes"]
    assert section.count("<rect") == sum(line.adapted) == 5
    novel = sum(n == "novel" for n in line.nearest)
    assert section.count(": novel, score") == novel > 0
    assert "2,304 tokens" in section


def test_a_timeline_copes_with_nothing_and_with_what_is_not_finite() -> None:
    content = make()
    for line in (Line([], [], [], [], []), Line([256], [math.nan], ["prose"], [math.inf], [False])):
        page = render(dataclasses.replace(content, timelines={"odd": line}))
        assert "nan" not in page[page.index('id="timeline"') : page.index('id="facts"')]
    assert 'id="timeline"' not in render(dataclasses.replace(content, timelines={}))
