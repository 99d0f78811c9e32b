"""The report's first sentence and its picture: the share that switching removed, and loss over bytes."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from made_up_reports import checked, group, make

from dynamo_jax.report.content import ReportContent
from dynamo_jax.report.gains import gains, switching_words
from dynamo_jax.report.page import render
from dynamo_jax.report.picture import points

LABEL = r'<text x="([0-9.]+)" y="([0-9.]+)" text-anchor="(\w+)" class="ink">(.*?)<'
MINUS, PLUS_MINUS = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"


def content_of(**novel: tuple[float, float, float, float]) -> ReportContent:
    """Novel kinds -> what the baseline loses, its error, what auto changes, its error. A known kind is beside them."""
    rows = group("prose", "known")
    for name, (lost, error, change, change_error) in novel.items():
        for row in group(name, "novel", change, change_error):
            if row["variant"] == "baseline":
                row |= {"nll": 2.0 + lost, "difference": lost, "standard_error": error}
            if row["variant"] == "auto":
                row |= {"nll": 2.0 + lost + change}
            rows.append(row)
    return dataclasses.replace(make(novel=dict.fromkeys(novel, (0.0, 0.0))), rows=rows)


def test_the_share_of_one_kind_is_what_it_changed_over_what_was_lost() -> None:
    words = switching_words(content_of(german=(0.05, 0.002, -0.02, 0.001)))
    assert words == (
        f"Switching removed 40% of what the baseline loses against bf16 on german: {MINUS}0.0200 {PLUS_MINUS} 0.0010 "
        f"of +0.0500 {PLUS_MINUS} 0.0020 nats a token."
    )


def test_of_several_kinds_the_mean_counts_and_the_best_and_the_worst_are_named() -> None:
    kinds = {"a": (0.05, 0.003, -0.04, 0.003), "b": (0.03, 0.004, -0.006, 0.004), "c": (0.04, 0.0, -0.02, 0.0)}
    words = switching_words(content_of(**kinds))
    assert f"removed {0.066 / 0.12:.0%} of what the baseline loses against bf16 on the mean of 3 novel kinds" in words
    error = f"{PLUS_MINUS} {0.005 / 3:.4f}"
    assert f"{MINUS}0.0220 {error} of +0.0400 {error} nats a token" in words
    assert re.search(r"It removed most on a \(80%: .*\), least on b \(20%, which may be noise: ", words)
    more = switching_words(content_of(**kinds | {"a": (0.05, 0.0, -0.06, 0.0)}))
    assert "most on a (120%, more than was lost: " in more


def test_where_the_baseline_loses_nothing_that_is_said_and_not_divided_by() -> None:
    kinds = {"a": (0.05, 0.002, -0.04, 0.002), "b": (0.03, 0.002, -0.01, 0.002), "luck": (0.003, 0.002, -0.002, 0.0005)}
    words = switching_words(content_of(**kinds))
    assert (
        re.search(r"Where there is a loss, switching removed most on a .*, least on b ", words) and "67%" not in words
    )
    assert f"On luck (+0.0030 {PLUS_MINUS} 0.0020) the baseline shows no sure loss." in words
    one = switching_words(content_of(**{name: kinds[name] for name in ("b", "luck")}))
    assert "Where there is a loss, switching removed on b (33%: " in one
    below = switching_words(content_of(luck=(-0.02, 0.002, 0.004, 0.001)))
    assert below.startswith(f"The baseline shows no sure loss against bf16 on luck ({MINUS}0.0200") and "%" not in below
    assert f"Switching made luck (+0.0040 {PLUS_MINUS} 0.0010) worse." in below


def test_bad_news_is_told_as_such() -> None:
    worse = switching_words(content_of(a=(0.05, 0.002, 0.01, 0.002)))
    assert worse.startswith("Switching added 20% to what the baseline loses") and "Switching made a (+0.0100" in worse
    both = switching_words(content_of(a=(0.05, 0.002, 0.01, 0.002), b=(0.05, 0.002, 0.02, 0.002)))
    assert "removed" not in both and "made a (+0.0100" in both and "and b (+0.0200" in both
    unsure = switching_words(content_of(a=(0.05, 0.002, -0.003, 0.002)))
    assert unsure.startswith("Switching made no sure difference to what") and "%" not in unsure
    unknown = switching_words(content_of(a=(0.05, math.nan, -0.03, 0.002)))
    assert "%" not in unknown


def test_known_text_and_text_without_its_rows_have_no_gain() -> None:
    content = content_of(a=(0.05, 0.002, -0.02, 0.002))
    assert [gain.name for gain in gains(content)] == ["a"]
    for variant in ("bf16", "baseline", "auto"):
        less = dataclasses.replace(content, rows=[r for r in content.rows if r["variant"] != variant])
        assert not gains(less) and "does not say what it gains" in switching_words(less)


def test_points_are_means_over_kinds_at_the_bytes_that_the_device_holds() -> None:
    content = content_of(a=(0.05, 0.002, -0.02, 0.003), b=(0.01, 0.002, -0.02, 0.004))
    found = {p.variant: p for p in points(content, known=False)}
    assert list(found) == ["bf16", "rtn4", "rtn3", "rtn2", "baseline", "auto"]
    assert found["bf16"].held == content.expert_weights * 2 and found["bf16"].lost.value == 0
    assert found["rtn4"].held == content.expert_weights * 4.25 / 8
    assert found["baseline"].held == found["auto"].held == content.expert_weights * 3 / 8
    assert found["baseline"].lost.value == pytest.approx(0.03) and found["auto"].lost.value == pytest.approx(0.01)
    assert found["auto"].lost.error == pytest.approx(0.0025) and found["auto"].kinds == 2
    assert {p.kinds for p in points(content, known=True)} == {1}


def first_figure(content: ReportContent) -> str:
    checked(content)
    return render(content).split("<figure", 2)[1]


def test_the_page_begins_with_the_picture_and_the_table_comes_later() -> None:
    content = content_of(a=(0.05, 0.002, -0.02, 0.002))
    page = render(content)
    places = [page.index(part) for part in ("<h1", 'class="lead"', "<figure", 'class="findings"', "<nav", "<table")]
    assert places == sorted(places)
    assert "Loss over memory" in first_figure(content)
    assert first_figure(content).count('class="panel"') == 2
    assert first_figure(make(novel={})).count('class="panel"') == 1


def test_better_is_lower_and_equal_bytes_are_at_one_place() -> None:
    novel = first_figure(content_of(a=(0.05, 0.002, -0.02, 0.002))).split('class="panel"')[2]
    marks = dict(re.findall(r"<title>(\w+): [^<]*</title>(.*?)</g>", novel))
    circle = re.search(r'<circle cx="([0-9.]+)" cy="([0-9.]+)"', marks["baseline"])
    diamond = re.search(r'<polygon points="([0-9.]+),([0-9.]+) ', marks["auto"])
    assert circle and diamond
    assert circle[1] == f"{float(diamond[1]):g}" and float(diamond[2]) + 6 > float(circle[2])


def test_no_label_of_the_picture_lies_over_another() -> None:
    content = content_of(a=(0.0101, 0.002, -0.0003, 0.002), b=(0.0102, 0.002, -0.0001, 0.002))
    for panel in first_figure(content).split('class="panel"')[1:]:
        boxes = []
        for x, y, anchor, words in re.findall(
            r'<text x="([0-9.]+)" y="([0-9.]+)" text-anchor="(\w+)" class="ink">(.*?)<', panel
        ):
            length = 6.4 * len(words)
            start = float(x) - (length if anchor == "end" else 0)
            boxes.append((start, start + length, float(y)))
        assert len(boxes) == 6
        for i, (a, b, y) in enumerate(boxes):
            assert not [1 for c, d, z in boxes[:i] if c < b and a < d and abs(y - z) < 12]
