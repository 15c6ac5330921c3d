"""A kind of stage that is registered from outside and makes data, on which a later stage trains."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.core.references import ModelName, SourceName
from dominie.planning.plan import machine, plan_recipe
from dominie.planning.plan_output import as_json, as_lines
from dominie.recipe import dump_recipe, load_recipe, register_stage_kind
from dominie.recipe.stage_config import STRICT, stage_kinds, unregister_stage_kind
from dominie.stages import stage_kind as kind
from dominie.stages.stage_kind import StageKind, StageRun
from dominie.workflows.check import check_recipe
from dominie.workflows.pipeline import run_recipe

RECIPE = """
name: toy
train: {steps: 1, batch: 4, max_length: 64}
data: {general: {path: "toyworld:general?rows=40"}}
stages:
  after: {student: tuned, data: {general: 1.0}, loss: {next_token: 1.0}}
  tuned: {student: "toyworld:student", data: {written: 0.5, general: 0.5}, loss: {next_token: 1.0}}
  written: {toy_rows: {rows: 12}, test_fraction: 0.3}
evaluate:
  models: {after: after}
  tasks: {copies: {source: written, metric: exact_match, split: test, max_new_tokens: 2}}
"""


@dataclass(frozen=True, kw_only=True)
class ToyRows:
    """The settings of the toy kind."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    rows: int = 4
    note: str = ""
    fails: bool = False
    model: ModelName | None = None
    source: SourceName | None = None


@dataclass(frozen=True, kw_only=True)
class ToyStage(StageKind):
    """Writes conversations that copy a number."""

    kind: ClassVar[str] = "toy_rows"
    key: ClassVar[str | None] = "toy_rows"
    makes: ClassVar = "data"
    toy_rows: ToyRows
    test_fraction: float = 0.0

    def conversations(self, sizes: Any) -> int:
        return self.toy_rows.rows

    def make(self, run: StageRun) -> dict[str, Any]:
        with run.result() as folder, (folder / "rows.jsonl").open("w") as file:
            for number in range(self.toy_rows.rows):
                asked = {"role": "user", "content": f"copy {number // 10} {number % 10}"}
                answer = {"role": "assistant", "content": f"{number // 10} {number % 10}"}
                file.write(json.dumps({"messages": [asked, answer]}) + "\n")
                if self.toy_rows.fails and number == 2:
                    raise OSError("no space left")
        return {"conversations": self.toy_rows.rows}


@pytest.fixture(autouse=True)
def toy_kind() -> Any:
    register_stage_kind(ToyStage)
    yield
    unregister_stage_kind("toy_rows")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return tmp_path / "toy.yaml"


def run(recipe: Path, *overrides: str) -> str:
    """Run a recipe beside its file; what was printed."""
    out = StringIO()
    display = Display(Console(file=out, width=400, color_system=None))
    run_recipe(load_recipe(recipe, overrides), recipe.parent / "runs", display)
    return out.getvalue()


def record(recipe: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (recipe.parent / "runs" / "toy" / stage / "stage.json").read_text()
    )
    return found


def test_a_stage_trains_on_what_another_made(recipe):
    printed = run(recipe)
    assert printed.index("written toy_rows") < printed.index("tuned 1 steps")
    made, trained = record(recipe, "written"), record(recipe, "tuned")
    assert made["kind"] == "toy_rows"
    assert made["conversations"] == 12
    assert "12 conversations" in made["description"]
    assert "data/rows.jsonl" in made["files"]
    assert trained["data"]["written"]["read"] == 12
    assert trained["data"]["written"]["test"] > 0, "held out of training"
    assert set(record(recipe, "after")["data"]) == {"general"}
    folder = recipe.parent / "runs" / "toy"
    assert "copies" in json.loads((folder / "results.json").read_text())["after"]
    page = (folder / "report.html").read_text()
    assert "written" in page
    assert "toy_rows" in page
    card = (folder / "after" / "model" / "README.md").read_text()
    assert "| written |  | toy_rows |" in card
    again = run(recipe)
    assert "written already made" in again
    assert "tuned already trained" in again
    assert "after already trained" in again
    changed = run(recipe, "stages.written.toy_rows.rows=16")
    for stage in ("written", "tuned", "after"):
        assert f"{stage}: what it depends on has changed" in changed, changed
    assert "written: what it depends on has changed (toy_rows.rows: 12 before, 16 now)" in changed
    assert "data.written.rows: other conversations" in changed
    assert record(recipe, "tuned")["data"]["written"]["read"] == 16
    noted = run(recipe, "stages.written.toy_rows.rows=16", "stages.written.toy_rows.note=x")
    assert "written: what it depends on has changed" in noted
    assert "tuned already trained" in noted, "the rows are the same"


