"""Layer and head mappings, and what is said about those that do not fit."""

from __future__ import annotations

import pytest

from dominie.core.errors import InputError
from dominie.models.layer_mapping import check_heads, map_layers


@pytest.mark.parametrize(
    ("spec", "depths", "pairs"),
    [
        ("all", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("uniform", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("uniform", (2, 6), [(0, 2), (1, 5)]),
        ("uniform", (3, 5), [(0, 0), (1, 2), (2, 4)]),
        ("uniform", (4, 2), [(0, 0), (1, 0), (2, 0), (3, 1)]),
        ("last", (3, 5), [(2, 4)]),
        ({"last": 2}, (3, 5), [(1, 3), (2, 4)]),
        ({"every": 2}, (5, 5), [(1, 1), (3, 3)]),
        ({"every": 1}, (2, 2), [(0, 0), (1, 1)]),
        ([[1, 3], [0, 3]], (2, 4), [(0, 3), (1, 3)]),
        (((0, 0),), (1, 1), [(0, 0)]),
    ],
)
def test_layers(spec, depths, pairs) -> None:
    assert map_layers(spec, *depths) == pairs


@pytest.mark.parametrize(
    ("spec", "depths", "message"),
    [
        ("all", (2, 3), "layers: uniform"),
        ({"every": 2}, (4, 8), "layers: uniform"),
        ({"every": 5}, (4, 4), "no layer is mapped"),
        ({"every": 0}, (4, 4), "not a mapping"),
        ({"last": 4}, (3, 5), "no 4 last layers"),
        ({"first": 1}, (3, 3), "not a mapping"),
        ("every", (3, 3), "not a mapping"),
        (None, (3, 3), "not a mapping"),
        ([], (3, 3), "at least one pair"),
        ([[0, 0], [0, 0]], (3, 3), "each once"),
        ([[0, 3]], (3, 3), "does not exist"),
        ([[-1, 0]], (3, 3), "does not exist"),
        ([[0]], (3, 3), "not a pair"),
        ([[0, True]], (3, 3), "not a pair"),
        ([3], (3, 3), "not a pair"),
    ],
)
def test_layers_that_do_not_fit_are_an_input_error(spec, depths, message) -> None:
    with pytest.raises(InputError, match=message):
        map_layers(spec, *depths)


def test_heads() -> None:
    assert check_heads(4, 4) == 1
    assert check_heads(2, 8) == 4
    with pytest.raises(InputError, match="multiple of the student's 8 heads"):
        check_heads(8, 4)
    with pytest.raises(InputError, match="multiple of the student's 3 heads"):
        check_heads(3, 4)
