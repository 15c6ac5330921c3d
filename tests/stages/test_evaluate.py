"""Tasks of a recipe, from its YAML to `results.json`, on untrained toy models."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.evaluation import metrics
from dominie.evaluation.score_items import SampleScore
from dominie.recipe import load_recipe
from dominie.workflows.check import check_recipe
from dominie.workflows.pipeline import evaluate_recipe

RECIPE = """\
name: shop
data:
  shop: {path: shop.jsonl, test_fraction: 1.0}
  names: {path: shop.jsonl, test_fraction: 1.0, where: {kind: name}}
evaluate:
  models: {small: "toyworld:student", large: "toyworld:teacher"}
  baseline: large
  tasks:
    exact: {source: shop, by: kind}
    words: {source: shop, metric: token_f1, max_new_tokens: 4}
    number: {source: shop, metric: exact_match, extract: 'no (\\d+)', max_new_tokens: 4}
    choice: {source: names, metric: choice, options: offered}
    same: {source: shop, metric: agreement, teacher: "toyworld:teacher", limit: 3}
    moved: {source: shop, metric: forgetting, limit: 3}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    rows = [
        {
            "prompt": f"the {colour} {thing} ?",
            "completion": colour,
            "kind": "name" if thing == "lamp" else "other",
            "offered": ["red", "blue", "green"],
        }
        for colour in ("red", "blue", "green")
        for thing in ("lamp", "desk", "scarf")
    ]
    (folder / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "shop.yaml").write_text(text)
    return folder / "shop.yaml"


def quiet() -> Display:
    return Display(Console(quiet=True))


