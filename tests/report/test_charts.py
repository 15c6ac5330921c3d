import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dominie.report.charts import (
    Bar,
    BarGroup,
    bar_chart,
    interval_strip,
    linear_scale,
    tick_label,
    value_scale,
)

_VALUES = st.lists(
    st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9),
    min_size=1,
    max_size=5,
)


@given(_VALUES)
def test_a_linear_axis_holds_its_values_between_a_few_rising_ticks(values):
    scale = linear_scale(values, 0.0, 100.0)
    tolerance = 1e-6 * max(1.0, abs(scale.low), abs(scale.high))
    assert scale.low <= min(values) + tolerance
    assert scale.high >= max(values) - tolerance
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert 2 <= len(scale.ticks) <= 8
    assert all(0 <= scale(value) <= 100 for value in values)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=5))
def test_a_value_axis_keeps_the_order_of_values(values):
    scale = value_scale(values, 100.0, 0.0)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places, reverse=True)
    assert 2 <= len(scale.ticks) <= 9


def test_ticks_are_round_numbers():
    assert linear_scale([0, 600], 0, 1).ticks == (0, 200, 400, 600)
    assert linear_scale([0.13, 0.87], 0, 1).ticks == (0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_steps_have_no_ticks_between_whole_numbers():
    assert linear_scale([0.0, 2.0], 0, 1, whole=False, least_step=1.0).ticks == (0, 1, 2)


def test_an_axis_is_logarithmic_only_where_values_span_orders_of_magnitude():
    assert not value_scale([0.5, 5.0], 0, 1).logarithmic
    assert not value_scale([-0.01, 5.0], 0, 1).logarithmic
    scale = value_scale([0.012, 5.0], 100.0, 0.0)
    assert scale.logarithmic
    # Equal ratios are equal distances.
    assert scale(0.1) - scale(1.0) == pytest.approx(scale(0.3) - scale(3.0))


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ((0.0, 0.5, 1.0), ["0.0", "0.5", "1.0"]),
        ((0.0, 500.0, 1000.0), ["0", "500", "1,000"]),
        ((0.0, 20_000.0), ["0", "20k"]),
        ((-0.5, 0.0), ["−0.5", "0.0"]),
    ],
)
def test_tick_labels_share_their_digits(ticks, labels):
    assert [tick_label(tick, ticks) for tick in ticks] == labels


def test_a_constant_has_an_axis_around_it():
    scale = value_scale([math.pi], 0.0, 10.0)
    assert scale.low < math.pi < scale.high


@pytest.mark.parametrize(
    ("score", "ends"), [(0.0, (-0.01, 0.01)), (1.0, None), (0.5, (-0.4, 1.4)), (0.1, (0.05, 0.2))]
)
def test_a_strip_stays_within_its_ends(score, ends):
    strip = ElementTree.fromstring(interval_strip(score, ends))
    places = [
        float(value)
        for shape in strip
        for key, value in shape.attrib.items()
        if key in ("x1", "x2", "x")
    ]
    assert all(4 <= place <= 116 for place in places)
    assert all(float(shape.attrib.get("width", 0)) >= 0 for shape in strip)


def test_bars_are_as_long_as_their_values():
    groups = [
        BarGroup("a", (Bar(0.8, "80.0", (0.7, 0.9)), Bar(0.4, "40.0", style="second"))),
        BarGroup("b", (Bar(0.0, "0.0"),)),
    ]
    chart = ElementTree.fromstring(bar_chart("t", groups, ticks=[(0.5, "50 %")], half=True))
    wide = [float(rect.attrib["width"]) for rect in chart.iter("rect")]
    assert wide[0] == 2 * wide[1]
    assert wide[2] == 0.5, "what is nothing can still be seen"
    assert [t.text for t in chart.iter("text")] == ["50 %", "a", "80.0", "40.0", "b", "0.0"]
