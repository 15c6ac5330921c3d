import math
import re
from xml.etree import ElementTree

import pytest

from dominie.report.charts import element
from dominie.report.curves import Series, line_chart


def paths(chart: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(chart).findall(".//path")


def test_a_line_is_lifted_where_it_is_not_finite():
    points = [(0, 1.0), (1, 0.9), (2, math.nan), (3, 0.7), (4, math.inf), (5, 0.5), (6, 0.4)]
    chart = line_chart("loss", [Series("loss", points, "total")])
    (path,) = paths(chart)
    assert path.attrib["d"].count("M") == 3
    assert "nan" not in chart
    assert "inf" not in chart


def test_there_is_no_chart_of_nothing():
    assert line_chart("loss", []) is None
    assert line_chart("loss", [Series("loss", [(1, math.nan)], "total")]) is None


def test_a_single_value_is_a_point():
    chart = line_chart("loss", [Series("loss", [(10, 2.0)], "total")])
    assert ElementTree.fromstring(chart).find(".//circle") is not None


def test_a_falling_loss_goes_down_the_page():
    chart = line_chart("loss", [Series("loss", [(0, 5.0), (10, 1.0)], "total")])
    (path,) = paths(chart)
    (x1, y1), (x2, y2) = (
        tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path.attrib["d"])
    )
    assert x2 > x1
    assert y2 > y1


def test_long_lines_are_thinned_without_losing_a_spike():
    points = [(step, 1.0 + 1e-3 * math.sin(step)) for step in range(20_000)]
    points[12_345] = (12_345, 7.5)
    raw, smooth = paths(line_chart("loss", [Series("loss", points, "total")], points=200))
    for path in (raw, smooth):
        assert path.attrib["d"].count("L") < 260
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", raw.attrib["d"])]
    assert max(heights) - min(heights) > 80  # the spike still spans the chart


def test_a_chart_is_described_for_screen_readers():
    chart = ElementTree.fromstring(
        line_chart("Training loss", [Series("loss", [(0, 5.0), (10, 0.25)], "total")])
    )
    assert chart.attrib["role"] == "img"
    assert chart.attrib["aria-label"] == "Training loss. loss from 5.00 to 0.250"


def test_names_are_escaped():
    hostile = '"><script>alert(1)</script>'
    chart = line_chart(hostile, [Series(hostile, [(0, 1.0), (1, 2.0)], "c0")])
    assert "<script" not in chart
    assert hostile in ElementTree.fromstring(chart).attrib["aria-label"]
    assert element("text", hostile) == (
        "<text>&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;</text>"
    )


def test_values_can_be_read_off_the_path_of_a_line():
    lines = [Series("a", [(0, 8.0), (10, 2.0)], "c0"), Series("b", [(0, 4.0), (10, 4.0)], "c1")]
    chart = ElementTree.fromstring(line_chart("loss", lines))
    low, high, start, end = map(float, chart.attrib["data-y"].split())
    read = {}
    for path in chart.iter("path"):
        ys = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", path.attrib["d"])]
        read[path.attrib["data-line"]] = [
            low + (y - start) / (end - start) * (high - low) for y in ys
        ]
    assert read["0"] == pytest.approx([8.0, 2.0], rel=1e-2)
    assert read["1"] == pytest.approx([4.0, 4.0], rel=1e-2)


def test_an_axis_can_be_asked_to_span_more():
    line = Series("a", [(0, 1.0), (10, 0.9)], "c0")
    wide = ElementTree.fromstring(line_chart("loss", [line], spanned=[0.01, 8.0]))
    low, high, *_, kind = wide.attrib["data-y"].split()
    assert float(low) <= 0.01
    assert float(high) >= 8.0
    assert kind == "log"
