"""Old module paths and names work for one release, and say what to write instead."""

from __future__ import annotations

from importlib import import_module

import pytest
from tiny import tiny_model

import dominie
from dominie.data.row_store import Row
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


def test_columns_and_the_keyword_of_a_batch():
    from dominie.data.batch import collate
    from dominie.losses.objective import Objective
    from dominie.losses.terms import LossTerms, NextToken
    from dominie.training.loss_forward import DistillationInputs, loss_in_forward

    objective, model = Objective([LossTerms(next_token=NextToken())]), tiny_model()
    with pytest.warns(DeprecationWarning, match="objective.columns"):
        from dominie.losses.objective import COLUMNS
    assert list(COLUMNS) == objective.columns
    batch = collate([(0, Row([3, 4, 5, 6], [False, True, True, True]))])
    with loss_in_forward(model, objective):
        now = model(inputs=DistillationInputs(batch))["loss"]
        with pytest.warns(DeprecationWarning, match="inputs="):
            assert model(lesson=DistillationInputs(batch))["loss"] == now