def test_files_that_were_damaged_are_noticed(recipe):
    quick = ("stages.after.train.steps=1", "evaluate.tasks.copies.limit=1")
    run(recipe, *quick)
    with (recipe.parent / "runs" / "toy" / "written" / "data" / "rows.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match="the data of a finished stage are damaged"):
        run(recipe, *quick)


def test_a_stage_that_was_cut_off_begins_again(recipe):
    with pytest.raises(Exception, match="cannot be written"):
        run(recipe, "stages.written.toy_rows.fails=true")
    folder = recipe.parent / "runs" / "toy" / "written"
    assert record(recipe, "written")["status"] == "running"
    assert not (folder / "data").exists()
    run(recipe, "stages.tuned.train.steps=1")
    assert record(recipe, "written")["status"] == "done"


def test_what_can_be_checked_is_checked_before_anything_is_made(recipe):
    with pytest.raises(InputError, match="longer than the model's context"):
        run(recipe, "stages.tuned.train.max_length=100000")
    with pytest.raises(InputError, match="router"):
        run(recipe, "stages.tuned.loss.router=0.1")
    assert not (recipe.parent / "runs" / "toy" / "written").exists()


def test_check_and_plan_show_it(recipe):
    loaded = load_recipe(recipe)
    assert load_recipe(_written(recipe, dump_recipe(loaded))) == loaded
    out = StringIO()
    display = Display(Console(file=out, width=200, color_system=None))
    checked = check_recipe(loaded, recipe.parent / "runs", display)
    assert checked.stages == ("written", "tuned", "after")
    assert ("source written", "stage written makes it, and has not been run") in checked.not_checked
    assert "source written: stage written makes it" in out.getvalue()
    assert "3 stages can run" in out.getvalue()
    plan = plan_recipe(loaded, machine(gpu="h100"))
    assert plan.sizes["written"].conversations == 12
    (line,) = [line for line in as_lines(plan) if line.startswith("written")]
    assert "made by toy_rows, not trained" in line
    assert as_json(plan)["stages"]["written"]["trainable_parameters"] == 0
    assert plan.stages["tuned"].work is not None
    run(recipe)
    checked = check_recipe(loaded, recipe.parent / "runs", display)
    assert checked.sources["written"].read == 12
    assert not checked.not_checked


def _written(recipe: Path, text: str) -> Path:
    file = recipe.with_name("again.yaml")
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.tuned.student=written", "stage written makes data and no model"),
        ("evaluate.models.after=written", "stage written makes data and no model"),
        ("stages.after.data={tuned: 1.0}", "stage tuned makes a model and no data"),
        ("data.written={path: x.jsonl}", "the name of a stage and of a source"),
        ("stages.written.toy_rows.model=after", "stages need each other"),
        ("stages.written.toy_rows.source=written", "stages need each other"),
        ("stages.written.toy_rows.source=genral", "unknown source 'genral'"),
        ("stages.written.test_fraction=0", "source written has no test split"),
        ("stages.written.toy_rows.rosw=3", "unknown key"),
        ("stages.written.toy_row={rows: 3}", "unknown key"),
    ],
)
def test_misuse_is_refused_by_name(recipe, override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, [override])


def test_what_it_reads_is_part_of_what_it_depends_on(recipe):
    overrides = ["stages.written.toy_rows.source=general", "stages.written.toy_rows.model=base"]
    loaded = load_recipe(recipe, [*overrides, "models.base={path: toyworld:student}"])
    stage = loaded.stages["written"]
    assert (stage.models, stage.sources) == (["base"], ["general"])
    assert stage.renamed(str.upper).models == ["BASE"]
    assert loaded.needs("tuned") == ["written"]
    assert loaded.needs("after") == ["tuned"]


def test_a_kind_has_a_name_and_a_key_of_its_own():
    other = type("Other", (ToyStage,), {"__doc__": "x"})
    with pytest.raises(ValueError, match="ToyStage is the kind"):
        register_stage_kind(dataclasses.dataclass(frozen=True, kw_only=True)(other))
    assert list(stage_kinds()) == ["train", "merge", "upcycle", "prune", "answers", "toy_rows"]


def test_nobody_else_asks_which_kind_a_stage_is():
    """What depends on the kind is a question to the stage, so that a new kind needs one file."""
    package = Path(kind.__file__).parents[1]
    own = {f"{name}.py" for name in ("train", "merge", "upcycle", "prune", "write_answers")}
    asked = re.compile(
        r"isinstance\([^()]*\b(TrainStage|MergeStage|UpcycleStage|PruneStage|AnswersStage|StageKind)\b"
    )
    found = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if file.name not in own and asked.search(file.read_text())
    ]
    assert not found
