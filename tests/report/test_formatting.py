import math

import pytest

from dominie.report import formatting as formats


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.76949, "76.9"), (0.0, "0.0"), (-0.0, "0.0"), (-0.00001, "0.0"), (-0.021, "−2.1")],
)
def test_percent_has_one_digit_and_no_negative_zero(value, text):
    assert formats.percent(value) == text


def test_points_are_whole_from_ten_on():
    assert [formats.points(x) for x in (0.416, -0.0996, 0.034)] == ["42", "10", "3.4"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.24, "4.2 s"),
        (9.5, "10 s"),
        (59.4, "59 s"),
        (59.9, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (50 * 3600, "2 d 2 h"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_duration_names_its_two_largest_units(seconds, text):
    assert formats.duration(seconds).replace(formats.THIN, " ") == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (711_000, "711k"), (1_062_528, "1.06M"), (7.24e9, "7.24B"), (math.inf, "–")],
)
def test_size_has_three_digits(number, text):
    assert formats.size(number) == text


def test_a_file_size_has_its_unit():
    assert [formats.file_size(n).replace(formats.THIN, " ") for n in (512, 1_062_528, 0)] == [
        "512 B",
        "1.06 MB",
        "0 B",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.07634, "0.0763"), (2.306, "2.31"), (0, "0"), (12.34, "12.3"), (1.2e-5, "1.2e-05")],
)
def test_figure_has_three_significant_digits(value, text):
    assert formats.figure(value) == text


def test_shortened_keeps_both_ends_and_the_length():
    short = formats.shortened("sweep-learning-rate-2e-5", 11)
    assert len(short) == 11
    assert short.startswith("sweep")
    assert short.endswith("2e-5")
    assert formats.shortened("align", 11) == "align"


def test_listed():
    assert [formats.listed(list(words)) for words in ("a", "ab", "abc")] == [
        "a",
        "a and b",
        "a, b and c",
    ]


def test_a_template_keeps_the_names_in_it_marked():
    found = formats.rich("{a:model} keeps {size} in {tasks}.", a="x", size="5", tasks=_tasks("t"))
    assert formats.plain(found) == "x keeps 5 in t."
    assert [(part.text, part.kind) for part in found if part.kind != "text"] == [
        ("x", "model"),
        ("t", "task"),
    ]
    braces = formats.rich("{a:model}.", a="{b} {0}")
    assert formats.plain(braces) == "{b} {0}.", "names are filled in, never formats"


def test_rich_texts_are_joined_as_a_list():
    texts = [formats.joined([_tasks(name) for name in names]) for names in ("", "a", "ab", "abc")]
    assert [formats.plain(text) for text in texts] == ["", "a", "a and b", "a, b and c"]
    assert formats.plain(formats.joined([_tasks("a"), _tasks("b")], " but ")) == "a but b"


def _tasks(name):
    return formats.rich("{t:task}", t=name)
