"""Old module paths and names work for one release, and say what to write instead."""

from __future__ import annotations

from importlib import import_module

import pytest

import dominie
from dominie.deprecated import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_says_which_one_has_its_names_now(old):
    module, new = import_module(old), import_module(MOVED[old])
    own = [n for n, v in vars(new).items() if getattr(v, "__module__", "") == new.__name__]
    name = next(n for n in own if not n.startswith("_"))
    with pytest.warns(DeprecationWarning, match=f"from {new.__name__} import {name}"):
        assert getattr(module, name) is vars(new)[name]
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_what_the_documentation_of_the_release_before_imported():
    with pytest.warns(DeprecationWarning, match="loss_forward import DistillationInputs"):
        from dominie.training.learner import Lesson
    with pytest.warns(DeprecationWarning, match="loss_forward import loss_in_forward"):
        from dominie.training.learner import teaching
    with pytest.warns(DeprecationWarning, match="data.sources import read_split"):
        from dominie.data.splits import read_split
    with pytest.warns(DeprecationWarning, match="teachers.teacher import AdapterTeacher"):
        from dominie.models.minds import Mind
    with pytest.warns(DeprecationWarning, match="dominie.teachers import AdapterTeacher"):
        from dominie.teachers import MindTeacher
    assert all(map(callable, (Lesson, teaching, read_split, Mind, MindTeacher)))
    assert dominie.__version__
