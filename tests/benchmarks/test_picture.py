"""The picture of loss over memory shows the means of rows, at their places."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import picture


def row(method, budget, loss, deployment="prose", far=True, novel="polish"):
    where = {"model": "one", "deployment": deployment, "budget": budget, "far": far, "novel": novel}
    return where | {"method": method, "device_bits": budget, "excess_nll": loss}


def points_of(drawn, method):
    (way,) = [p.get("d") for p in drawn.findall(".//{*}path") if p.get("class") == method and len(p)]
    return [tuple(map(float, pair)) for pair in re.findall(r"([0-9.]+) ([0-9.]+)", way)]


def test_a_point_is_the_mean_of_far_kinds_and_less_loss_is_lower():
    rows = [row("static", 3.0, 0.02), row("static", 3.0, 0.04, novel="c"), row("static", 3.0, 9.0, far=False)]
    rows += [row("static", 3.0, 9.0, novel="at one budget alone"), row("static", 2.0, 0.06, novel="c")]
    rows += [row("static", 2.0, 0.06), row("adapted", 2.0, 0.03), row("adapted", 3.0, 0.0), row("another", 3.0, 5.0)]
    assert picture.means(rows)["prose"]["static"] == [(2.0, 0.06), (3.0, pytest.approx(0.03))]
    drawn = ElementTree.fromstring(picture.picture(rows))
    (left, high), (right, middle) = points_of(drawn, "static")
    (_, same), (_, bottom) = points_of(drawn, "adapted")
    assert left < right and high < middle == same < bottom  # downwards is less
    assert (middle - high) == pytest.approx(bottom - middle, abs=0.2)
    assert "another" not in picture.picture(rows)


def test_a_gain_against_bfloat16_lies_inside_too():
    drawn = ElementTree.fromstring(picture.picture([row("static", 3.0, -0.01), row("static", 2.0, 0.01)]))
    assert all(y <= picture.HEIGHT - picture.BOTTOM for _, y in points_of(drawn, "static"))


def test_without_far_kinds_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no rows of far kinds"):
        picture.picture([row("static", 3.0, 0.1, far=False)])
