import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dominie.report.formatting import linear_scale, tick_label, value_scale

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