def evaluated(recipe: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    """The results, and what was printed on the way to them."""
    console = Console(file=io.StringIO(), width=200)
    run = evaluate_recipe(load_recipe(recipe, overrides), recipe.parent / "runs", Display(console))
    assert isinstance(console.file, io.StringIO)
    return json.loads((run / "results.json").read_text()), console.file.getvalue()


def test_tasks_are_scored_compared_and_kept(tmp_path):
    recipe = write_recipe(tmp_path)
    results, printed = evaluated(recipe)
    assert list(results) == ["small", "large"]
    for scores in results.values():
        assert list(scores) == ["exact", "words", "number", "choice", "same", "moved"]
        for score in scores.values():
            low, high = score["interval"]
            assert 0 <= low <= score["score"] <= high <= 1
            assert score["stderr"] >= 0
    small = results["small"]
    assert [small[task]["n"] for task in small] == [9, 9, 9, 3, 3, 3]
    assert set(small["exact"]["groups"]) == {"name", "other"}
    assert small["number"]["invalid"] == 1.0
    assert "100.0 % of outputs invalid" in printed
    assert small["choice"]["measure"] == "most likely option"
    assert results["large"]["same"]["score"] == 1.0

    assert results["large"]["moved"]["kl"] == 0.0, "the baseline is the base"
    assert small["moved"]["kl"] == small["same"]["kl"] > 0.0
    assert small["moved"]["agreement"] == small["same"]["score"]
    low, high = small["moved"]["kl_interval"]
    assert low <= small["moved"]["kl"] <= high
    assert f"moved KL {small['moved']['kl']:.3g} nats" in printed
    tasks = load_recipe(recipe, ["evaluate.baseline=null"]).evaluate.tasks
    assert tasks["moved"].teacher == "toyworld:student", "the first model without a baseline"

    folder = tmp_path / "runs" / "shop"
    comparisons = json.loads((folder / "evaluation" / "comparisons.json").read_text())
    assert comparisons["baseline"] == "large"
    pair = comparisons["differences"]["same"]["small"]["large"]
    assert pair["difference"] == pytest.approx(small["same"]["score"] - 1.0)
    assert pair.keys() == {"difference", "interval"}
    sample = json.loads((folder / "evaluation/small/number.jsonl").read_text().splitlines()[0])
    assert (sample["correct"], sample["invalid"], sample["score"]) == (False, True, 0.0)
    assert "Over <span" in (folder / "report.html").read_text()

    again, printed = evaluated(recipe)
    assert again == results
    assert printed.count("already scored") == 2
    changed, printed = evaluated(recipe, "evaluate.tasks.number.extract=red|blue|green")
    assert "already scored" not in printed
    assert changed["small"]["exact"] == results["small"]["exact"]


def test_a_registered_metric_is_a_value_of_the_recipe_s_key(tmp_path):
    """One function with its registration; nothing else knows of it."""
    names = dict(metrics.METRICS)
    try:

        @metrics.metric("same_length", keys=("k",), measure=lambda task: f"within {task.k}")
        def same_length(task: Any, answer: str | None, row: Any) -> SampleScore:
            near = abs(len((answer or "").split()) - len(row.answer.split())) <= task.k
            return SampleScore.of_mean(float(near))

        tasks = "  tasks: {near: {source: shop, metric: same_length, k: 99}}\n"
        models = "evaluate:\n  models: {small: 'toyworld:student'}\n"
        recipe = write_recipe(tmp_path, RECIPE.split("evaluate:")[0] + models + tasks)
        check_recipe(load_recipe(recipe), tmp_path / "runs", quiet())
        results, _ = evaluated(recipe)
        assert results["small"]["near"]["score"] == 1.0
        assert results["small"]["near"]["measure"] == "within 99"
        with pytest.raises(InputError, match="extract means nothing to metric same_length"):
            load_recipe(recipe, ["evaluate.tasks.near.extract=a"])
        with pytest.raises(InputError, match="same_lenght'; did you mean same_length"):
            load_recipe(recipe, ["evaluate.tasks.near.metric=same_lenght"])
    finally:
        metrics.METRICS.clear()
        metrics.METRICS.update(names)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.tasks.exact.metric=exact_mach", "did you mean exact_match"),
        ("evaluate.tasks.exact.lables=[a]", "did you mean labels"),
        ("evaluate.tasks.exact.k=3", "k means nothing to metric exact_match"),
        ("evaluate.tasks.number.extract=(", "no regular expression"),
        ("evaluate.tasks.exact.labels=[red, blue]", "the target is none of the labels"),
        ("evaluate.tasks.choice.options=kind", "no options to choose from in the field 'kind'"),
        ("evaluate.tasks.same.source=null", "needs a source of questions"),
        ("evaluate.tasks.moved.extract=a", "extract means nothing to metric forgetting"),
        ("evaluate.tasks.moved.teacher=nobody", "unknown stage or model 'nobody'"),
        ("evaluate.baseline=medium", "baseline is none of the models: small, large"),
        ("data.names.where={kind: brand}", "the test split is empty"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(tmp_path, override, message):
    recipe = write_recipe(tmp_path)
    with pytest.raises(InputError) as refused:
        check_recipe(
            load_recipe(recipe, [override]), tmp_path / "runs", Display(Console(quiet=True))
        )
    assert message in str(refused.value)


def test_a_recipe_of_tasks_alone_can_be_checked(tmp_path):
    check_recipe(
        load_recipe(write_recipe(tmp_path)), tmp_path / "runs", Display(Console(quiet=True))
    )


GUIDE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_guide_s_examples_are_valid(tmp_path):
    """The first lists tasks, the second sources to take them from."""
    blocks = [part.split("```")[0] for part in GUIDE.read_text("utf-8").split("```yaml\n")[1:]]
    named = sorted(set(re.findall(r"source: (\w+)", blocks[0])))
    sources = "".join(f"  {name}: {{path: {name}.jsonl, test_fraction: 1.0}}\n" for name in named)
    stage = "{student: 'toyworld:student', data: {general: 1.0}, loss: {next_token: 1.0}}"
    models = "models: {mixtral: {path: 'toyworld:teacher'}}\n"
    stages = f"stages:\n  distill: {stage}\n  align: {stage}\n"
    recipe = tmp_path / "guide.yaml"
    recipe.write_text(f"name: guide\n{models}data:\n{sources}{stages}{blocks[0]}")
    tasks = load_recipe(recipe).evaluate
    assert tasks is not None
    assert len({task.metric for task in tasks.tasks.values()}) >= 9
    ask = "evaluate: {models: {a: 'toyworld:student'}, tasks: {t: {source: matching}}}\n"
    recipe.write_text(f"name: guide\n{blocks[1]}{ask}")
    assert load_recipe(recipe).data["matching"].where is not None
