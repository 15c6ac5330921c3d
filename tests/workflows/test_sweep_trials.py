"""The trials of a grid, and the values with the best validation scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.recipe import load_recipe
from dominie.workflows.sweep_trials import (
    Row,
    best_values,
    check_selection,
    grid,
    seeds_of,
    write_csv,
)

MINI = Path(__file__).parents[1] / "recipes" / "mini.yaml"
RATE, SHARE = "stages.sft.train.learning_rate", "stages.align.data.domain.share"


def test_a_grid_is_every_combination_under_every_seed():
    trials = grid(MINI, [f"{RATE}=1e-3,2e-3", f"{SHARE}=0.1, 0.5"], seeds=[0, 1], only=["sft"])
    assert len(trials) == len({trial.name for trial in trials}) == 8
    assert [trial.seed for trial in trials[:4]] == [0, 1, 0, 1], "neighbours share the least"
    recipe = trials[3].loaded()
    assert recipe.name == trials[3].name == "learning-rate-1e-3-share-0.5-seed-1"
    assert recipe.train.seed == 1
    assert recipe.trained["sft"].train.learning_rate == 1e-3
    assert list(recipe.stages) == ["teacher", "sft"], "sft, and the teacher of a task"
    assert len({trial.digest() for trial in trials}) == 8


def test_a_list_may_be_a_value_and_names_are_with_unique_names():
    key = "stages.distill.loss.attention.layers"
    trials = grid(MINI, [f"{key}=[[0,0],[1,1]],[[2,2]]"])
    assert [trial.values[key] for trial in trials] == ["[[0,0],[1,1]]", "[[2,2]]"]
    long = grid(MINI, [f"data.general.path=toyworld:general?rows={'0' * 90}{n}" for n in "12"][:1])
    assert len(long[0].name) <= 80
    alike = grid(MINI, ["a.weight=1,2", "b.weight=2,1"])
    assert len({trial.name for trial in alike}) == 4


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ("train.steps", "not a list of values"),
        ("train.steps=1,", "not a list of values"),
        ("train.seed=0,1", "--seeds 0-4"),
        ("name=a,b", "a sweep gives these itself"),
    ],
)
def test_lists_that_cannot_be_parsed(over, words):
    with pytest.raises(InputError, match=words):
        grid(MINI, [over])
    with pytest.raises(InputError, match="varied twice"):
        grid(MINI, ["train.steps=1", "train.steps=2"])


def test_seeds():
    assert seeds_of("0-4") == [0, 1, 2, 3, 4]
    assert seeds_of("7, 1-2,1") == [7, 1, 2]
    for text in ("", "4-0", "a", "1,,2", "-1"):
        with pytest.raises(InputError, match="not a list of seeds"):
            seeds_of(text)


VALIDATED = ["evaluate.tasks.choose={source: general, split: validation}"]


def test_values_are_never_chosen_on_the_test_split():
    recipe = load_recipe(MINI, VALIDATED)
    check_selection(recipe, ["choose"])
    with pytest.raises(InputError, match=r"(?s)no longer be a test.*split: validation"):
        check_selection(recipe, ["choose", "general"])
    with pytest.raises(InputError, match=r"(?s)no such task.*choose.*chose"):
        check_selection(recipe, ["chose"])


def rows(scores: dict[tuple[str, int, str], float], model: str = "sft") -> list[Row]:
    trials = grid(MINI, [f"{RATE}=1e-3,2e-3,4e-3"], seeds=[0, 1])
    by_point = {(trial.values[RATE], trial.seed): trial for trial in trials}
    return [
        Row(
            trial=by_point[rate, seed],
            model=model,
            task=task,
            result={"score": score, "stderr": 0.1, "n": 9, "metric": "exact_match", "groups": {}},
        )
        for (rate, seed, task), score in scores.items()
    ]


def test_the_best_is_best_in_the_mean_over_seeds_and_tasks():
    scores = {
        ("1e-3", 0, "a"): 0.9, ("1e-3", 1, "a"): 0.1, ("1e-3", 0, "b"): 0.1, ("1e-3", 1, "b"): 0.1,
        ("2e-3", 0, "a"): 0.4, ("2e-3", 1, "a"): 0.4, ("2e-3", 0, "b"): 0.5, ("2e-3", 1, "b"): 0.5,
        ("4e-3", 0, "a"): 1.0, ("4e-3", 1, "a"): 1.0,
    }  # fmt: skip
    found = rows(scores) + rows({("1e-3", 0, "a"): 0.2, ("2e-3", 0, "a"): 0.1}, model="align")
    assert best_values(found, ["a", "b"]) == {"sft": ("2e-3",)}, "4e-3 was not scored on b"
    assert best_values(found, ["a"]) == {"sft": ("4e-3",), "align": ("1e-3",)}


def test_the_table_has_a_row_for_every_score(tmp_path):
    write_csv(rows({("1e-3", 0, "a"): 0.9, ("2e-3", 1, "a"): 0.25}), tmp_path / "r.csv")
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert lines[0] == f"run,{RATE},seed,model,task,score,stderr,n,steps,tokens,seconds"
    assert lines[2] == "learning-rate-2e-3-seed-1,2e-3,1,sft,a,0.25,0.1,9,,,"
